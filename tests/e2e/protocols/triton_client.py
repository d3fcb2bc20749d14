"""Infers with one of tritonclient's four clients, or over a stream: `triton_client.py ADDRESS CLIENT`, calls as JSON on stdin, outputs as JSON on stdout."""

import asyncio
import json
import queue
import sys

import numpy
from tritonclient.utils import InferenceServerException, np_to_triton_dtype, triton_to_np_dtype

ADDRESS, CLIENT = sys.argv[1:3]


def module():
    if CLIENT == "http":
        import tritonclient.http as client
    elif CLIENT == "http.aio":
        import tritonclient.http.aio as client
    elif CLIENT == "grpc.aio":
        import tritonclient.grpc.aio as client
    else:
        import tritonclient.grpc as client
    return client


TRITON = module()


def tensors(call):
    inputs = []
    for name, datatype, values in call["inputs"]:
        values = numpy.array(values, dtype=triton_to_np_dtype(datatype))
        if datatype == "BYTES":
            values = numpy.array([[text.encode() for text in row] for row in values], dtype=object)
        tensor = TRITON.InferInput(name, list(values.shape), datatype)
        tensor.set_data_from_numpy(values)
        inputs.append(tensor)
    return inputs


def lists(result):
    response = result.get_response()
    outputs = response["outputs"] if isinstance(response, dict) else response.outputs
    names = [output["name"] if isinstance(output, dict) else output.name for output in outputs]
    answer = {}
    for name in names:
        values = result.as_numpy(name)
        if values.dtype == object:
            values = numpy.vectorize(lambda text: text.decode(), otypes=[object])(values)
        answer[name] = values.tolist()
    return answer


def check_metadata(metadata, config, statistics):
    """What a server says of a model is what its answers are."""
    assert metadata["platform"] == "modalkit" and config["name"] == metadata["name"], (metadata, config)
    (model,) = statistics["model_stats"]
    assert (model["name"], model["version"]) == (metadata["name"], metadata["versions"][0]), model


def synchronous(calls):
    client = TRITON.InferenceServerClient(ADDRESS)
    assert client.is_server_live() and client.is_server_ready()
    is_grpc = CLIENT == "grpc"
    arguments = {"as_json": True} if is_grpc else {}
    server = client.get_server_metadata(**arguments)
    assert server["name"] == "modalkit" and "statistics" in server["extensions"], server
    index = client.get_model_repository_index(**arguments)
    index = index["models"] if is_grpc else index
    assert all(model["state"] == "READY" for model in index), index
    for call in calls:
        try:
            yield lists(client.infer(call["model"], tensors(call), request_id="7", client_timeout=60) if is_grpc else client.infer(call["model"], tensors(call), request_id="7"))
        except InferenceServerException as error:
            yield {"error": error.message(), "status": str(error.status())}
    for name in {call["model"] for call in calls}:
        if not client.is_model_ready(name):
            continue
        config = client.get_model_config(name, **arguments)
        check_metadata(
            client.get_model_metadata(name, **arguments),
            config["config"] if is_grpc else config,
            client.get_inference_statistics(name, **arguments),
        )


async def asynchronous(calls):
    answers = []
    async with TRITON.InferenceServerClient(ADDRESS) as client:
        assert await client.is_server_ready()

        async def one(call):
            try:
                return lists(await client.infer(call["model"], tensors(call), request_id="7"))
            except InferenceServerException as error:
                return {"error": error.message(), "status": str(error.status())}

        answers = await asyncio.gather(*map(one, calls))
    return answers


def streamed(calls):
    client = TRITON.InferenceServerClient(ADDRESS)
    results = queue.Queue()
    client.start_stream(lambda result, error: results.put((result, error)))
    for number, call in enumerate(calls):
        client.async_stream_infer(call["model"], tensors(call), request_id=str(number))
    answers = {}
    failed = 0
    while len(answers) + failed < len(calls):
        result, error = results.get(timeout=60)
        if error is not None:
            failed += 1
            continue
        response = result.get_response()
        # Of a pipeline in JSON, chunks may come before.
        if response.parameters["triton_final_response"].bool_param:
            answers[response.id] = lists(result)
    client.stop_stream()
    return [answers.get(str(number), {"error": "", "status": ""}) for number in range(len(calls))]


def main():
    calls = json.load(sys.stdin)
    if CLIENT == "stream":
        answers = streamed(calls)
    elif CLIENT.endswith(".aio"):
        answers = asyncio.run(asynchronous(calls))
    else:
        answers = list(synchronous(calls))
    assert np_to_triton_dtype(numpy.float32) == "FP32"
    print(json.dumps(list(answers)))


main()

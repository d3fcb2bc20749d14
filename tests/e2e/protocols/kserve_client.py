"""Infers with KServe's clients: `kserve_client.py ADDRESS rest|grpc`, calls as JSON on stdin, outputs as JSON on stdout."""

import asyncio
import json
import sys

import numpy
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
from kserve.protocol.infer_type import InferResponse

ADDRESS, KIND = sys.argv[1:3]


def request(call):
    inputs = []
    for name, datatype, values in call["inputs"]:
        if datatype == "BYTES":
            values = numpy.array([[text.encode() for text in row] for row in values], dtype=object)
        else:
            values = numpy.array(values, dtype={"FP32": "float32", "INT64": "int64"}[datatype])
        tensor = InferInput(name, list(values.shape), datatype)
        tensor.set_data_from_numpy(values, binary_data=KIND == "rest" and call.get("binary", False))
        inputs.append(tensor)
    return InferRequest(model_name=call["model"], infer_inputs=inputs)


def lists(response):
    answer = {}
    for output in response.outputs:
        values = output.as_numpy()
        if values.dtype == object:
            values = numpy.vectorize(lambda text: text.decode() if isinstance(text, bytes) else text, otypes=[object])(values)
        answer[output.name] = values.tolist()
    return answer


async def main():
    calls = json.load(sys.stdin)
    answers = []
    if KIND == "rest":
        client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=60))
        base = f"http://{ADDRESS}"
        assert await client.is_server_ready(base) and await client.is_server_live(base)
        for call in calls:
            assert await client.is_model_ready(base, call["model"])
            response = await client.infer(base, request(call), model_name=call["model"])
            assert isinstance(response, InferResponse), response
            answers.append(lists(response))
    else:
        client = InferenceGRPCClient(ADDRESS)
        assert await client.is_server_ready() and await client.is_server_live()
        for call in calls:
            assert await client.is_model_ready(call["model"])
            answers.append(lists(await client.infer(request(call))))
    await client.close()
    print(json.dumps(answers))


asyncio.run(main())

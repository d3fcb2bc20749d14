"""What a gRPC client may ask and see: `grpc_calls.py ADDRESS SCENARIO [ARGUMENT...]`. It ends with an error where something isn't as it should be."""

import json
import queue
import sys
import threading
import time

import grpc
import numpy
import tritonclient.grpc as triton
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

ADDRESS, SCENARIO, *ARGUMENTS = sys.argv[1:]
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def text_input(value):
    tensor = triton.InferInput("input", [1, 1], "BYTES")
    tensor.set_data_from_numpy(numpy.array([[json.dumps(value).encode()]], dtype=object))
    return tensor


def code_of(call):
    try:
        call()
    except InferenceServerException as error:
        return error.status().removeprefix("StatusCode.")
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


def expect(found, expected):
    assert found == expected, f"expected {expected!r}, found {found!r}"


def fields_of(message):
    """What goes over the wire of a message, in this process's words."""
    fields = {}
    for field in message.fields:
        of_type = field.message_type or field.enum_type
        # The entries of maps are messages that have no names of their own.
        name = of_type.full_name if of_type else field.type
        fields[field.name] = (field.number, name, field.is_repeated)
    return fields


def descriptors():
    """The file that the server tells of says what Triton's clients were made from."""
    with grpc.insecure_channel(ADDRESS) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        expected = {"inference.GRPCInferenceService", "grpc.health.v1.Health"}
        assert expected <= services, services
        pool = descriptor_pool.DescriptorPool(database)
        ours = pool.FindServiceByName("inference.GRPCInferenceService")
        theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
        calls = lambda service: {
            method.name: (method.input_type.full_name, method.output_type.full_name, method.client_streaming, method.server_streaming)
            for method in service.methods
        }
        expect(calls(ours), calls(theirs))
        seen = set()

        def compare(ours, theirs):
            if ours.full_name in seen:
                return
            seen.add(ours.full_name)
            known = fields_of(theirs)
            for name, field in fields_of(ours).items():
                expect((ours.full_name, name, field), (ours.full_name, name, known.get(name)))
            for field in ours.fields:
                if field.message_type:
                    compare(field.message_type, theirs.fields_by_name[field.name].message_type)
                if field.enum_type:
                    values = lambda enum: {value.name: value.number for value in enum.values}
                    expect(values(field.enum_type), values(theirs.fields_by_name[field.name].enum_type))

        for ours_method in ours.methods:
            theirs_method = theirs.methods_by_name[ours_method.name]
            compare(ours_method.input_type, theirs_method.input_type)
            compare(ours_method.output_type, theirs_method.output_type)
        assert len(seen) > 50, len(seen)
        # What is left out of a message is in none that inference needs.
        for name in ("ModelInferRequest", "ModelInferResponse", "ModelMetadataResponse", "RepositoryIndexResponse"):
            expect(fields_of(pool.FindMessageTypeByName(f"inference.{name}")).keys(), fields_of(service_pb2.DESCRIPTOR.message_types_by_name[name]).keys())
    # Newer clients ask by another name.
    with grpc.insecure_channel(ADDRESS) as channel:
        ask = channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
        # list_services (field 7): the empty text.
        answer = next(ask(iter([b"\x3a\x00"]), timeout=30))
        assert b"inference.GRPCInferenceService" in answer, answer


def health(channel, service, metadata=()):
    ask = channel.unary_unary("/grpc.health.v1.Health/Check")
    request = b"\x0a" + bytes([len(service)]) + service.encode() if service else b""
    return ask(request, timeout=30, metadata=metadata)


def healthy():
    with grpc.insecure_channel(ADDRESS) as channel:
        for service in ("", "inference.GRPCInferenceService", "echo"):
            expect(health(channel, service), b"\x08\x01")
        expect(code_of(lambda: health(channel, "nobody")), "NOT_FOUND")
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=30)
        expect(next(watch), b"\x08\x01")
        watch.cancel()
        unknown = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"\x0a\x01x", timeout=30)
        expect(next(unknown), b"\x08\x03")
        expect(code_of(lambda: channel.unary_unary("/inference.GRPCInferenceService/Nothing")(b"", timeout=30)), "UNIMPLEMENTED")
        expect(code_of(lambda: channel.unary_unary("/other.Service/Call")(b"", timeout=30)), "UNIMPLEMENTED")


def errors():
    client = triton.InferenceServerClient(ADDRESS)
    infer = lambda model, inputs, **arguments: code_of(lambda: client.infer(model, inputs, **arguments))
    good = text_input({"text": "a"})
    expect(infer("echo", [good]), "OK")
    expect(infer("echo", [good], model_version="1"), "OK")
    expect(infer("echo", [good], model_version="7"), "NOT_FOUND")
    expect(infer("nobody", [good]), "NOT_FOUND")
    expect(infer("echo", [text_input({"txt": 1})]), "INVALID_ARGUMENT")
    expect(infer("echo", [good], sequence_id=5), "INVALID_ARGUMENT")
    expect(infer("echo", [good], outputs=[triton.InferRequestedOutput("output", class_count=2)]), "INVALID_ARGUMENT")
    expect(infer("echo", [good], outputs=[triton.InferRequestedOutput("nothing")]), "INVALID_ARGUMENT")
    expect(infer("echo", [good], timeout=1), "DEADLINE_EXCEEDED")
    expect(infer("echo", [good], timeout=30_000_000), "OK")
    expect(code_of(client.get_system_shared_memory_status), "UNIMPLEMENTED")
    expect(code_of(client.get_cuda_shared_memory_status), "UNIMPLEMENTED")
    expect(code_of(lambda: client.get_model_metadata("nobody")), "NOT_FOUND")
    expect(client.is_model_ready("nobody"), False)
    expect(client.is_model_ready("echo", "7"), False)
    # Without keys nobody manages over the network.
    expect(code_of(client.get_log_settings), "PERMISSION_DENIED")
    expect(code_of(lambda: client.load_model("echo")), "PERMISSION_DENIED")
    for algorithm in ("gzip", "deflate"):
        expect(infer("echo", [good], compression_algorithm=algorithm), "OK")
    # Elements as numbers, as KServe's client and Triton's explicit examples have them.
    stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(ADDRESS, options=OPTIONS))
    request = service_pb2.ModelInferRequest(model_name="tensors")
    values = request.inputs.add(name="values", datatype="FP32", shape=[2, 2])
    values.contents.fp32_contents.extend([1, 2, 3, 4])
    answer = stub.ModelInfer(request)
    expect([output.name for output in answer.outputs][0], "values")
    expect(numpy.frombuffer(answer.raw_output_contents[0], "float32").tolist(), [1, 2, 3, 4])
    request.raw_input_contents.append(b"\0" * 16)
    expect(code_of(lambda: stub.ModelInfer(request)), "INVALID_ARGUMENT")
    del request.raw_input_contents[:]
    values.contents.int_contents.append(7)
    expect(code_of(lambda: stub.ModelInfer(request)), "INVALID_ARGUMENT")
    values.ClearField("contents")
    expect(code_of(lambda: stub.ModelInfer(request)), "INVALID_ARGUMENT")
    values.shape[:] = [-1, 2]
    expect(code_of(lambda: stub.ModelInfer(request)), "INVALID_ARGUMENT")
    # 12 MB there and back, as they were.
    many = numpy.random.default_rng(1).random((3, 1 << 20), dtype="float32")
    tensor = triton.InferInput("values", list(many.shape), "FP32")
    tensor.set_data_from_numpy(many)
    result = client.infer("tensors", [tensor])
    assert (result.as_numpy("values") == many).all()


def too_large():
    tensor = triton.InferInput("values", [1, 1 << 20], "FP32")
    tensor.set_data_from_numpy(numpy.zeros((1, 1 << 20), dtype="float32"))
    client = triton.InferenceServerClient(ADDRESS)
    expect(code_of(lambda: client.infer("tensors", [tensor])), "OUT_OF_RANGE")
    # What is small only until it is unpacked.
    expect(code_of(lambda: client.infer("tensors", [tensor], compression_algorithm="gzip")), "RESOURCE_EXHAUSTED")


def keys():
    key, operator = ARGUMENTS
    client = triton.InferenceServerClient(ADDRESS)
    good = [text_input({"text": "a"})]
    shown = {"authorization": f"Bearer {key}"}
    managing = {"authorization": f"Bearer {operator}"}
    assert client.is_server_live() and client.is_server_ready()
    expect(code_of(lambda: client.infer("echo", good)), "UNAUTHENTICATED")
    expect(code_of(lambda: client.infer("echo", good, headers={"authorization": "Bearer wrong"})), "UNAUTHENTICATED")
    expect(code_of(lambda: client.infer("echo", good, headers=shown)), "OK")
    expect(code_of(lambda: client.get_model_metadata("echo")), "UNAUTHENTICATED")
    expect(code_of(lambda: client.get_model_metadata("echo", headers=shown)), "OK")
    expect(code_of(lambda: client.load_model("echo", headers=shown)), "PERMISSION_DENIED")
    expect(code_of(lambda: client.load_model("echo")), "UNAUTHENTICATED")
    with grpc.insecure_channel(ADDRESS) as channel:
        expect(health(channel, ""), b"\x08\x01")
        # Names are for those who have a key.
        expect(code_of(lambda: health(channel, "echo")), "NOT_FOUND")
        expect(health(channel, "echo", [("authorization", f"Bearer {key}")]), b"\x08\x01")
    version = lambda: client.get_model_metadata("echo", headers=managing).versions[0]
    before = version()
    client.load_model("echo", headers=managing)
    expect(int(version()), int(before) + 1)
    expect(code_of(lambda: client.load_model("echo", headers=managing, config="{}")), "UNIMPLEMENTED")
    expect(code_of(lambda: client.load_model("nobody", headers=managing)), "NOT_FOUND")
    client.unload_model("echo", headers=managing)
    expect(client.is_model_ready("echo", headers=managing), False)
    client.load_model("echo", headers=managing)
    expect(client.is_model_ready("echo", headers=managing), True)
    log = lambda: client.get_log_settings(headers=managing, as_json=True)["settings"]
    expect(log()["log_info"], {"bool_param": True})
    changed = client.update_log_settings({"log_verbose_level": 1}, headers=managing, as_json=True)["settings"]
    expect(changed["log_verbose_level"], {"uint32_param": 1})
    client.update_log_settings({"log_verbose_level": 0, "log_info": True}, headers=managing)
    expect(code_of(lambda: client.update_log_settings({"log_file": "/tmp/x"}, headers=managing)), "INVALID_ARGUMENT")
    traces = client.get_trace_settings(headers=managing, as_json=True)["settings"]
    expect(traces["trace_level"], {"value": ["OFF"]})
    # There is nowhere for them to go.
    expect(code_of(lambda: client.update_trace_settings(settings={"trace_level": "TIMESTAMPS"}, headers=managing)), "INVALID_ARGUMENT")
    expect(code_of(lambda: client.update_trace_settings("echo", settings={"trace_rate": "1"}, headers=managing)), "UNIMPLEMENTED")


def stream_of(client, requests, **arguments):
    """All answers to requests, in the order in which they come."""
    results = queue.Queue()
    client.start_stream(lambda result, error: results.put((result, error)))
    for number, value in enumerate(requests):
        client.async_stream_infer("streams", [text_input(value)], request_id=str(number), **arguments)
    answers, final = [], 0
    while final < len(requests):
        result, error = results.get(timeout=60)
        if error is not None:
            answers.append(("error", error.message()))
            final += 1
            continue
        response = result.get_response()
        names = [output.name for output in response.outputs]
        is_final = response.parameters["triton_final_response"].bool_param
        value = json.loads(result.as_numpy(names[0])[0][0]) if names else None
        answers.append((response.id, names, is_final, value))
        final += is_final
    client.stop_stream()
    return answers


def decoupled():
    client = triton.InferenceServerClient(ADDRESS)
    answers = stream_of(client, [{"id": 1, "chunks": 3}])
    chunk = lambda number: ("0", ["chunk"], False, {"id": 1, "number": number})
    expect(answers[:3], [chunk(0), chunk(1), chunk(2)])
    expect(answers[3], ("0", ["output"], True, {"id": 1, "sent": 3, "dropped": 0}))
    # Chunks alone, and with the answer that says that there are no more.
    only = [triton.InferRequestedOutput("chunk")]
    answers = stream_of(client, [{"id": 1, "chunks": 2}], outputs=only, enable_empty_final_response=True)
    expect(answers, [chunk(0), chunk(1), ("0", [], True, None)])
    # Or none.
    answers = stream_of(client, [{"id": 1, "chunks": 2}], outputs=[triton.InferRequestedOutput("output")])
    expect(answers, [("0", ["output"], True, {"id": 1, "sent": 2, "dropped": 0})])
    # One that fails ends neither the stream nor the others.
    answers = stream_of(client, [{"id": 5, "chunks": 1, "do": "fail"}, {"no": "input"}, {"id": 6, "chunks": 1}])
    expect(sorted(answer[0] for answer in answers), ["0", "2", "2", "error", "error"])
    assert any(answer[0] == "error" and "told to fail" in answer[1] for answer in answers), answers
    expect(code_of(lambda: client.infer("streams", [text_input({"id": 1})])), "OK")


def limited():
    """The messages of a stream are calls of their key: one at a time here, and the stream itself takes none of its places."""
    shown = {"authorization": f"Bearer {ARGUMENTS[0]}"}
    client = triton.InferenceServerClient(ADDRESS)
    results = queue.Queue()
    client.start_stream(lambda result, error: results.put((result, error)), headers=shown)

    def final():
        while True:
            result, error = results.get(timeout=60)
            if error is not None or result.get_response().parameters["triton_final_response"].bool_param:
                return error

    for number in range(3):
        client.async_stream_infer("streams", [text_input({"id": number, "chunks": 1})], request_id=str(number))
        expect(final(), None)
    slow = {"id": 7, "chunks": 3, "pause_ms": 300}
    for number in range(2):
        client.async_stream_infer("streams", [text_input(slow)], request_id=str(number))
    errors = [error for error in (final(), final()) if error is not None]
    assert len(errors) == 1 and "too many requests in flight" in errors[0].message(), errors
    client.stop_stream()


def cancelled():
    """A stream that its caller leaves takes its request along, and so does one whose time is up."""
    client = triton.InferenceServerClient(ADDRESS)
    stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(ADDRESS))

    def request(value):
        body = json.dumps(value).encode()
        message = service_pb2.ModelInferRequest(model_name="streams")
        message.inputs.add(name="input", datatype="BYTES", shape=[1, 1]).contents.bytes_contents.append(body)
        return message

    def given_up(number):
        answer = client.infer("streams", [text_input({"id": number, "do": "count"})])
        return json.loads(answer.as_numpy("output")[0][0])["sent"]

    endless = {"chunks": 1_000_000, "pause_ms": 2}
    keep = threading.Event()

    def requests(value):
        yield request(value)
        keep.wait(30)

    call = stub.ModelStreamInfer(requests({"id": 11, **endless}))
    next(call)
    call.cancel()
    timed = stub.ModelStreamInfer(requests({"id": 12, **endless}), timeout=1)
    expect(code_of(lambda: [None for _ in timed]), "DEADLINE_EXCEEDED")
    keep.set()
    deadline = time.time() + 30
    while any(given_up(number) < 1 for number in (11, 12)):
        assert time.time() < deadline, "the requests were not given up"
        time.sleep(0.1)


def vanish():
    """Opens streams, asks in each, and leaves without a word."""
    channels = [grpc.insecure_channel(ADDRESS, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(8)]
    calls = []
    for number in range(int(ARGUMENTS[0])):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channels[number % len(channels)])
        body = json.dumps({"id": number, "chunks": 1_000_000, "pause_ms": 5}).encode()
        message = service_pb2.ModelInferRequest(model_name="streams")
        message.inputs.add(name="input", datatype="BYTES", shape=[1, 1]).contents.bytes_contents.append(body)
        wait = threading.Event()

        def requests(message=message, wait=wait):
            yield message
            wait.wait()

        calls.append(stub.ModelStreamInfer(requests()))
        if number % 50 == 49:
            # Some read, some cancel; the others leave with the process.
            calls[-1].cancel()
    time.sleep(1)
    print("asked", flush=True)
    import os

    os._exit(0)


def deadline():
    """A request that waits behind a slow one leaves the queue at its deadline."""
    client = triton.InferenceServerClient(ADDRESS)
    slow = threading.Thread(target=lambda: client.infer("puppet", [text_input({"do": "sleep", "ms": 3000})]))
    slow.start()
    time.sleep(0.5)
    begun = time.time()
    expect(code_of(lambda: client.infer("puppet", [text_input({"value": 1})], client_timeout=0.5)), "DEADLINE_EXCEEDED")
    assert time.time() - begun < 2, "it took longer than its deadline"
    # With one that its client doesn't hold itself to: the server ends it.
    channel = grpc.insecure_channel(ADDRESS)
    ask = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    message = service_pb2.ModelInferRequest(model_name="puppet")
    message.inputs.add(name="input", datatype="BYTES", shape=[1, 1]).contents.bytes_contents.append(b'{"value":1}')
    answer = code_of(lambda: ask(message.SerializeToString(), metadata=[("x-request-timeout-ms", "400")], timeout=30))
    expect(answer, "DEADLINE_EXCEEDED")
    print("asked", flush=True)
    slow.join()


{
    "descriptors": descriptors,
    "healthy": healthy,
    "errors": errors,
    "too_large": too_large,
    "keys": keys,
    "decoupled": decoupled,
    "cancelled": cancelled,
    "limited": limited,
    "vanish": vanish,
    "deadline": deadline,
}[SCENARIO]()

"""Asks a host for what models answer to random inputs, and prints how far that is from onnxruntime's answers, by model, as JSON.

    parity.py ADDRESS CASES.json

A case has a model's name, its file, how many requests, and for each input its shape here (`shape`), its shape in a request (`sent`, where that is
another: the batch stands first there), and its numbers: `floats` from 0 to 1, `below` whole numbers, or `fixed` ones."""

import concurrent.futures
import json
import struct
import sys
import urllib.request

import numpy
import onnxruntime

DATATYPES = {"float32": "FP32", "int64": "INT64", "int32": "INT32"}
NUMPY = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(int32)": "int32"}


def numbers(spec, kind, random):
    if "fixed" in spec:
        return numpy.full(spec["shape"], spec["fixed"], dtype=kind)
    if "below" in spec:
        return random.integers(0, spec["below"], spec["shape"]).astype(kind)
    return random.random(spec["shape"]).astype(kind)


def ask(address, name, arrays, sent):
    inputs, data = [], b""
    for key, array in arrays.items():
        raw = array.tobytes()
        inputs.append(
            {"name": key, "datatype": DATATYPES[str(array.dtype)], "shape": sent[key], "parameters": {"binary_data_size": len(raw)}}
        )
        data += raw
    header = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    request = urllib.request.Request(
        f"http://{address}/v2/models/{name}/infer", header + data, {"Inference-Header-Content-Length": str(len(header))}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        body, length = response.read(), int(response.headers["Inference-Header-Content-Length"])
    answer, place, outputs = json.loads(body[:length]), length, {}
    for output in answer["outputs"]:
        size = output["parameters"]["binary_data_size"]
        kind = {"FP32": "float32", "INT64": "int64"}[output["datatype"]]
        outputs[output["name"]] = numpy.frombuffer(body[place : place + size], dtype=kind)
        place += size
    return outputs


def compare(address, case):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(case["file"], options, providers=["CPUExecutionProvider"])
    kinds = {each.name: NUMPY[each.type] for each in session.get_inputs()}
    names = [each.name for each in session.get_outputs()]
    sent = {name: spec.get("sent", spec["shape"]) for name, spec in case["inputs"].items()}

    def one(seed):
        random = numpy.random.default_rng(seed)
        arrays = {name: numbers(spec, kinds[name], random) for name, spec in case["inputs"].items()}
        found = ask(address, case["name"], arrays, sent)
        expected = dict(zip(names, session.run(None, arrays)))
        assert sorted(found) == sorted(expected), (sorted(found), sorted(expected))
        return max(float(numpy.max(numpy.abs(found[name] - expected[name].reshape(-1)), initial=0)) for name in names)

    with concurrent.futures.ThreadPoolExecutor(8) as callers:
        return max(callers.map(one, range(case["requests"])))


address, cases = sys.argv[1], json.load(open(sys.argv[2]))
print(json.dumps({case["name"]: compare(address, case) for case in cases}))

"""Compressed requests and answers as tritonclient has them: `http_calls.py ADDRESS`. It ends with an error where something isn't as it should be."""

import asyncio
import sys

import numpy
import tritonclient.http as triton
import tritonclient.http.aio as aio

ADDRESS = sys.argv[1]
VALUES = numpy.arange(1 << 18, dtype="float32").reshape(4, -1)


def inputs(client, binary):
    tensor = client.InferInput("values", list(VALUES.shape), "FP32")
    tensor.set_data_from_numpy(VALUES, binary_data=binary)
    return [tensor]


def check(result):
    assert (result.as_numpy("values") == VALUES).all()


def main():
    client = triton.InferenceServerClient(ADDRESS)
    for request in (None, "gzip", "deflate"):
        for response in (None, "gzip", "deflate"):
            for binary in (True, False):
                outputs = [triton.InferRequestedOutput("values", binary_data=binary)]
                result = client.infer(
                    "tensors",
                    inputs(triton, binary),
                    outputs=outputs,
                    request_compression_algorithm=request,
                    response_compression_algorithm=response,
                )
                check(result)


async def asynchronous():
    # It names gzip, deflate and br in every request, and reads the first two.
    async with aio.InferenceServerClient(ADDRESS) as client:
        for binary in (True, False):
            outputs = [aio.InferRequestedOutput("values", binary_data=binary)]
            check(await client.infer("tensors", inputs(aio, binary), outputs=outputs))


main()
asyncio.run(asynchronous())

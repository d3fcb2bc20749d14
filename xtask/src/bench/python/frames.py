"""What frames cost: the same batches of 32 by direct calls, and through a connection of the worker's. Prints nanoseconds an item of both."""

import json
import os
import socket
import statistics
import struct
import sys
import time

BATCH, ROUNDS, BATCHES = 32, 15, 400

sys.path.insert(0, sys.argv[1])
from modalkit_worker import frames, items, pipelines, serving  # noqa: E402

source = {"text": "hello from a caller", "language": "en", "n": 7}
payload = json.dumps(source).encode()
inputs = [(items.PAYLOAD, 0, payload)] * BATCH


def predict(batch):
    return [{"text": item["text"]} for item in batch]


pipeline = pipelines.Pipeline(predict)


def direct():
    decoded = [pipeline.decode(item) for item in inputs]
    outputs, _ = pipeline.run(decoded, None)
    return [pipeline.encode(output, False) for output in outputs]


ours, theirs = socket.socketpair()
lane = frames.Channel(os.dup(ours.fileno()))
table = b"".join(frames.ROW.pack(len(payload), items.PAYLOAD, 0) for _ in range(BATCH))
body = table + payload * BATCH
frame = frames.HEADER.pack(len(body), frames.BATCH, 0, BATCH, 1, 0) + body


class Channels:
    def __init__(self):
        self.lane, self.log = lane, None


channels = Channels()


def framed():
    theirs.sendall(frame)
    _, batch, received = lane.receive()
    lane.send(frames.DONE, batch, serving.ends(pipeline, received, channels))
    (size,) = struct.unpack_from("<I", theirs.recv(1 << 20))
    assert size


def nanoseconds(call):
    begun = time.process_time_ns()
    for _ in range(BATCHES):
        call()
    return (time.process_time_ns() - begun) / BATCHES / BATCH


direct(), framed()
pairs = [(nanoseconds(direct), nanoseconds(framed)) for _ in range(ROUNDS)]
direct_ns, framed_ns = (statistics.median(side) for side in zip(*pairs))
print(json.dumps({"direct_ns": round(direct_ns), "framed_ns": round(framed_ns), "frames_ns": round(framed_ns - direct_ns)}))

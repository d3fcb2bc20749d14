"""What frames cost: the same batches of 32 by direct calls, and through a connection of the worker's. Prints nanoseconds an item of each, and of JSON alone."""

import json
import os
import socket
import statistics
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
    """One batch, as the worker runs it: the host's own part is not counted."""
    theirs.sendall(frame)
    begun = time.process_time_ns()
    _, batch, received = lane.receive()
    lane.put(lane.frame(frames.DONE, batch, serving.ends(pipeline, received, channels)))
    took = time.process_time_ns() - begun
    assert len(theirs.recv(1 << 20)) > BATCH
    return took


def called():
    begun = time.process_time_ns()
    direct()
    return time.process_time_ns() - begun


def nanoseconds(call):
    return sum(call() for _ in range(BATCHES)) / BATCHES / BATCH


def yardstick():
    """What JSON alone takes, which tells how fast the machine is."""
    begun = time.process_time_ns()
    for _ in range(BATCH):
        json.loads(payload)
    return time.process_time_ns() - begun


called(), framed()
rounds = [(nanoseconds(yardstick), nanoseconds(called), nanoseconds(framed)) for _ in range(ROUNDS)]
loads_ns, direct_ns, framed_ns = (round(statistics.median(side)) for side in zip(*rounds))
frames_ns = framed_ns - direct_ns
print(json.dumps({"json_loads_ns": loads_ns, "direct_ns": direct_ns, "framed_ns": framed_ns, "frames_ns": frames_ns}))

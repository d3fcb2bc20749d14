"""The worker's life: the first document, one task, and where that is to serve, batches until the host has no more.

Everything happens on the main thread: a batch, a check of inputs and a hook wait for each other.
"""

import gc
import importlib
import json
import os
import select
import signal
import struct
import sys
import traceback

from . import code, frames, items, output, pipelines, told

# Exit codes, as those of the host's own workers.
DONE, CONFUSED = 0, 71


def run(descriptors):
    """A worker's whole life, over connections whose descriptors are these: control, the log, checks, one for batches, each but the first two
    with its memory; the first document; and, last, the level of the log. Returns the exit code."""
    control, log, checks, checks_memory, lane, lane_memory, first, level = descriptors
    for descriptor in descriptors[:-1]:
        # They crossed one exec, and are none of what a pipeline starts.
        os.set_inheritable(descriptor, False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # For the host's terminal, or for all processes of its service: the host ends workers in its order.
        signal.signal(number, pass_over)
    os.register_at_fork(after_in_child=frames.forked)
    control, log = frames.Channel(control), output.Log(log)
    with open(first, "rb") as file:
        hello = json.load(file)
    output.take(log)
    log.set_level(level)
    told.take(hello)
    # Where code of Python looks for them; what was there when the process began, others may read.
    os.environ.update({name: value for name, value in hello["secrets"].items() if name.isidentifier()})
    python = hello["python"]
    code.use(python["folder"], hello["file"], python["shim"])
    try:
        pipeline = prepare(python)
        if hello["task"] == "describe":
            control.send(frames.READY, 0, [items.document(describe(hello, python, pipeline))])
            return DONE
        pipeline.load()
    except pipelines.Refused as refused:
        control.send(frames.FAILED, 0, [items.failure(items.PERMANENT, str(refused))])
        return DONE
    except BaseException as error:  # noqa: BLE001 - also one that would leave
        control.send(frames.FAILED, 0, [items.failure(items.kind_at_load(error), reason(error))])
        return DONE
    # What is there now stays: collections need not look at it again.
    gc.collect()
    gc.freeze()
    channels = Channels(control, frames.Channel(checks, checks_memory), lane and frames.Channel(lane, lane_memory), log)
    signature = pipeline.signature and pipeline.signature.document()
    ready = {"pid": os.getpid(), "signature": signature, "warnings": hello["warnings"]}
    control.send(frames.READY, 0, [items.document(ready)])
    try:
        return serve(pipeline, channels)
    except frames.Ended:
        return DONE
    except OSError as error:
        log.error("the connection to the host broke", error)
        return CONFUSED


def pass_over(number, frame):
    """Unlike a signal that is ignored, it isn't passed on to programs that a pipeline starts."""


class Channels:
    def __init__(self, control, checks, lane, log):
        self.control, self.checks, self.lane, self.log = control, checks, lane, log


def prepare(python):
    def named(key):
        return python[key] and pipelines.model_named(python[key])

    return pipelines.Pipeline(pipelines.find(python["pipeline"]), named("input_model"), named("output_model"))


def describe(hello, python, pipeline):
    """What the plugin says of itself. Its settings are its constructor's arguments."""
    return {
        "name": hello["model_name"],
        "version": "",
        "abi": "python",
        "sdk": ".".join(map(str, sys.version_info[:3])) + packages(),
        "rustc": sys.executable,
        "has_debug_assertions": False,
        "input_schema": json.dumps(pipeline.input_schema()),
        "output_schema": json.dumps(pipeline.output_schema()),
        "settings_schema": json.dumps(pipeline.settings_schema()),
    }


def packages():
    """What was imported that is installed, with its versions."""
    found = []
    for name, module in sorted(sys.modules.items()):
        version = getattr(module, "__version__", None) if "." not in name and not name.startswith("_") else None
        if isinstance(version, str) and "site-packages" in (getattr(module, "__file__", None) or ""):
            found.append(f"{name} {version}")
    return f", with {', '.join(found)}" if found else ""


def reason(error):
    """Why a pipeline doesn't load: the exception, and where in the user's code it was raised."""
    not_theirs = (output.OWN, "<frozen", os.path.dirname(importlib.__file__))
    places = [place for place in traceback.extract_tb(error.__traceback__) if not place.filename.startswith(not_theirs)]
    lines = traceback.format_list(places)
    if isinstance(error, SyntaxError):
        # With the line, and where in it.
        lines += traceback.format_exception_only(type(error), error)[:-1]
    return items.describe(error) + ("\n" + "".join(lines).rstrip() + "\n" if lines else "")


def serve(pipeline, channels):
    poll = select.poll()
    for channel in (channels.lane, channels.control, channels.checks, channels.log):
        poll.register(channel, select.POLLIN)
    lane, control, checks, log = (
        channel.fileno() for channel in (channels.lane, channels.control, channels.checks, channels.log)
    )
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == lane:
                kind, batch, inputs = channels.lane.receive()
                if kind != frames.BATCH:
                    return CONFUSED
                frame = channels.lane.frame(frames.DONE, batch, ends(pipeline, inputs, channels))
                del inputs
                channels.lane.take_back()
                channels.lane.put(frame)
            elif descriptor == checks:
                kind, batch, inputs = channels.checks.receive()
                if kind == frames.SEND:
                    frame = channels.checks.frame(frames.SENT, batch, sent(pipeline, inputs, channels.log))
                else:
                    frame = channels.checks.frame(
                        frames.CHECKED, batch, [check(pipeline, item) for item in inputs]
                    )
                del inputs
                channels.checks.take_back()
                channels.checks.put(frame)
            elif descriptor == control:
                kind, _, _ = channels.control.receive()
                if kind == frames.LEAVE:
                    return DONE
                channels.control.send(frames.RELOADED, 0, reload(pipeline, channels.log))
            elif not channels.log.take_level():
                poll.unregister(log)


def reload(pipeline, log):
    signature = items.document(pipeline.signature and pipeline.signature.document())
    try:
        pipeline.reload()
    except Exception as error:  # noqa: BLE001 - the hook is the user's own
        log.error("on_volume_reload failed", error)
        return [items.raised(error), signature]
    return [items.document({}), signature]


def check(pipeline, item):
    try:
        pipeline.decode(item)
    except BaseException as error:  # noqa: BLE001 - validators are the user's own
        return pipelines.rejected(error)
    return (items.MEASURE, 0, [items.ONE])


def sent(pipeline, inputs, log):
    """What became of messages, the first item being their queue's name."""
    (_, _, queue), *messages = inputs
    queue, results = bytes(queue).decode(), []
    for _, _, message in messages:
        try:
            pipeline.send(queue, bytes(message).decode())
            results.append((items.PAYLOAD, 0, [b""]))
        except BaseException as error:  # noqa: BLE001 - the backend is the user's own
            log.error(f"a message was not sent to the queue {queue}", error)
            results.append(items.failure(items.TRANSIENT, items.describe(error)))
    return results


class Sink:
    """Asks the host about the inputs that run."""

    def __init__(self, lane, places):
        self.lane, self.places, self.count = lane, places, len(places)

    def interest(self, place):
        return self._ask(frames.ASK_INTEREST, place, [], frames.INTEREST)

    def chunk(self, place, json, waits):
        return self._ask(frames.CHUNK, place, [(int(waits), 0, [json])], frames.CHUNK_RESULT)

    def _ask(self, kind, place, said, answer):
        try:
            self.lane.send(kind, self.places[place], said)
            found, _, [(status, _, _)] = self.lane.receive()
        except OSError:
            raise frames.Ended from None
        if found != answer:
            raise frames.Ended
        return status


def ends(pipeline, inputs, channels):
    """Runs a batch; the items of the frame that says what came of it."""
    places, decoded, ended = decode_all(pipeline, inputs)
    times, failed, encoded = [0, 0, 0], (items.PAYLOAD, 0, [b""]), []
    if decoded:
        try:
            outputs, times = pipeline.run(decoded, Sink(channels.lane, places))
            if len(outputs) != len(decoded):
                text = f"the pipeline returned {len(outputs)} outputs for {len(decoded)} inputs: expected one for each (a generator that streams yields lists of that many chunks)"
                failed = items.failure(items.PERMANENT, text)
            else:
                encoded = encode_all(pipeline, outputs, inputs, places)
        except frames.Ended:
            raise
        except BaseException as error:  # noqa: BLE001 - the pipeline is the user's own, and may call sys.exit
            channels.log.error("a batch failed", error)
            failed = items.raised(error)
    numbers = [*times, len(decoded), *[place for place, _ in ended], *(places if encoded else ())]
    head = struct.pack(f"<{len(numbers)}Q", *numbers)
    return [failed, (items.PAYLOAD, 0, [head]), *[item for _, item in ended], *encoded]


def decode_all(pipeline, inputs):
    """The places of the inputs that run, these themselves, and with their places those that are none."""
    try:
        return range(len(inputs)), list(map(pipeline.decode, inputs)), []
    except BaseException:  # noqa: BLE001 - validators are the user's own
        pass
    places, decoded, ended = [], [], []
    for place, item in enumerate(inputs):
        try:
            decoded.append(pipeline.decode(item))
            places.append(place)
        except BaseException as error:  # noqa: BLE001 - validators are the user's own
            ended.append((place, pipelines.rejected(error)))
    return places, decoded, ended


def encode_all(pipeline, outputs, inputs, places):
    """The items of the outputs, in the form of their inputs."""
    as_tensors = [inputs[place][1] > 0 for place in places] if pipeline.tensors else [False] * len(outputs)
    try:
        return list(map(pipeline.encode, outputs, as_tensors))
    except Exception:  # noqa: BLE001 - serializers are the user's own
        return [encode(pipeline, output, as_tensor) for output, as_tensor in zip(outputs, as_tensors)]


def encode(pipeline, output, as_tensors):
    try:
        return pipeline.encode(output, as_tensors)
    except Exception as error:  # noqa: BLE001 - serializers are the user's own
        return items.raised(error)

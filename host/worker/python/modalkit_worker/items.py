"""What the items of frames are: their statuses, and how failures and rejections are written. The numbers are those of the host's `items.rs`."""

import json
import struct

PAYLOAD = 0
FAILED, REJECTED = 16, 32
MALFORMED, INVALID, BUSY, MEASURE = 48, 49, 50, 51
# Kinds of failures.
INVALID_INPUT, PERMANENT, TRANSIENT, DEVICE_LOST, DEVICE_SUSPECTED, RAISED, UNWANTED = range(7)

# An input of one unit of work, of no shape in particular.
ONE = struct.pack("<QQ", 1, 0)
# Faults of one input that are told.
FAULTS_MAX = 16


def document(value):
    return (PAYLOAD, 0, [json.dumps(value).encode()])


def failure(kind, message):
    return (FAILED + kind, 0, [message.encode(errors="replace")])


def malformed(message):
    return (MALFORMED, 0, [message.encode(errors="replace")])


def invalid(faults):
    """Of faults that are each a path, a message and a word for their kind."""
    said = [{"path": path, "message": message, "kind": kind} for path, message, kind in faults[:FAULTS_MAX]]
    return (INVALID, 0, [json.dumps(said).encode()])


class Abandoned(Exception):
    """In the place of an output that nobody waits for any more."""


def raised(error):
    """Of an exception: its type and what it says. Of what may not pass, another try of the item alone says whose it is."""
    if isinstance(error, Abandoned):
        return failure(UNWANTED, str(error))
    text = describe(error)
    if isinstance(error, (MemoryError, ConnectionError, TimeoutError)) or "CUDA out of memory" in text:
        return failure(TRANSIENT, text)
    # The context is broken for as long as the process lives.
    of_device = any(words in text for words in ("CUDA error", "cuDNN error", "CUBLAS_STATUS", "device-side assert"))
    return failure(DEVICE_SUSPECTED if of_device else RAISED, text)


def kind_at_load(error):
    """Of an exception in a load: what is wrong with the code comes again, and all else may pass."""
    of_code = (ImportError, SyntaxError, NameError, TypeError, AttributeError, NotImplementedError)
    return PERMANENT if isinstance(error, of_code) else TRANSIENT


def describe(error):
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - it is the user's own
        text = "(its text can't be had)"
    # What this package itself finds wrong says all in its text.
    if type(error).__module__.startswith(__package__) and text:
        return text
    name = type(error).__name__
    return f"{name}: {text}" if text else name

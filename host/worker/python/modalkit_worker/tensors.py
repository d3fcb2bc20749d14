"""Tensors of the Open Inference Protocol, as arrays of numpy by their names. It is imported where a pipeline has a signature, and numpy with it."""

import importlib
import struct

import numpy

from . import frames

# Datatypes by their numbers, which are the host's, with numpy's names; of BF16 numpy has none.
DATATYPES = (
    ("BOOL", "bool"),
    ("UINT8", "uint8"),
    ("UINT16", "uint16"),
    ("UINT32", "uint32"),
    ("UINT64", "uint64"),
    ("INT8", "int8"),
    ("INT16", "int16"),
    ("INT32", "int32"),
    ("INT64", "int64"),
    ("FP16", "float16"),
    ("BF16", None),
    ("FP32", "float32"),
    ("FP64", "float64"),
    ("BYTES", "object"),
)
NUMBERS = {name: number for number, names in enumerate(DATATYPES) for name in names if name}
HEAD = struct.Struct("<IBB")
SIZE = struct.Struct("<Q")
LENGTH = struct.Struct("<I")


class Wrong(Exception):
    """A signature, or an output that isn't what it says."""


class Signature:
    """What a pipeline says of its tensors: `{"inputs": {name: (datatype, shape)}, "outputs": …}`, each of one item, `None` for any size."""

    def __init__(self, said):
        self.inputs, self.outputs = _specs(said, "inputs"), _specs(said, "outputs")

    def document(self):
        def listed(specs):
            return [
                {"name": name, "datatype": DATATYPES[number][0], "shape": shape, "optional": False}
                for name, (number, shape) in specs.items()
            ]

        return {"inputs": listed(self.inputs), "outputs": listed(self.outputs), "batched": True}


def _specs(said, key):
    specs = {}
    for name, spec in said[key].items():
        datatype, shape = spec
        number = NUMBERS.get(str(datatype) if isinstance(datatype, str) else numpy.dtype(datatype).name)
        if number is None:
            known = ", ".join(name for name, _ in DATATYPES)
            raise Wrong(f"signature: expected a datatype for {name}, one of {known}, found {datatype!r}")
        specs[name] = (number, [None if size in (None, -1) else int(size) for size in shape])
    return specs


def read(payload, count):
    """The arrays of an item, which may be written to and kept: where they lie in shared memory, `frames` sees to that."""
    heads, at = [], 0
    for _ in range(count):
        name_bytes, number, rank = HEAD.unpack_from(payload, at)
        at += HEAD.size
        shape = struct.unpack_from(f"<{rank}Q", payload, at)
        at += 8 * rank
        (size,) = SIZE.unpack_from(payload, at)
        at += SIZE.size
        name = bytes(payload[at : at + name_bytes]).decode()
        at += name_bytes
        heads.append((name, number, shape, size))
    arrays = {}
    for name, number, shape, size in heads:
        at = frames.aligned(at)
        data = payload[at : at + size]
        at += size
        if DATATYPES[number][0] == "BYTES":
            array = numpy.array(_words(data), dtype=object)
        else:
            dtype = DATATYPES[number][1] or "uint16"
            array = numpy.frombuffer(data, dtype=dtype)
            # Out of a frame on the socket: it is small, lies anywhere, and belongs to nobody else.
            array = array if array.flags.writeable else array.copy()
        arrays[name] = array.reshape(shape)
    return arrays


def _words(data):
    words, at = [], 0
    while at < len(data):
        (length,) = LENGTH.unpack_from(data, at)
        at += LENGTH.size
        words.append(bytes(data[at : at + length]))
        at += length
    return words


def _named(output, name):
    if isinstance(output, dict):
        if name in output:
            return output[name]
        raise Wrong(f"expected an output {name!r}, as the signature says, found {', '.join(map(repr, output)) or 'none'}")
    if not hasattr(output, name):
        raise Wrong(f"expected an output {name!r}, as the signature says, found {type(output).__name__} without it")
    return getattr(output, name)


def _array(value, dtype):
    """As an array of numpy in C's order, without a copy where it is one already."""
    if not isinstance(value, numpy.ndarray) and hasattr(value, "__dlpack__"):
        value = _exchanged(value, dtype)
    array = numpy.asarray(value)
    if array.dtype.kind in "fc" and numpy.dtype(dtype).kind in "iub" and array.size:
        raise ValueError("fractions would be lost")
    return numpy.asarray(array, dtype=dtype, order="C")


def _exchanged(value, dtype):
    """What another library holds, by DLPack; of torch also what is on a device, or of a datatype that numpy hasn't."""
    for step in ("detach", "cpu"):
        value = getattr(value, step, lambda value=value: value)()
    if str(value.dtype).endswith("bfloat16") and hasattr(value, "float"):
        value = value.view(importlib.import_module("torch").int16) if dtype == "uint16" else value.float()
    try:
        array = numpy.from_dlpack(value)
    except (AttributeError, BufferError, RuntimeError, TypeError):
        array = numpy.asarray(value)
    return array.view("uint16") if array.dtype == numpy.int16 and dtype == "uint16" else array


def write(output, signature):
    """The pieces of an output: what comes before the bytes of its arrays, then these, each at its multiple."""
    head, data = [], []
    for name, (number, _) in signature.outputs.items():
        value = _named(output, name)
        kind, dtype = DATATYPES[number]
        if kind == "BYTES":
            array = numpy.asarray(value, dtype=object)
            words = [word.encode() if isinstance(word, str) else bytes(word) for word in array.ravel()]
            content = b"".join(LENGTH.pack(len(word)) + word for word in words)
        else:
            try:
                array = _array(value, dtype or "uint16")
            except (TypeError, ValueError) as error:
                raise Wrong(f"expected {kind} for the output {name!r}, as the signature says, found {value!r:.80}: {error}") from None
            content = array.reshape(-1).view("uint8")
        encoded = name.encode()
        head.append(HEAD.pack(len(encoded), number, array.ndim))
        head.append(struct.pack(f"<{array.ndim}Q", *array.shape))
        head.append(SIZE.pack(len(content)))
        head.append(encoded)
        data.append(content)
    pieces = [b"".join(head)]
    size = len(pieces[0])
    for content in data:
        padding = frames.aligned(size) - size
        pieces += [bytes(padding), content]
        size += padding + len(content)
    return pieces

"""How what a pipeline returns becomes JSON: outputs of one input each, and chunks of them. It never knows what runs."""

import dataclasses
import json
import math

from . import items


def status(output):
    return output.get("status") if isinstance(output, dict) else getattr(output, "status", None)


def encode(output):
    """An output as an item: a JSON object without `status`, which the host writes, or a failure."""
    if type(output) is dict and "status" not in output:
        # What most are, with nothing to be asked.
        return (items.PAYLOAD, 0, [_json(output)])
    if isinstance(output, BaseException):
        return items.raised(output)
    if status(output) == "error":
        error = output.get("error") if isinstance(output, dict) else getattr(output, "error", None)
        return items.failure(items.PERMANENT, str(error or "the pipeline says no more than that it failed"))
    serializer = getattr(output, "__pydantic_serializer__", None)
    if serializer is not None:
        # By alias, as FastAPI answers.
        said = serializer.to_json(output, exclude=_of_host(output), by_alias=True)
    else:
        if dataclasses.is_dataclass(output):
            output = dataclasses.asdict(output)
        if isinstance(output, dict) and "status" in output:
            output = {name: value for name, value in output.items() if name != "status"}
        said = _json(output)
    if not (said == b"{}" or said.startswith(b'{"') and said.endswith(b"}")):
        return items.failure(items.PERMANENT, f"expected a model or a dict as an output, found {type(output).__name__}")
    return (items.PAYLOAD, 0, [said])


def chunk(value):
    """A part of an output: any value, as JSON."""
    serializer = getattr(value, "__pydantic_serializer__", None)
    if serializer is not None:
        return serializer.to_json(value, by_alias=True)
    return _json(value)


def _json(value):
    try:
        return _encoder.encode(value).encode()
    except ValueError:
        return _encoder.encode(_finite(value)).encode()


def _finite(value):
    """As pydantic writes it: JSON has no word for what is no number, or has no end."""
    if isinstance(value, dict):
        return {name: _finite(member) for name, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(member) for member in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    return _finite(_plain(value))


def _of_host(output):
    """Members of an output that the host writes itself, or that say nothing where it succeeded."""
    if not hasattr(output, "status"):
        return None
    return {"status", "error"} if getattr(output, "error", "") is None else {"status"}


def _plain(value):
    """What `json` doesn't know: models, and the numbers and arrays of numpy and torch."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if hasattr(value, "tolist"):
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (set, frozenset)):
        return list(value)
    if isinstance(value, bytes):
        return value.decode()
    raise TypeError(f"an output holds {type(value).__name__}, which is no JSON")


_encoder = json.JSONEncoder(separators=(",", ":"), default=_plain, ensure_ascii=False, allow_nan=False)

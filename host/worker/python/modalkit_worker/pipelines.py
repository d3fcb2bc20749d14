"""Makes of what a module holds something that runs batches: a class with `run_inference`, with stages, or with `predict` alone, or a function.

It owns how inputs are made of JSON and outputs made into it, and never knows frames.
"""

import asyncio
import importlib
import inspect
import json
import sys
import time
import typing

from . import code, encoding, items, streams, told

# Where a pipeline is looked for whose entry names none.
MODULES = ("pipeline", "model", "app")
STAGES = ("preprocess", "predict", "postprocess")
_decoder = json.JSONDecoder()
# Arguments of a constructor that the host gives.
TOLD = ("model_name", "all_model_data_folder", "common_settings")
# What types are in a JSON Schema.
TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
# How long an asynchronous backend may take for one message; nothing else runs meanwhile.
SEND_SECONDS_MAX = 10


class Refused(Exception):
    """There is no pipeline that can be served, for this reason."""


class Returned(Exception):
    """Something that is no outputs."""


class NotTaken(Exception):
    """A message that no backend took."""


class Rejected(Exception):
    """An input that isn't the pipeline's; `item` says why."""

    def __init__(self, item):
        super().__init__()
        self.item = item


def find(wanted):
    """The class or function that an entry names as `module:Name`, or the only one of the folder's."""
    if wanted:
        module, colon, name = wanted.partition(":")
        found = importlib.import_module(module)
        for part in name.split(".") if colon else ():
            if not hasattr(found, part):
                raise Refused(f"{wanted}: expected {name!r} in {module}.py, and there is no such name")
            found = getattr(found, part)
        return found if colon else only(found)
    for module in MODULES:
        if code.has(module):
            return only(importlib.import_module(module))
    files = " or ".join(f"{module}.py" for module in MODULES)
    raise Refused(f"expected {files} in the folder, and there is none")


def only(module):
    """The one pipeline that a module defines."""
    own = [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__]
    # A service's pipeline, however it is called there.
    services = [value.inference_implementation for value in own if getattr(value, "inference_implementation", None)]
    found = services or [value for value in own if callable(getattr(value, "run_inference", None))]
    found = found or [value for value in own if callable(getattr(value, "predict", None))]
    if not found and inspect.isfunction(getattr(module, "predict", None)):
        found = [module.predict]
    if len(found) == 1:
        return found[0]
    names = ", ".join(sorted(value.__name__ for value in found))
    expected = f"expected one class with `run_inference` or `predict`, or a function `predict`, in {module.__name__}.py"
    if not found:
        raise Refused(f"{expected}, found none")
    raise Refused(f'{expected}, found {names}; name one: pipeline = "{module.__name__}:{found[0].__name__}"')


def queue_backend():
    """What the user's code was given to send results by: the `queue_backend` of a service, of its class, or of a module."""
    modules = [module for module in list(sys.modules.values()) if code.is_users(module)]
    values = [value for module in modules for value in vars(module).values()]
    # A class it must be: the stub of `modal` has whatever it is asked for.
    services = [value for value in values if inspect.isclass(_member(value, "inference_implementation"))]
    for holder in [*services, *modules]:
        backend = _member(holder, "queue_backend")
        if hasattr(backend, "send_message"):
            return backend() if inspect.isclass(backend) else backend
    raise NotTaken(
        "the pipeline's code has no queue backend: expected `queue_backend` with an (asynchronous) method `send_message(queue_name, message)` in a ModalService, or in one of its modules"
    )


def _member(value, name):
    """What a value has under a name; whatever else it does when it is asked, it has nothing."""
    try:
        return getattr(value, name, None)
    except Exception:  # noqa: BLE001 - it is the user's own
        return None


def model_named(name):
    """The model `module:Name` of an entry."""
    module, _, name = name.partition(":")
    return getattr(importlib.import_module(module), name)


class Pipeline:
    """What runs batches."""

    def __init__(self, target, input_model=None, output_model=None):
        self.target = target
        self.is_function = not inspect.isclass(target)
        self.input_model = input_model or self._annotated(self._takes_inputs())
        self.output_model = output_model or self._returned()
        self.instance = None
        self.loop = None
        self.queue_backend = None
        said = getattr(target, "signature", None)
        # With numpy, which only pipelines that take arrays have.
        self.tensors = importlib.import_module(".tensors", __package__) if isinstance(said, dict) else None
        self.signature = self.tensors and self.tensors.Signature(said)
        self.validate = self._validator()

    def _returned(self):
        """The pydantic model of `-> list[Model]` of the last stage, for its JSON Schema."""
        names = ("run_inference", "postprocess", "predict")
        stage = self.target if self.is_function else next(
            (getattr(self.target, name) for name in names if name in vars(self.target)), None
        )
        return stage and self._model_in(inspect.signature(stage).return_annotation, stage)

    def _takes_inputs(self):
        if self.is_function:
            return self.target
        base = [stage for stage in ("run_inference", *STAGES) if stage in vars(self.target)]
        # Where a stage is inherited, its annotation is that of whoever wrote it.
        names = base or [stage for stage in STAGES if hasattr(self.target, stage)]
        return getattr(self.target, names[0])

    def _annotated(self, function):
        """The pydantic model of `inputs: list[Model]`, where the function says so. Only this annotation is read: others may need what isn't there."""
        parameters = list(inspect.signature(function).parameters.values())
        parameters = parameters if self.is_function else parameters[1:]
        return self._model_in(parameters[0].annotation if parameters else inspect.Parameter.empty, function)

    def _model_in(self, annotation, function):
        if isinstance(annotation, str):
            module = sys.modules.get(function.__module__)
            try:
                annotation = eval(annotation, vars(module) if module else {})  # noqa: S307 - the user's own text
            except Exception:  # noqa: BLE001 - a name that is there for type checkers only
                return None
        arguments = typing.get_args(annotation)
        model = arguments[0] if len(arguments) >= 1 else None
        return model if hasattr(model, "model_rebuild") else None

    def _validator(self):
        if self.input_model is None:
            return None
        if not hasattr(self.input_model, "model_rebuild"):
            raise Refused(f"expected a pydantic model for the input, found {self.input_model!r}")
        # Its annotations may have been incomplete until now.
        self.input_model.model_rebuild()
        return self.input_model.__pydantic_validator__.validate_json

    def input_schema(self):
        if self.input_model is None:
            return {}
        return self.input_model.model_json_schema()

    def output_schema(self):
        return {} if self.output_model is None else self.output_model.model_json_schema(mode="serialization")

    def settings_schema(self):
        """What the constructor takes beside what the host tells: for people, since what it does with that nobody knows beforehand."""
        if self.is_function:
            return {}
        properties, required = {}, []
        for name, parameter in inspect.signature(self.target).parameters.items():
            if name in TOLD or parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                continue
            has_default = parameter.default is not inspect.Parameter.empty
            said = next((name for known, name in TYPES.items() if parameter.annotation is known), None)
            kind = said or TYPES.get(type(parameter.default))
            properties[name] = {"type": kind} if kind else {}
            if not has_default:
                required.append(name)
            elif type(parameter.default) in TYPES:
                properties[name]["default"] = parameter.default
        return {"type": "object", "properties": properties, "required": required}

    def load(self):
        """Calls the constructor with what it takes of what the host told."""
        if self.is_function:
            return
        given = {name: getattr(told, name) for name in TOLD}
        parameters = inspect.signature(self.target).parameters.values()
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        names = {parameter.name for parameter in parameters}
        arguments = {name: value for name, value in given.items() if takes_any or name in names}
        self.instance = self.target(**{**arguments, **told.settings})

    def reload(self):
        hook = getattr(self.instance, "on_volume_reload", None)
        code.enter_again()
        if hook is not None:
            self._finish(hook())

    def send(self, queue, message):
        """Sends a message by the backend that the user's code was given."""
        if self.queue_backend is None:
            self.queue_backend = queue_backend()
        sent = self.queue_backend.send_message(queue, message)
        if inspect.isawaitable(sent):
            sent = self._finish(asyncio.wait_for(sent, SEND_SECONDS_MAX))
        if not sent:
            raise NotTaken(f"{type(self.queue_backend).__name__}.send_message did not return True")

    def decode(self, item):
        """An input of an item: its JSON, or its arrays by their names. What is raised says that it is none; `rejected` tells how."""
        _, count, payload = item
        if count:
            return self._decode_arrays(self.tensors.read(payload, count))
        if type(payload) is not bytes:
            payload = bytes(payload)
        if self.validate is None:
            try:
                return _decoder.decode(payload.decode())
            except (ValueError, RecursionError) as error:
                raise Rejected(items.malformed(f"the body is not valid JSON: {error}")) from None
        return self.validate(payload)

    def _decode_arrays(self, arrays):
        if self.input_model is None:
            return arrays
        return self.input_model.model_validate({name: array.tolist() for name, array in arrays.items()})

    def encode(self, output, as_tensors):
        """An output as an item; arrays where its input was made of them."""
        if not as_tensors or isinstance(output, BaseException) or encoding.status(output) == "error":
            return encoding.encode(output)
        return (items.PAYLOAD, len(self.signature.outputs), self.tensors.write(output, self.signature))

    def run(self, inputs, sink):
        """Runs a batch: its outputs, and the nanoseconds of each stage. Chunks of outputs that come bit by bit go to the sink."""
        begun = time.perf_counter_ns()
        if self.is_function:
            return self._outputs(self.target(inputs), sink), [0, time.perf_counter_ns() - begun, 0]
        pipeline = self.instance
        run = getattr(type(pipeline), "run_inference", None)
        if run is not None and not getattr(run, "is_of_shim", False):
            return self._outputs(pipeline.run_inference(inputs), sink), [0, time.perf_counter_ns() - begun, 0]
        prepare, finish = getattr(pipeline, "preprocess", None), getattr(pipeline, "postprocess", None)
        prepared = self._finish(prepare(inputs)) if prepare else None
        preprocessed = time.perf_counter_ns()
        raw = pipeline.predict(inputs, prepared) if prepare else pipeline.predict(inputs)
        # Of what is made bit by bit, the last stage is where it is made.
        raw = self._finish(raw) if finish else self._outputs(raw, sink)
        predicted = time.perf_counter_ns()
        outputs = self._outputs(finish(inputs, raw), sink) if finish else raw
        return outputs, [preprocessed - begun, predicted - preprocessed, time.perf_counter_ns() - predicted]

    def _finish(self, result):
        """What an asynchronous function comes to."""
        if not inspect.isawaitable(result):
            return result
        if self.loop is None:
            self.loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self.loop)
        return self.loop.run_until_complete(result)

    def _outputs(self, result, sink):
        """The outputs of what the last stage returned."""
        result = self._finish(result)
        if streams.has_steps(result):
            return streams.follow(result, sink, self._finish)
        if isinstance(result, list):
            return result
        if isinstance(result, (dict, str, bytes)) or not hasattr(result, "__iter__"):
            raise Returned(f"expected a list with an output for each input from the last stage, found {type(result).__name__}")
        return list(result)


def rejected(error):
    """Why an input wasn't taken: what pydantic says is wrong, or that something else was raised."""
    if isinstance(error, Rejected):
        return error.item
    if type(error).__name__ == "ValidationError" and hasattr(error, "error_count"):
        said = error.errors(include_url=False)
        return items.invalid([(list(fault["loc"]), fault["msg"], fault["type"]) for fault in said])
    kind, _, pieces = items.raised(error)
    return (kind - items.FAILED + items.REJECTED, 0, pieces)

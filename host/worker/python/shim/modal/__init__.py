"""What files for the hosted cloud `modal` call when they are imported. Here nothing of it is deployed: decorators give back what they are given, and
what describes machines, images and volumes describes nothing. Batches, replicas and devices are the host's configuration."""

from . import experimental  # noqa: F401 - it is asked for by its name


def _decorator(*args, **settings):
    """Used with arguments or without."""
    if len(args) == 1 and not settings and callable(args[0]):
        return args[0]
    return lambda decorated: decorated


enter = exit = method = batched = concurrent = asgi_app = wsgi_app = fastapi_endpoint = web_endpoint = _decorator


def parameter(default=None, init=True):
    """A parameter of a class is its default."""
    return default


class _Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **settings: cls()


class _Described(metaclass=_Anything):
    """Something that is only described: each call gives it back."""

    def __init__(self, *args, **settings):
        pass

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **settings: self


    def __enter__(self):
        return self

    def __exit__(self, *raised):
        return False


class Image(_Described):
    """An image of a container."""


class Secret(_Described):
    """A secret: the host gives its own, as variables of the environment."""


class Volume(_Described):
    """A volume: the host's are folders, and what changes in them is told by `on_volume_reload`."""


class CloudBucketMount(_Described):
    """A bucket."""


class Mount(_Described):
    """Local files."""


class App:
    """An application, whose classes and functions stay what they are."""

    def __init__(self, name=None, **settings):
        self.name = name

    cls = function = local_entrypoint = staticmethod(_decorator)


Stub = App


def is_local():
    """Whether the file is read on somebody's machine, and not in the cloud."""
    return True


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Described()

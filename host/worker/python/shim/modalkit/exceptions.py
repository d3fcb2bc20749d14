"""The library's exceptions."""


class DependencyError(ImportError):
    """Something isn't installed."""


class TypeValidationError(TypeError):
    """A value has another type."""


class BackendError(ValueError):
    """A queue's backend can't be used."""


class AuthConfigError(ValueError):
    """Nobody can be told apart."""

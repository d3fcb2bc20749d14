"""An earlier name of `modal_service`."""

from .modal_service import *  # noqa: F403 - all of it

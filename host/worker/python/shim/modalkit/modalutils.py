"""An earlier name of `modal_config`."""

from .modal_config import *  # noqa: F403 - all of it

"""An earlier name of `inference_pipeline`."""

from .inference_pipeline import *  # noqa: F403 - all of it

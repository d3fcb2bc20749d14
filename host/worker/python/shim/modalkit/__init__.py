"""What pipelines of the Python library modalkit import, for a worker of a host that does the serving."""

from .inference_pipeline import InferencePipeline
from .iomodel import (
    AsyncInputModel,
    AsyncOutputModel,
    DelayedFailureOutputModel,
    InferenceOutputModel,
    SyncInputModel,
)

__all__ = [
    "AsyncInputModel",
    "AsyncOutputModel",
    "DelayedFailureOutputModel",
    "InferenceOutputModel",
    "InferencePipeline",
    "SyncInputModel",
]

"""What pipelines of the Python library modalkit import, for a worker of a host that does the serving."""

from .inference_pipeline import InferencePipeline
from .iomodel import AsyncInputModel, AsyncOutputModel, DelayedFailureOutputModel, InferenceOutputModel, SyncInputModel
from .modal_config import ModalConfig
from .modal_service import ModalService, create_web_endpoints
from .settings import Settings

__all__ = [
    "AsyncInputModel",
    "AsyncOutputModel",
    "DelayedFailureOutputModel",
    "InferenceOutputModel",
    "InferencePipeline",
    "ModalConfig",
    "ModalService",
    "Settings",
    "SyncInputModel",
    "create_web_endpoints",
]

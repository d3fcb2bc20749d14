"""What pipelines of the Python library modalkit import, for a worker of a host that does the serving."""

from .inference_pipeline import InferencePipeline
from .iomodel import AsyncInputModel, AsyncOutputModel, DelayedFailureOutputModel, InferenceOutputModel, SyncInputModel
from .modal_config import ModalConfig
from .modal_service import ModalService, create_web_endpoints
from .settings import AppSettings, ModelSettings, Settings
from .task_queue import InMemoryBackend, QueueBackend, create_backend

__all__ = [
    "AppSettings",
    "AsyncInputModel",
    "AsyncOutputModel",
    "DelayedFailureOutputModel",
    "InMemoryBackend",
    "InferenceOutputModel",
    "InferencePipeline",
    "ModalConfig",
    "ModalService",
    "ModelSettings",
    "QueueBackend",
    "Settings",
    "SyncInputModel",
    "create_backend",
    "create_web_endpoints",
]

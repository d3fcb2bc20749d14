"""The models around inputs and outputs."""

from typing import Any, Generic, Optional, TypeVar

from pydantic import BaseModel, ConfigDict

T = TypeVar("T", bound=BaseModel)


class AsyncInputModel(BaseModel, Generic[T]):
    """What an asynchronous call sends."""

    model_config = ConfigDict(extra="forbid")

    message: T
    success_queue: str = ""
    failure_queue: str = ""
    meta: dict = {}


class AsyncOutputModel(BaseModel):
    """What an asynchronous call is answered with."""

    job_id: str


class SyncInputModel(BaseModel, Generic[T]):
    """What a synchronous call sends."""

    message: T


class InferenceOutputModel(BaseModel):
    """An output, with whatever members the pipeline adds."""

    model_config = ConfigDict(extra="allow")

    status: str
    error: Optional[str] = None


class DelayedFailureOutputModel(InferenceOutputModel):
    """The output of a job that has failed."""

    original_message: Any = None

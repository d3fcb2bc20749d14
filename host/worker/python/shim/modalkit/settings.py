"""The settings, filled from the host's configuration: batches and deployment as they are for this model. What it keeps to itself, such as keys of callers
and other models, has its default."""

from enum import Enum
from typing import Any, Optional, Union

from modalkit_worker import told
from pydantic import BaseModel, ConfigDict, Field


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class MountType(str, Enum):
    """What is mounted."""

    file = "file"
    dir = "dir"


class Mount(_Open):
    """A local file or folder."""

    local_path: str
    remote_path: str
    type: MountType = MountType.file


class Volume(_Open):
    """A volume."""


class CloudBucketMount(_Open):
    """A bucket."""

    mount_point: str
    bucket_name: str
    bucket_endpoint_url: Optional[str] = None
    key_prefix: Optional[str] = None
    secret: Optional[str] = None
    oidc_auth_role_arn: Optional[str] = None
    read_only: bool = True
    requester_pays: bool = False


class AuthConfig(_Open):
    """How callers say who they are; the host asks them."""

    ssm_key: Optional[str] = None
    api_key: Optional[str] = None
    auth_header: str = "x-api-key"


class BuildConfig(_Open):
    """An image, of which there is none here."""

    image: Optional[str] = None
    tag: Optional[str] = None
    workdir: str = "/root"
    env: dict = Field(default_factory=dict)
    extra_run_commands: Union[str, list] = Field(default_factory=list)


class DeploymentConfig(_Open):
    """Replicas and devices, which are the host's."""

    gpu: Any = None
    volumes: Optional[dict] = None
    mounts: list = Field(default_factory=list)
    cloud_bucket_mounts: list = Field(default_factory=list)
    secrets: list = Field(default_factory=list)
    concurrency_limit: Optional[int] = None
    allow_concurrent_inputs: Optional[int] = None
    allow_concurrent_inputs_handler: Optional[int] = None
    container_idle_timeout: Optional[int] = None
    retries: Optional[int] = None
    region: Optional[str] = None
    secure: bool = False
    memory: Optional[float] = None
    cpu: Optional[float] = None
    volume_reload_interval_seconds: Optional[float] = None


class BatchConfig(_Open):
    """Batches, which the host makes."""

    max_batch_size: int = 1
    max_batch_cost: Optional[int] = None
    wait_ms: Union[int, str] = 0


class QueueConfig(_Open):
    """Queues, which the host delivers to."""

    backend: str = "memory"
    broker_url: Optional[str] = None


class AppSettings(_Open):
    """The application."""

    app_prefix: str = "modalkit"
    auth_config: AuthConfig = Field(default_factory=AuthConfig)
    build_config: BuildConfig = Field(default_factory=BuildConfig)
    deployment_config: DeploymentConfig = Field(default_factory=DeploymentConfig)
    batch_config: BatchConfig = Field(default_factory=BatchConfig)
    queue_config: QueueConfig = Field(default_factory=QueueConfig)


class ModelSettings(_Open):
    """The models: of the host's, the one that this worker runs."""

    local_model_repository_folder: str = ""
    common: dict = Field(default_factory=dict)
    model_entries: dict = Field(default_factory=dict)


class Settings(_Open):
    """All of them."""

    app_settings: AppSettings = Field(default_factory=lambda: AppSettings(**told.application.get("app_settings", {})))
    model_settings: ModelSettings = Field(
        default_factory=lambda: ModelSettings(
            local_model_repository_folder=told.all_model_data_folder,
            common=told.common_settings,
            model_entries={told.model_name: told.settings},
        )
    )

"""What `app.py` files ask about the deployment."""

import os

import modal
from modalkit_worker import told

from .settings import Settings


class ModalConfig:
    """Answers from the host's configuration."""

    def __init__(self, settings=None):
        self.settings = Settings() if settings is None else settings

    @property
    def app_settings(self):
        return self.settings.app_settings

    @property
    def model_settings(self):
        return self.settings.model_settings

    @property
    def app_name(self):
        return told.application.get("app_name") or self.app_settings.app_prefix + self.app_postfix

    @property
    def app_postfix(self):
        name = told.application.get("app_name", "")
        return name[len(self.app_settings.app_prefix) :] if name else os.getenv("MODALKIT_APP_POSTFIX", "-dev")

    @property
    def region(self):
        return self.app_settings.deployment_config.region

    @property
    def volumes(self):
        return {path: modal.Volume.from_name(name) for path, name in (self.app_settings.deployment_config.volumes or {}).items()}

    @property
    def cloud_bucket_mounts(self):
        mounts = self.app_settings.deployment_config.cloud_bucket_mounts or []
        return {mount["mount_point"]: modal.CloudBucketMount(**mount) for mount in map(dict, mounts)}

    @property
    def all_volumes(self):
        return {**self.volumes, **self.cloud_bucket_mounts}

    @property
    def CustomAPIKey(self):  # noqa: N802 - the library's name
        return None

    def get_image(self):
        return modal.Image.debian_slim()

    def get_app_cls_settings(self):
        deployment = self.app_settings.deployment_config
        return {"image": self.get_image(), "volumes": self.all_volumes, "gpu": deployment.gpu}

    def get_handler_settings(self):
        return {"image": self.get_image()}

    def get_batched_method_settings(self):
        batch = self.app_settings.batch_config
        return {"max_batch_size": batch.max_batch_size, "wait_ms": batch.wait_ms if isinstance(batch.wait_ms, int) else 0}

    def get_asgi_app_settings(self):
        return {"requires_proxy_auth": self.app_settings.deployment_config.secure}

    def reload_volumes(self):
        """The host sees what changes in volumes."""

"""The class around a pipeline in `app.py` files. The worker takes the pipeline's class from it, and runs that; the methods are here for code that
calls them itself."""

from .iomodel import AsyncInputModel, DelayedFailureOutputModel
from .logger import LOGGER
from .modal_config import ModalConfig


class ModalService:
    """A service of one model."""

    model_name = "model"
    inference_implementation = None
    modal_utils = None
    queue_backend = None

    def __init__(self, queue_backend=None, model_name=None):
        self.queue_backend = queue_backend or type(self).queue_backend
        self.model_name = model_name or type(self).model_name

    def load_artefacts(self):
        """Calls the pipeline's constructor."""
        settings = (self.modal_utils or ModalConfig()).settings.model_settings
        self._model_inference_instance = self.inference_implementation(
            model_name=self.model_name,
            all_model_data_folder=settings.local_model_repository_folder,
            common_settings=settings.common,
            **settings.model_entries.get(self.model_name, {}),
        )

    def process_request(self, input_list):
        """Runs a batch of inputs that stand in their envelopes."""
        try:
            outputs = self._model_inference_instance.run_inference([wrapped.message for wrapped in input_list])
        except Exception as error:
            LOGGER.exception("a batch failed")
            for place, wrapped in enumerate(input_list):
                if isinstance(wrapped, AsyncInputModel):
                    failure = DelayedFailureOutputModel(status="error", error=str(error), original_message=wrapped)
                    self.send_async_response(place, failure, wrapped)
            raise
        for place, (wrapped, output) in enumerate(zip(input_list, outputs)):
            if isinstance(wrapped, AsyncInputModel):
                self.send_async_response(place, output, wrapped)
        return outputs

    def send_async_response(self, message_idx, raw_output_data, input_data):
        """Results of jobs are delivered by the host."""

    @staticmethod
    def async_call(cls):
        """Asks the host, which has `/predict_async` for that."""
        raise NotImplementedError("POST /predict_async is the host's")

    @staticmethod
    def sync_call(cls):
        """Asks the host, which has `/predict_sync` for that."""
        raise NotImplementedError("POST /predict_sync is the host's")


def create_web_endpoints(app_cls=None, input_model=None, output_model=None, **settings):
    """The host serves; there is no application of FastAPI."""
    return None

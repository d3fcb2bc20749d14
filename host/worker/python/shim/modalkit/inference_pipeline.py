"""The base class of pipelines, of which the worker calls `run_inference`."""


class InferencePipeline:
    """A pipeline: three stages over lists of inputs."""

    def __init__(self, model_name, all_model_data_folder, common_settings, *args, **kwargs):
        self.model_name = model_name
        self.all_model_data_folder = all_model_data_folder
        self.common_settings = common_settings

    def on_volume_reload(self):
        """Called between batches when data have changed."""

    def run_inference(self, input_list):
        """The three stages, one after the other."""
        prepared = self.preprocess(input_list)
        return self.postprocess(input_list, self.predict(input_list, prepared))

    # The worker runs the stages itself where nobody has overridden this, and times them.
    run_inference.is_of_shim = True

    def preprocess(self, input_list):
        """Makes of the inputs what `predict` takes."""

    def predict(self, input_list, preprocessed_data):
        """Runs the model."""

    def postprocess(self, input_list, raw_output):
        """Makes an output for each input."""

"""What the host told this worker of its model, for whatever asks it. It is set once, before the user's modules are imported."""

import json

model_name = "model"
all_model_data_folder = ""
common_settings = {}
settings = {}
# The application's name and settings, as configuration files have them.
application = {}


def take(hello):
    """Takes it from the first document."""
    global model_name, all_model_data_folder, common_settings, settings, application
    model_name, all_model_data_folder = hello["model_name"], hello["all_model_data_folder"]
    common_settings, settings = json.loads(hello["common_settings"]), json.loads(hello["settings"])
    application = json.loads(hello["application"])

"""Handwritten digits by a random forest of scikit-learn, written as for the Python library: stages, and models of its own."""

from pathlib import Path

import joblib
import numpy
from modalkit.inference_pipeline import InferencePipeline
from modalkit.iomodel import InferenceOutputModel
from pydantic import BaseModel, Field

PIXELS = 64


class Image(BaseModel):
    """64 grey levels from 0 to 16, row by row."""

    pixels: list[float] = Field(min_length=PIXELS, max_length=PIXELS)


class Digit(InferenceOutputModel):
    """What it is taken for; `sure` is the share of trees that say so."""

    label: int
    sure: float


class Forest(InferencePipeline):
    """Reads `forest.joblib`, which `train.py` writes."""

    def __init__(self, model_name, all_model_data_folder, common_settings, forest="forest.joblib"):
        super().__init__(model_name, all_model_data_folder, common_settings)
        path = Path(__file__).parent / forest
        if not path.exists():
            raise FileNotFoundError(f"expected {path}; run `.venv/bin/python train.py` in its folder")
        self.forest = joblib.load(path)

    def preprocess(self, input_list: list[Image]):
        return numpy.array([image.pixels for image in input_list])

    def predict(self, input_list, preprocessed_data):
        return self.forest.predict_proba(preprocessed_data)

    def postprocess(self, input_list, raw_output):
        labels = self.forest.classes_[raw_output.argmax(axis=1)]
        rows = zip(labels.tolist(), raw_output.max(axis=1).tolist())
        return [Digit(status="success", label=label, sure=sure) for label, sure in rows]

"""Handwritten digits by ONNX Runtime: 64 grey levels from 0 to 16 in, a label and ten probabilities out, as JSON or as tensors."""

from pathlib import Path

import numpy
import onnxruntime
from pydantic import BaseModel, Field

PIXELS, CLASSES = 64, 10


class Image(BaseModel):
    """One image, row by row."""

    pixels: list[float] = Field(min_length=PIXELS, max_length=PIXELS)


class Digits:
    """Loaded once for each replica."""

    signature = {
        "inputs": {"pixels": ("FP32", [PIXELS])},
        "outputs": {"label": ("INT64", []), "probabilities": ("FP32", [CLASSES])},
    }

    def __init__(self, model="digits.onnx", threads=1):
        options = onnxruntime.SessionOptions()
        # More replicas use more cores; threads of one batch would wait for each other.
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        path = Path(__file__).parent / model
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def predict(self, images: list[Image]):
        pixels = numpy.asarray([image.pixels for image in images], dtype=numpy.float32)
        probabilities = self.session.run(None, {self.input: pixels})[-1]
        return [{"label": row.argmax(), "probabilities": row} for row in probabilities]

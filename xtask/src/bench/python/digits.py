"""What both servers run: the digits' model by ONNX Runtime."""

import os

import numpy
import onnxruntime


class Model:
    def __init__(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["DIGITS"], options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def predict(self, batch):
        pixels = numpy.asarray([item["pixels"] for item in batch], dtype=numpy.float32)
        scores = self.session.run(None, {self.input: pixels})[-1]
        return [{"label": int(numpy.argmax(row))} for row in scores]

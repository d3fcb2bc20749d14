"""Runs without a host: `python -m pytest`."""

import numpy
import onnxruntime
import pytest
from pydantic import ValidationError

from pipeline import PIXELS, Digits, Image


def test_it_says_what_the_session_says():
    pixels = numpy.random.default_rng(7).integers(0, 17, (5, PIXELS)).astype("float32")
    session = onnxruntime.InferenceSession("digits.onnx", providers=["CPUExecutionProvider"])
    expected = session.run(None, {session.get_inputs()[0].name: pixels})[-1]
    outputs = Digits().predict([Image(pixels=row.tolist()) for row in pixels])
    assert numpy.allclose([output["probabilities"] for output in outputs], expected, atol=1e-6)
    assert [output["label"] for output in outputs] == expected.argmax(axis=1).tolist()


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ValidationError):
        Image(pixels=[0.0] * 63)

#!/usr/bin/env python3
"""Train and export the handwritten-digits classifier used by the example.

Writes three files next to this script:

    digits.onnx        the model: `pixels` float32 [N, 64] (values 0..16)
                       -> `probabilities` float32 [N, 10]
    digits_test.json   the 360 held-out images with the model's own answers
    PROVENANCE.md      where the data came from and how the model was made

Usage:

    python3 -m venv .venv
    .venv/bin/pip install -r requirements.txt
    .venv/bin/python make_digits.py

The run takes a few seconds and needs no network: scikit-learn ships the data.
Same versions on the same kind of machine give byte-identical files. (Another
CPU may pick other BLAS kernels and round the weights differently.)
"""

import os

# One BLAS thread: the order of the sums, and so the weights, stay the same.
# This must happen before numpy is first imported.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import hashlib
import json
import platform
import warnings
from pathlib import Path

import numpy as np
import onnx
import sklearn
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

HERE = Path(__file__).resolve().parent
SEED = 20240
HELD_OUT = 360  # 20% of the 1797 images
HIDDEN = 64
MIN_ACCURACY = 0.95

SOURCE = (
    "Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, "
    "E. Alpaydin and C. Kaynak, 1998, doi:10.24432/C50P49, CC BY 4.0; "
    "the test set as shipped with scikit-learn (sklearn.datasets.load_digits)"
)


def train():
    """Fit the classifier; return its weights and the held-out images."""
    data = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        data.data, data.target, test_size=HELD_OUT, stratify=data.target, random_state=SEED
    )
    classifier = MLPClassifier(
        hidden_layer_sizes=(HIDDEN,), activation="relu", alpha=1e-3, max_iter=300, random_state=SEED
    )
    with warnings.catch_warnings():
        # Stopping at max_iter is intended: the loss is flat by then.
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(train_x / 16.0, train_y)
    assert list(classifier.classes_) == list(range(10))
    return classifier.coefs_, classifier.intercepts_, test_x, test_y


def build_model(weights, biases):
    """Write the graph by hand: scale, Gemm, Relu, Gemm, Softmax."""

    def constant(name, values):
        return numpy_helper.from_array(np.ascontiguousarray(values, dtype=np.float32), name)

    graph = helper.make_graph(
        nodes=[
            helper.make_node("Mul", ["pixels", "scale"], ["scaled"], name="scale_pixels"),
            helper.make_node("Gemm", ["scaled", "w1", "b1"], ["hidden_raw"], name="hidden"),
            helper.make_node("Relu", ["hidden_raw"], ["hidden_act"], name="relu"),
            helper.make_node("Gemm", ["hidden_act", "w2", "b2"], ["logits"], name="output"),
            helper.make_node("Softmax", ["logits"], ["probabilities"], name="softmax", axis=1),
        ],
        name="digits",
        # "N" is a symbolic dimension: any batch size.
        inputs=[helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", 64])],
        outputs=[helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 10])],
        initializer=[
            constant("scale", 1.0 / 16.0),
            constant("w1", weights[0]),
            constant("b1", biases[0]),
            constant("w2", weights[1]),
            constant("b2", biases[1]),
        ],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name="make_digits.py",
        doc_string=(
            "Handwritten digits 0..9 from 8x8 images: 64 grey levels 0..16, row by row. "
            f"One hidden layer of {HIDDEN} units, trained with scikit-learn {sklearn.__version__} "
            f"(MLPClassifier, seed {SEED}) on 1437 of 1797 images. Data: {SOURCE}."
        ),
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def write_cases(path, pixels, labels, probabilities, accuracy):
    """One case per line, so that a diff of this file stays readable."""
    predicted = probabilities.argmax(axis=1)
    lines = [
        json.dumps(
            {
                "pixels": [int(v) for v in image],
                "label": int(label),
                "predicted": int(guess),
                "probabilities": [round(float(p), 6) for p in row],
            },
            separators=(",", ":"),
        )
        for image, label, guess, row in zip(pixels, labels, predicted, probabilities)
    ]
    path.write_text(
        "{\n"
        f'"source":{json.dumps(SOURCE)},\n'
        '"model":"digits.onnx",\n'
        f'"accuracy":{round(accuracy, 6)},\n'
        '"cases":[\n' + ",\n".join(lines) + "\n]}\n"
    )


def write_provenance(path, model_bytes, correct, accuracy):
    path.write_text(
        f"""# Where `digits.onnx` comes from

`digits.onnx` and `digits_test.json` are written by `make_digits.py`; so is this file.

## Data

* Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak (1998),
  UCI Machine Learning Repository, <https://doi.org/10.24432/C50P49>.
* Licence: Creative Commons Attribution 4.0 International (CC BY 4.0),
  <https://creativecommons.org/licenses/by/4.0/>.
* The copy used is the data set's test part, 1797 images of 8x8 grey levels 0..16,
  as shipped with scikit-learn (`sklearn.datasets.load_digits`).
* `digits_test.json` reproduces {HELD_OUT} of those images unchanged, with their labels.
  The predictions and probabilities in it are the model's.

## Model

* Stratified split with seed {SEED}: {1797 - HELD_OUT} images to train on, {HELD_OUT} held out.
* `MLPClassifier`: one hidden layer of {HIDDEN} units (ReLU), softmax over 10 classes.
  The division of the inputs by 16 is part of the graph.
* Graph: Mul, Gemm, Relu, Gemm, Softmax; opset 17, IR version 8.
* Accuracy on the held-out images: {correct} of {HELD_OUT} = {accuracy:.4f}.

## File

* sha256 of `digits.onnx`: `{hashlib.sha256(model_bytes).hexdigest()}`
* size: {len(model_bytes)} bytes
* made with Python {platform.python_version()}, numpy {np.__version__}, \
scikit-learn {sklearn.__version__}, onnx {onnx.__version__}

To make it again: see the top of `make_digits.py`. The same versions on the same kind of
machine give the same bytes; another CPU may round the weights differently.
"""
    )


def main():
    weights, biases, test_x, test_y = train()
    model_bytes = build_model(weights, biases).SerializeToString(deterministic=True)

    # Ask the exported bytes, not scikit-learn (which computes in float64).
    evaluator = ReferenceEvaluator(onnx.load_model_from_string(model_bytes))
    (probabilities,) = evaluator.run(None, {"pixels": test_x.astype(np.float32)})
    correct = int((probabilities.argmax(axis=1) == test_y).sum())
    accuracy = correct / len(test_y)
    assert len(test_y) == HELD_OUT
    assert accuracy >= MIN_ACCURACY, f"accuracy {accuracy} is below {MIN_ACCURACY}"
    top_two = np.sort(probabilities, axis=1)[:, -2:]
    margin = float((top_two[:, 1] - top_two[:, 0]).min())

    (HERE / "digits.onnx").write_bytes(model_bytes)
    write_cases(HERE / "digits_test.json", test_x, test_y, probabilities, accuracy)
    write_provenance(HERE / "PROVENANCE.md", model_bytes, correct, accuracy)
    print(f"digits.onnx: {len(model_bytes)} bytes, {correct}/{HELD_OUT} correct ({accuracy:.4f})")
    print(f"closest call: the two best classes differ by {margin:.6f}")


if __name__ == "__main__":
    main()

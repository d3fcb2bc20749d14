#!/usr/bin/env python3
"""Write two tiny ONNX models for the tests, next to this script.

    fixed_batch.onnx   x float32 [1, 4] -> y = 2 * x, float32 [1, 4]
    two_inputs.onnx    a float32 [N, 3], b int64 [N, 2]
                       -> sum float32 [N] = row sum of a + row sum of b,
                          b_out int64 [N, 2] = b

Usage: as make_digits.py, same requirements.txt:

    .venv/bin/python make_fixtures.py
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HERE = Path(__file__).resolve().parent


def save(name, nodes, inputs, outputs, constants):
    def values(infos):
        return [helper.make_tensor_value_info(*info) for info in infos]

    graph = helper.make_graph(
        nodes,
        name,
        values(inputs),
        values(outputs),
        [numpy_helper.from_array(array, key) for key, array in constants.items()],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name="make_fixtures.py",
    )
    onnx.checker.check_model(model, full_check=True)
    (HERE / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))


def main():
    save(
        "fixed_batch",
        nodes=[helper.make_node("Mul", ["x", "two"], ["y"], name="double")],
        inputs=[("x", TensorProto.FLOAT, [1, 4])],
        outputs=[("y", TensorProto.FLOAT, [1, 4])],
        constants={"two": np.array(2.0, dtype=np.float32)},
    )
    save(
        "two_inputs",
        nodes=[
            helper.make_node("ReduceSum", ["a", "axes"], ["a_sum"], name="sum_a", keepdims=0),
            helper.make_node("Cast", ["b"], ["b_float"], name="cast_b", to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["b_float", "axes"], ["b_sum"], name="sum_b", keepdims=0),
            helper.make_node("Add", ["a_sum", "b_sum"], ["sum"], name="add"),
            helper.make_node("Identity", ["b"], ["b_out"], name="copy_b"),
        ],
        inputs=[("a", TensorProto.FLOAT, ["N", 3]), ("b", TensorProto.INT64, ["N", 2])],
        outputs=[("sum", TensorProto.FLOAT, ["N"]), ("b_out", TensorProto.INT64, ["N", 2])],
        constants={"axes": np.array([1], dtype=np.int64)},
    )


if __name__ == "__main__":
    main()

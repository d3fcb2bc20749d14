"""Writes digits.npy and digits.labels: the 360 handwritten digits of ../../onnx/model/digits_test.json as a matrix to search in, 64 pixels
from 0 to 16 each as floats of 16 bits, and what each of them shows. Needs nothing but Python."""

import json
import struct
from pathlib import Path

here = Path(__file__).parent
cases = json.loads((here / "../../onnx/model/digits_test.json").read_text())["cases"]
rows = [case["pixels"] for case in cases]
header = f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({len(rows)}, {len(rows[0])}), }}"
# Magic, version and length are ten bytes; the header ends with a line, at a multiple of 64.
header += " " * (-(len(header) + 11) % 64) + "\n"
with open(here / "digits.npy", "wb") as file:
    file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())
    for row in rows:
        file.write(struct.pack(f"<{len(row)}e", *row))
(here / "digits.labels").write_text("".join(f"{case['label']}\n" for case in cases))

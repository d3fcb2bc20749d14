"""A text's embedding by onnxruntime behind FastAPI, one text a run: what a service is that somebody writes in an hour."""

import os

import numpy
import onnxruntime
from fastapi import FastAPI
from pydantic import BaseModel
from tokenizers import Tokenizer

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(os.environ["GRAPH"], options, providers=["CPUExecutionProvider"])
tokenizer = Tokenizer.from_file(os.environ["TOKENIZER"])
tokenizer.no_padding()
tokenizer.enable_truncation(256)
app = FastAPI()


class Text(BaseModel):
    input: str


@app.post("/predict_sync")
def embed(text: Text):
    ids = numpy.array([tokenizer.encode(text.input).ids], dtype="int32")
    inputs = {
        "input_ids": ids,
        "token_type_ids": numpy.zeros_like(ids),
        "position_ids": numpy.arange(ids.shape[1], dtype="int32")[None],
        "bias": numpy.zeros((1, 1, 1, ids.shape[1]), dtype="float32"),
    }
    vector = session.run(None, inputs)[0][0].mean(0)
    return {"embedding": (vector / numpy.linalg.norm(vector)).tolist()}

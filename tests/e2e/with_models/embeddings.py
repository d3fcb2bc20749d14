"""Asks a host for texts' embeddings, and prints the least cosine to those of a BERT in numpy with the same weights, as JSON.

    embeddings.py ADDRESS MODEL FOLDER TEXTS"""

import concurrent.futures
import json
import pathlib
import random
import re
import struct
import sys
import urllib.request

import numpy

address, model, folder, count = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]), int(sys.argv[4])
config = json.loads((folder / "config.json").read_text())
MAX_TOKENS = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
VOCABULARY = {word: number for number, word in enumerate((folder / "vocab.txt").read_text().splitlines())}


def weights(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    base = 8 + length
    read = {}
    for name, spec in header.items():
        if name != "__metadata__" and spec["dtype"] == "F32":
            begin, end = spec["data_offsets"]
            read[name] = numpy.frombuffer(data[base + begin : base + end], dtype="<f4").reshape(spec["shape"])
    return read


W = weights(folder / "model.safetensors")


def tokens(text):
    """Word pieces of plain English: lower case, punctuation apart, the longest piece first."""
    pieces = []
    for word in re.findall(r"[a-z0-9]+|[^a-z0-9\s]", text.lower()):
        start, found = 0, []
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = word[start:end] if start == 0 else "##" + word[start:end]
                if piece in VOCABULARY:
                    break
            else:
                found = ["[UNK]"]
                break
            found.append(piece)
            start = end
        pieces += found
    pieces = pieces[: MAX_TOKENS - 2]
    return [VOCABULARY[piece] for piece in ["[CLS]", *pieces, "[SEP]"]]


def norm(x, name):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / numpy.sqrt(variance + config["layer_norm_eps"]) * W[name + ".weight"] + W[name + ".bias"]


def linear(x, name):
    return x @ W[name + ".weight"].T + W[name + ".bias"]


def erf(x):
    """Abramowitz and Stegun 7.1.26 is good to 1.5e-7."""
    sign, x = numpy.sign(x), numpy.abs(x)
    t = 1 / (1 + 0.3275911 * x)
    series = ((((1.061405429 * t - 1.453152027) * t) + 1.421413741) * t - 0.284496736) * t + 0.254829592
    return sign * (1 - series * t * numpy.exp(-x * x))


def embed(text):
    ids = tokens(text)
    heads, size = config["num_attention_heads"], config["hidden_size"]
    x = W["embeddings.word_embeddings.weight"][ids] + W["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + W["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for number in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{number}."
        apart = lambda name: linear(x, layer + "attention.self." + name).reshape(len(ids), heads, -1).transpose(1, 0, 2)
        query, key, value = apart("query"), apart("key"), apart("value")
        scores = query @ key.transpose(0, 2, 1) / numpy.sqrt(size // heads)
        shares = numpy.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        joined = (shares @ value).transpose(1, 0, 2).reshape(len(ids), size)
        x = norm(linear(joined, layer + "attention.output.dense") + x, layer + "attention.output.LayerNorm")
        wide = linear(x, layer + "intermediate.dense")
        active = wide * 0.5 * (1 + erf(wide / numpy.sqrt(2)))
        x = norm(linear(active, layer + "output.dense") + x, layer + "output.LayerNorm")
    vector = x.mean(0)
    return vector / numpy.linalg.norm(vector), len(ids)


def ask(texts):
    body = json.dumps({"model": model, "input": texts}).encode()
    request = urllib.request.Request(f"http://{address}/v1/embeddings", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.load(response)
    return [each["embedding"] for each in answer["data"]], answer["usage"]["prompt_tokens"]


choice = random.Random(7)
words = [word for word in VOCABULARY if re.fullmatch(r"[a-z]{2,}", word)]
# Of all lengths, a few longer than the model takes.
texts = [" ".join(choice.choices(words, k=choice.choice([1, 2, 4, 8, 16, 40]))) + choice.choice(["", ".", "?!"]) for _ in range(count - 5)]
texts += [" ".join(choice.choices(words, k=300)) for _ in range(5)]
lists = [texts[place : place + 25] for place in range(0, len(texts), 25)]
with concurrent.futures.ThreadPoolExecutor(4) as callers:
    found = list(callers.map(ask, lists))
vectors = [vector for each, _ in found for vector in each]
expected = [embed(text) for text in texts]
cosines = [float(numpy.dot(vector, wanted)) for vector, (wanted, _) in zip(vectors, expected)]
lengths = [float(numpy.linalg.norm(vector)) for vector in vectors]
print(json.dumps({"texts": len(vectors), "least_cosine": min(cosines), "lengths": [min(lengths), max(lengths)],
                  "tokens": sum(each for _, each in found), "expected_tokens": sum(each for _, each in expected)}))

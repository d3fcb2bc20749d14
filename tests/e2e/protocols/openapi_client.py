"""A client that openapi-python-client has generated, as `generated`, asks a host: `openapi_client.py ADDRESS FOLDER`. It prints what it gets."""

import importlib
import json
import sys

ADDRESS, FOLDER = sys.argv[1:]
sys.path.insert(0, FOLDER)
generated = importlib.import_module("generated")
client = generated.Client(base_url=f"http://{ADDRESS}")


def operation(tag, name):
    return importlib.import_module(f"generated.api.{tag}.{name}")


def model(module, name):
    return getattr(importlib.import_module(f"generated.models.{module}"), name)


EchoInput = model("echo_input", "EchoInput")
translated = operation("models", "run_echo").sync(client=client, body=EchoInput(text="hello"))
pixels = json.load(sys.stdin)
DigitsInput = model("digits_input", "DigitsInput")
digit = operation("models", "run_digits").sync(client=client, body=DigitsInput.from_dict({"pixels": pixels}))
wrong = operation("models", "run_echo").sync_detailed(client=client, body=EchoInput.from_dict({"text": 7}))
health = operation("health", "health").sync(client=client)
print(json.dumps({
    "echo": translated.to_dict(), "digits": digit.to_dict(), "wrong": wrong.parsed.to_dict(), "health": health.to_dict(),
}))

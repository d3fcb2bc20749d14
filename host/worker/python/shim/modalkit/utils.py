"""What else the library has. Keys are the host's: it asks callers for them."""

import os

from .exceptions import AuthConfigError


def get_api_key(*args, **settings):
    """The key that callers would send, where the environment has it; the host keeps its own to itself."""
    key = os.environ.get("MODALKIT_API_KEY") or os.environ.get("API_KEY")
    if key is None:
        raise AuthConfigError("the host asks callers for keys, and tells them to nobody (auth_config)")
    return key


def send_response_sqs(queue_name, message):
    """The host delivers results by its own configuration (queue_config): there is nothing to be sent from here."""
    return False

"""Queues. The host delivers what `success_queue` and `failure_queue` name; these are for code that sends by itself."""

import collections


class QueueBackend:
    """Where messages go."""

    async def send_message(self, queue_name, message):
        """Sends a message; `True` where it was taken."""
        raise NotImplementedError


class InMemoryBackend(QueueBackend):
    """Keeps them in this process."""

    def __init__(self, **settings):
        self.queues = collections.defaultdict(list)

    async def send_message(self, queue_name, message):
        self.queues[queue_name].append(message)
        return True


_BACKENDS = {"memory": InMemoryBackend}


def register_backend(name, backend):
    """Adds a kind."""
    _BACKENDS[name] = backend


def create_backend(name="memory", **settings):
    """Makes one of a kind."""
    return _BACKENDS[name](**settings)

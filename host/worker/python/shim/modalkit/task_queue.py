"""Queues. The host delivers what `success_queue` and `failure_queue` name; these are for code that sends by itself, and for a backend of one's own that
the host calls (`queue_config.backends`, kind "model")."""

import collections

from .exceptions import BackendError, DependencyError


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


class SQSBackend(QueueBackend):
    """Amazon SQS, by boto3, which has to be installed."""

    def __init__(self, **settings):
        try:
            import boto3
        except ImportError:
            raise DependencyError("SQSBackend needs boto3: install it, or have the host deliver (queue_config, sqs)") from None
        self.client = boto3.client("sqs", **settings)

    async def send_message(self, queue_name, message):
        address = self.client.get_queue_url(QueueName=queue_name)["QueueUrl"]
        self.client.send_message(QueueUrl=address, MessageBody=message)
        return True


class TaskiqBackend(QueueBackend):
    """A broker of TaskIQ, to whose workers messages go as tasks."""

    def __init__(self, broker=None, task_name=None, **settings):
        if broker is None:
            raise DependencyError("TaskiqBackend needs a broker of taskiq; or have the host deliver (queue_config, taskiq)")
        self.broker, self.task_name, self.started = broker, task_name, False

    async def send_message(self, queue_name, message):
        if not self.started:
            await self.broker.startup()
            self.started = True
        name = self.task_name or f"process_{queue_name}"
        task = self.broker.find_task(name) or self.broker.register_task(_received, task_name=name)
        await task.kiq(message)
        return True


async def _received(message):
    """Runs in the workers of TaskIQ, by the task of this name that these have."""


_BACKENDS = {"memory": InMemoryBackend, "in_memory": InMemoryBackend, "sqs": SQSBackend, "taskiq": TaskiqBackend}


def register_backend(name, backend):
    """Adds a kind."""
    _BACKENDS[name] = backend


def create_backend(name="memory", **settings):
    """Makes one of a kind."""
    if name not in _BACKENDS:
        raise BackendError(f"expected one of {', '.join(sorted(_BACKENDS))}, found {name!r}")
    return _BACKENDS[name](**settings)


get_queue_backend = create_backend


def send_response_queue(queue_name, message):
    """The host delivers results by its own configuration: there is nothing to be sent from here."""
    return False

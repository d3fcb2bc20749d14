"""The same model behind mosec: `mosec_server.py MODULE WORKERS PORT`."""

import importlib
import sys

module, workers, port = sys.argv[1:4]
sys.argv = [sys.argv[0], "--address", "127.0.0.1", "--port", port]

from mosec import Server, Worker  # noqa: E402 - it reads the arguments


class Served(Worker):
    def __init__(self):
        super().__init__()
        self.model = importlib.import_module(module).Model()

    def forward(self, batch):
        return self.model.predict(batch)


if __name__ == "__main__":
    server = Server()
    server.append_worker(Served, num=int(workers), max_batch_size=32, max_wait_time=2)
    server.run()

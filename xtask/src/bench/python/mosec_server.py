"""The same model behind mosec, with as many workers as WORKERS says: `mosec_server.py --port PORT`. Its processes import this file again."""

import importlib
import os

from mosec import Server, Worker


class Served(Worker):
    def __init__(self):
        super().__init__()
        self.model = importlib.import_module("served").Model()

    def forward(self, batch):
        return self.model.predict(batch)


if __name__ == "__main__":
    server = Server()
    server.append_worker(Served, num=int(os.environ["WORKERS"]), max_batch_size=32, max_wait_time=2)
    server.run()

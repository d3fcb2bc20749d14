"""Starts the worker: all modules of its own are imported before a folder of the user's is searched for any."""

import sys

from modalkit_worker import serving

if __name__ == "__main__":
    # The folder of this package is no place for modules of the user's.
    sys.path.pop(0)
    sys.exit(serving.run([int(number) for number in sys.argv[1].split(",")]))

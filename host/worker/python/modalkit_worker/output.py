"""What the pipeline prints and logs, on its way to the host's log. It never knows what runs."""

import faulthandler
import logging
import os
import socket
import struct
import sys
import traceback

# Bytes of one line in the log; what is longer is cut.
LINE_BYTES_MAX = 16 << 10
# The host's levels by their numbers, and the level of Python's from which on each is meant.
OFF, ERROR, WARN, INFO, DEBUG, TRACE = range(6)
LEVELS = {OFF: logging.CRITICAL + 1, ERROR: logging.ERROR, WARN: logging.WARNING, INFO: logging.INFO, DEBUG: logging.DEBUG, TRACE: 1}
HEAD = struct.Struct("<BII")
# Sent by the guard before it ends a worker that hangs; the number is that of the host's `guard.rs`.
STACK_SIGNAL = 62
# Where this package lies.
OWN = os.path.dirname(__file__)


class Log(logging.Handler):
    """Sends each record as one packet."""

    def __init__(self, descriptor):
        super().__init__()
        self.socket = socket.socket(fileno=descriptor)

    def emit(self, record):
        try:
            message = record.getMessage()
            if record.exc_info:
                message += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
            self.line(level_of(record.levelno), record.name, message)
        except Exception:  # noqa: BLE001 - a record that can't be written is the user's own
            self.handleError(record)

    def line(self, level, target, message):
        target, message = target.encode(errors="replace")[:1024], message.encode(errors="replace")[:LINE_BYTES_MAX]
        try:
            self.socket.send(HEAD.pack(level, len(target), len(message)) + target + message)
        except OSError:
            # The host has left: nobody reads any more.
            pass

    def error(self, message, error):
        """Logs an exception with its traceback, from the user's code on."""
        place = error.__traceback__
        while place is not None and place.tb_next is not None and place.tb_frame.f_code.co_filename.startswith(OWN):
            place = place.tb_next
        trace = "".join(traceback.format_exception(type(error), error, place)).rstrip()
        self.line(ERROR, "modalkit.python", f"{message}\n{trace}")

    def take_level(self):
        """Takes the level that the host wants from now on; `False` where it is gone."""
        number = self.socket.recv(1)
        if number:
            self.set_level(number[0])
        return bool(number)

    @staticmethod
    def set_level(number):
        logging.getLogger().setLevel(LEVELS.get(number, 1))

    def fileno(self):
        return self.socket.fileno()


def level_of(number):
    if number >= logging.ERROR:
        return ERROR
    if number >= logging.WARNING:
        return WARN
    if number >= logging.INFO:
        return INFO
    return DEBUG if number >= logging.DEBUG else TRACE


def take(log):
    """Has lines that are printed leave this process when they end, so that the last one before a crash is there too; records go to the log."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="replace")
    try:
        faulthandler.register(STACK_SIGNAL, all_threads=True)
    except (AttributeError, ValueError, RuntimeError):
        # Nobody will ask here.
        pass
    logging.getLogger().addHandler(log)

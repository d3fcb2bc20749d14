"""How frames get across: a header, a table, payloads; large ones through shared memory. It never knows what they say.

The layout is that of the host's `frame.rs` and `channel.rs`. Lengths stand on the socket alone; what lies in shared memory is bytes.
"""

import mmap
import socket
import struct

HELLO, READY, FAILED, LANE, BATCH, DONE, CHUNK, CHUNK_RESULT = range(1, 9)
ASK_INTEREST, INTEREST, CHECK, CHECKED, RELOAD, RELOADED, LEAVE = range(9, 16)

HEADER = struct.Struct("<IBBHQQ")
ROW = struct.Struct("<IHH")
ALIGNMENT = 64
# Payloads of a frame that are more bytes in all go through shared memory, where they fit.
INLINE_BYTES_MAX = 64 << 10
# Bytes of each end's half of it.
HALF_BYTES = 64 << 20
READ_BYTES = 256 << 10


class Ended(Exception):
    """The host is gone, or has nothing more to say."""


def aligned(size):
    return (size + ALIGNMENT - 1) & -ALIGNMENT


class Channel:
    """One connection to the host."""

    def __init__(self, descriptor, memory=None):
        self.socket = socket.socket(fileno=descriptor)
        self.socket.setblocking(True)
        self.memory = None if memory is None else mmap.mmap(memory, 2 * HALF_BYTES)
        self.rest = b""

    def fileno(self):
        return self.socket.fileno()

    def receive(self):
        """The next frame: its kind, its batch's number, and its items, each a status, a number of tensors and a payload."""
        data = self.rest or self._read()
        while len(data) < HEADER.size:
            data += self._read()
        size, kind, _, count, batch, place = HEADER.unpack_from(data)
        end = HEADER.size + size
        if len(data) < end:
            data = self._read_up_to(data, end)
        self.rest = data[end:]
        start = HEADER.size + count * ROW.size
        rows = ROW.iter_unpack(data[HEADER.size : start])
        items = []
        if place == 0:
            for size, status, tensors in rows:
                items.append((status, tensors, data[start : start + size]))
                start += size
        else:
            start = place - 1
            view = memoryview(self.memory)
            for size, status, tensors in rows:
                items.append((status, tensors, view[start : start + size]))
                start += aligned(size)
        return kind, batch, items

    def _read(self):
        data = self.socket.recv(READ_BYTES)
        if not data:
            raise Ended
        return data

    def _read_up_to(self, data, size):
        whole = bytearray(max(size, len(data)))
        whole[: len(data)] = data
        view, at = memoryview(whole), len(data)
        while at < size:
            count = self.socket.recv_into(view[at:])
            if count == 0:
                raise Ended
            at += count
        return bytes(whole)

    def send(self, kind, batch, items):
        """Sends a frame of items: a status, a number of tensors, and the pieces that make up the payload."""
        sizes = [sum(map(len, pieces)) for _, _, pieces in items]
        total = sum(sizes)
        table = b"".join([ROW.pack(size, item[0], item[1]) for size, item in zip(sizes, items)])
        shared = self.memory is not None and total > INLINE_BYTES_MAX and sum(map(aligned, sizes)) <= HALF_BYTES
        if shared:
            at = HALF_BYTES
            for size, (_, _, pieces) in zip(sizes, items):
                start = at
                for piece in pieces:
                    self.memory[at : at + len(piece)] = piece
                    at += len(piece)
                at = start + aligned(size)
            self.socket.sendall(HEADER.pack(len(table), kind, 0, len(items), batch, 1) + table)
            return
        header = HEADER.pack(len(table) + total, kind, 0, len(items), batch, 0)
        self.socket.sendall(b"".join([header, table, *[piece for item in items for piece in item[2]]]))

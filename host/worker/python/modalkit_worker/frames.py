"""How frames get across: a header, a table, payloads; large ones through shared memory. It never knows what they say.

The layout is that of the host's `frame.rs` and `channel.rs`. Lengths stand on the socket alone; what lies in shared memory is bytes.
"""

import ctypes
import mmap
import os
import socket
import struct
import weakref

HELLO, READY, FAILED, LANE, BATCH, DONE, CHUNK, CHUNK_RESULT = range(1, 9)
ASK_INTEREST, INTEREST, CHECK, CHECKED, RELOAD, RELOADED, LEAVE, SEND, SENT = range(9, 18)

HEADER = struct.Struct("<IBBHQQ")
ROW = struct.Struct("<IHH")
ALIGNMENT = 64
# Payloads of a frame that are more bytes in all go through shared memory, where they fit.
INLINE_BYTES_MAX = 64 << 10
# Bytes of each end's half of it.
HALF_BYTES = 64 << 20
READ_BYTES = 256 << 10


# After so many batches of whose memory something was kept, what comes is copied beforehand.
KEPT_MAX = 8
MAP_FIXED = 0x10


class Ended(Exception):
    """The host is gone, or has nothing more to say."""


def aligned(size):
    return (size + ALIGNMENT - 1) & -ALIGNMENT


class Channel:
    """One connection to the host."""

    def __init__(self, descriptor, memory=None):
        self.socket = socket.socket(fileno=descriptor)
        self.socket.setblocking(True)
        self.descriptor = memory
        self.memory = None if memory is None else mmap.mmap(memory, 2 * HALF_BYTES)
        self.rest = b""
        # Of the frame that came last, what of its memory can be kept: a weak reference, and where it lies.
        self.lent = None
        self.kept = 0

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
            rows = list(rows)
            view = self._lend(place - 1, sum(aligned(size) for size, _, _ in rows))
            start = 0
            for size, status, tensors in rows:
                items.append((status, tensors, view[start : start + size]))
                start += aligned(size)
        return kind, batch, items

    def _lend(self, start, size):
        """The payloads of a frame where they lie. When the batch has ended, `take_back`."""
        if self.kept >= KEPT_MAX:
            return memoryview(bytearray(memoryview(self.memory)[start : start + size]))
        slot = (ctypes.c_char * size).from_buffer(self.memory, start)
        self.lent = (weakref.ref(slot), start, size)
        return memoryview(slot).cast("B")

    def take_back(self):
        """The host writes the next frame where the last one lay. What somebody has kept of that, such as an array, stays what it is: its pages become this
        process's own, at the same addresses."""
        if self.lent is None:
            return
        (slot, start, size), self.lent = self.lent, None
        slot = slot()
        if slot is None:
            return
        self.kept += 1
        address = ctypes.addressof(slot)
        before = address % mmap.PAGESIZE
        pages = os.memfd_create("modalkit-kept", os.MFD_CLOEXEC)
        try:
            os.pwrite(pages, memoryview(slot), before)
            os.ftruncate(pages, -(-(before + size) // mmap.PAGESIZE) * mmap.PAGESIZE)
            _map(address - before, before + size, pages)
        finally:
            os.close(pages)
        # What they were mapped with lasts as long as they do.
        self.memory = mmap.mmap(self.descriptor, 2 * HALF_BYTES)

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


def _map(address, size, descriptor):
    """Puts a private copy of a file where something else is mapped."""
    call = ctypes.CDLL(None, use_errno=True).mmap
    call.restype = ctypes.c_void_p
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    access = mmap.PROT_READ | mmap.PROT_WRITE
    if call(address, size, access, mmap.MAP_PRIVATE | MAP_FIXED, descriptor, 0) != address:
        raise OSError(ctypes.get_errno(), "can't keep what a pipeline has kept")

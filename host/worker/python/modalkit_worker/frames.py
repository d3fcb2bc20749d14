"""How frames get across: a header, a table, payloads; large ones through shared memory. It never knows what they say.

The layout is that of the host's `frame.rs` and `channel.rs`. Lengths stand on the socket alone; what lies in shared memory is bytes.
"""

import ctypes
import gc
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

# After so many batches of whose memory something was kept, what comes is copied beforehand; one of them is forgotten after so many frames of which nothing
# was, or that were copied.
KEPT_MAX = 8
CLEAN_FORGETS = 100
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
FAILED_MAP = ctypes.c_void_p(-1).value


class Ended(BaseException):
    """The host is gone, or has nothing more to say."""


def aligned(size):
    return (size + ALIGNMENT - 1) & -ALIGNMENT


# A child that a pipeline has forked is no worker: it has none of the connections, and ends where it would come back to them.
is_forked = False


def forked():
    """In such a child."""
    global is_forked
    is_forked = True


def leave_if_forked():
    if is_forked:
        os._exit(0)


class Channel:
    """One connection to the host."""

    def __init__(self, descriptor, memory=None):
        self.socket = socket.socket(fileno=descriptor)
        self.socket.setblocking(True)
        self.descriptor = memory
        self.memory = None if memory is None else mmap.mmap(memory, 2 * HALF_BYTES)
        self.rest, self.buffer = b"", memoryview(bytearray(READ_BYTES))
        # Of the frame that came last, what of its memory can be kept: a weak reference, and where it lies.
        self.lent = None
        # How often something was kept lately, and frames since then.
        self.kept = self.clean = 0

    def fileno(self):
        return self.socket.fileno()

    def receive(self):
        """The next frame: its kind, its batch's number, and its items, each a status, a number of tensors and a payload."""
        leave_if_forked()
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
                end = start + size
                items.append((status, tensors, data[start:end]))
                start = end
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
            self._forget()
            return memoryview(bytearray(memoryview(self.memory)[start : start + size]))
        slot = (ctypes.c_char * size).from_buffer(self.memory, start)
        self.lent = (weakref.ref(slot), start, size)
        return memoryview(slot).cast("B")

    def take_back(self):
        """To be called before the host hears that the batch has ended: it writes the next one where that lay. What somebody has kept of it, such as an array,
        stays what it is: its pages become this process's own, at the same addresses."""
        if self.lent is None:
            return
        (slot, start, size), self.lent = self.lent, None
        if slot() is None:
            return self._forget()
        # What only a circle of dead objects holds, nobody has kept.
        gc.collect()
        slot = slot()
        if slot is None:
            return
        self.kept, self.clean = self.kept + 1, 0
        _keep(ctypes.addressof(slot), size)
        # What they were mapped with lasts as long as they do.
        self.memory = mmap.mmap(self.descriptor, 2 * HALF_BYTES)

    def _forget(self):
        self.clean += 1
        if self.clean >= CLEAN_FORGETS:
            self.kept, self.clean = max(0, self.kept - 1), 0

    def _read(self):
        # A buffer of its own: one that is made for each call costs more than what is read.
        count = self.socket.recv_into(self.buffer)
        if count == 0:
            raise Ended
        return bytes(self.buffer[:count])

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
        self.put(self.frame(kind, batch, items))

    def put(self, frame):
        """Sends what `frame` made."""
        leave_if_forked()
        self.socket.sendall(frame)

    def frame(self, kind, batch, items):
        """The bytes of a frame. Large payloads are put into shared memory here: nothing of the items is needed any more."""
        flat = [piece for _, _, pieces in items for piece in pieces]
        # Each has at least one: where there are as many, each is one.
        sizes = list(map(len, flat if len(flat) == len(items) else ()))
        sizes = sizes or [sum(map(len, pieces)) for _, _, pieces in items]
        total = sum(sizes)
        # As `ROW`, in one number.
        rows = [size | status << 32 | tensors << 48 for size, (status, tensors, _) in zip(sizes, items)]
        table = struct.pack(f"<{len(rows)}Q", *rows)
        shared = self.memory is not None and total > INLINE_BYTES_MAX and sum(map(aligned, sizes)) <= HALF_BYTES
        if shared:
            at = HALF_BYTES
            for size, (_, _, pieces) in zip(sizes, items):
                start = at
                for piece in pieces:
                    self.memory[at : at + len(piece)] = piece
                    at += len(piece)
                at = start + aligned(size)
            return HEADER.pack(len(table), kind, 0, len(items), batch, 1) + table
        header = HEADER.pack(len(table) + total, kind, 0, len(items), batch, 0)
        return b"".join([header, table, *flat])


def _keep(address, size):
    """Puts a private copy of the pages that hold something where they are mapped, in one step."""
    library = ctypes.CDLL(None, use_errno=True)
    for call in (library.mmap, library.mremap):
        call.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    library.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    before = address % mmap.PAGESIZE
    whole = -(-(before + size) // mmap.PAGESIZE) * mmap.PAGESIZE
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = library.mmap(None, whole, mmap.PROT_READ | mmap.PROT_WRITE, kind, -1, 0)
    if pages != FAILED_MAP:
        ctypes.memmove(pages + before, address, size)
        moved = library.mremap(pages, whole, whole, MREMAP_MAYMOVE | MREMAP_FIXED, address - before)
        if moved == address - before:
            return
    raise MemoryError(f"an array was kept, and there is no memory for it: {os.strerror(ctypes.get_errno())}")

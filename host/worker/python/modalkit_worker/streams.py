"""Outputs that come bit by bit: a generator that yields a chunk for each input at each step, or one generator for each input. It owns whose turn it is
and who has left, and never knows how a chunk gets across."""

import collections
import inspect
import time
import types

from . import encoding, items

# What a caller wants to have now, and what came of a chunk: the host's numbers.
NOTHING, OUTCOME, CHUNKS = 0, 1, 2
UNWANTED, TAKEN, FULL = 0, 1, 2
# Steps that wait in this process for a caller who reads slowly, before the batch waits for that caller.
STEPS_WAITING_MAX = 64
# Seconds between two looks whether anybody still waits for an output that is wanted whole.
LOOK_SECONDS = 0.05
# How long callers who all have no room are asked again and again, how often, before one is waited for.
BLOCKED_SECONDS, BETWEEN_TRIES_SECONDS = 1.0, 0.002
GENERATORS = (types.GeneratorType, types.AsyncGeneratorType)
_GENERATORS = frozenset(GENERATORS)


class Wrong(Exception):
    """What was yielded is no step."""


def has_steps(result):
    """Whether what a pipeline returned is still to be made."""
    if type(result) in GENERATORS:
        return True
    return isinstance(result, (list, tuple)) and not _GENERATORS.isdisjoint(map(type, result))


def follow(result, sink, finish):
    """Sends the chunks as they are made; the outputs, one for each input of the sink's."""
    if isinstance(result, (list, tuple)):
        return _Each([Steps(output, finish) for output in result], sink).outputs()
    steps = Steps(result, finish)
    first = steps.next(None)
    if steps.has_ended:
        return list(steps.returned or [])
    if not isinstance(first, (list, tuple)):
        # No steps: an output for each input, one after the other.
        return [first, *steps.rest()]
    return _Together(steps, first, sink).outputs()


class Steps:
    """A generator of either kind; of what is none, the value is what it returned."""

    def __init__(self, made, finish):
        self.made, self.finish = made, finish
        self.is_async = inspect.isasyncgen(made)
        self.has_ended = type(made) not in GENERATORS
        self.returned = made if self.has_ended else None
        self.has_begun = False

    def next(self, said):
        """What it yields, once it was told something; nothing where it has ended."""
        said, self.has_begun = said if self.has_begun else None, True
        try:
            return self.finish(self.made.asend(said)) if self.is_async else self.made.send(said)
        except StopIteration as end:
            self.returned = end.value
        except StopAsyncIteration:
            pass
        self.has_ended = True
        return None

    def rest(self):
        while True:
            output = self.next(None)
            if self.has_ended:
                return
            yield output

    def close(self):
        """Ends it where it is: its `finally` runs."""
        if not self.has_ended:
            self.has_ended = True
            self.finish(self.made.aclose()) if self.is_async else self.made.close()

    def drop(self):
        """The same of one that did badly already: what else it raises is nobody's."""
        try:
            self.close()
        except Exception:  # noqa: BLE001 - the generator is the user's own
            pass


class Caller:
    """One input's, and what was made for it."""

    def __init__(self, sink, place):
        self.sink, self.place = sink, place
        self.interest = sink.interest(place)
        self.looked = self.taken = time.monotonic()
        # Chunks, as they were yielded, for the outcome; and, as JSON, those that the caller had no room for.
        self.made, self.waiting = [], collections.deque()

    def is_there(self):
        if self.interest != NOTHING and time.monotonic() - self.looked > LOOK_SECONDS:
            self.interest, self.looked = self.sink.interest(self.place), time.monotonic()
        return self.interest != NOTHING

    def take(self, chunk):
        if self.interest == NOTHING:
            return
        self.made.append(chunk)
        if self.interest == CHUNKS:
            self.waiting.append(encoding.chunk(chunk))
            self.send(STEPS_WAITING_MAX)

    def send(self, left):
        """Sends what waits, as far as there is room; waits for room where more than so many would be left."""
        while self.waiting and self.interest == CHUNKS:
            result = self.sink.chunk(self.place, self.waiting[0], len(self.waiting) > left)
            if result == FULL:
                return
            self.looked = self.taken = time.monotonic()
            self.waiting.popleft()
            if result == UNWANTED:
                self.interest = NOTHING
        if self.interest == NOTHING:
            self.waiting.clear()

    def output(self):
        """Of what has no other: its chunks, as one text where they are text."""
        if self.made and all(isinstance(chunk, str) for chunk in self.made):
            return {"output": "".join(self.made)}
        return {"output": self.made}


class _Batch:
    def __init__(self, sink):
        self.callers = [Caller(sink, place) for place in range(sink.count)]

    def finished(self, outputs):
        """The outputs, once every caller has its chunks."""
        for caller in self.callers:
            caller.send(0)
        gone = items.Abandoned("nobody waits for this item any more")
        return [output if caller.is_there() else gone for output, caller in zip(outputs, self.callers)]


class _Together(_Batch):
    """One generator for the whole batch."""

    def __init__(self, steps, first, sink):
        super().__init__(sink)
        self.steps, self.first = steps, first

    def outputs(self):
        chunks = self.first
        while not self.steps.has_ended:
            if not isinstance(chunks, (list, tuple)) or len(chunks) != len(self.callers):
                found = f"{len(chunks)} of them" if isinstance(chunks, (list, tuple)) else type(chunks).__name__
                self.steps.close()
                raise Wrong(
                    f"expected a list with a chunk for each of {len(self.callers)} inputs, None where there is none now, found {found}"
                )
            for caller, chunk in zip(self.callers, chunks):
                if chunk is not None:
                    caller.take(chunk)
                else:
                    caller.send(STEPS_WAITING_MAX)
            there = [caller.is_there() for caller in self.callers]
            if not any(there):
                self.steps.close()
                break
            chunks = self.steps.next(there)
        if self.steps.returned is None:
            return self.finished([caller.output() for caller in self.callers])
        outputs = list(self.steps.returned)
        # Of another number: who asked says so.
        return self.finished(outputs) if len(outputs) == len(self.callers) else outputs


class _Each(_Batch):
    """A generator for each input, or an output where it is there already: a step of each in turn."""

    def __init__(self, all_steps, sink):
        super().__init__(sink)
        self.all_steps = all_steps

    def outputs(self):
        if len(self.all_steps) != len(self.callers):
            for steps in self.all_steps:
                steps.close()
            return self.all_steps
        failed, blocked = {}, None
        running = [pair for pair in enumerate(zip(self.all_steps, self.callers)) if not pair[1][0].has_ended]
        while running:
            for place, (steps, caller) in running:
                if caller.is_there() and caller.waiting:
                    # Nobody's pace is another's, as long as there are others.
                    caller.send(0 if len(running) == 1 else len(caller.waiting))
                    continue
                try:
                    chunk = steps.next(True) if caller.is_there() else steps.close()
                    if not steps.has_ended and chunk is not None:
                        caller.take(chunk)
                except Exception as error:  # noqa: BLE001 - the generator is the user's own
                    failed[place] = error
                    steps.drop()
            running = [pair for pair in running if not pair[1][0].has_ended]
            callers = [caller for _, (_, caller) in running]
            if len(callers) < 2 or not all(caller.waiting for caller in callers):
                blocked = None
                continue
            # None of them has room. Whoever reads on is served at once; who doesn't for long is waited for, and may be cut off.
            blocked = blocked or time.monotonic()
            if time.monotonic() - blocked < BLOCKED_SECONDS:
                time.sleep(BETWEEN_TRIES_SECONDS)
            else:
                slowest = min(callers, key=lambda caller: caller.taken)
                slowest.send(len(slowest.waiting) - 1)
        made = [
            failed.get(place, caller.output() if steps.returned is None else steps.returned)
            for place, (steps, caller) in enumerate(zip(self.all_steps, self.callers))
        ]
        return self.finished(made)

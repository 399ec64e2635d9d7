"""Copying beside the training: large tensors go into an arena batch by batch, by whoever has time.

A thread copies them in the order of their owners and of the file. An optimizer about to step helps with what it is
going to change, and waits for nothing else. Whatever else changes a tensor meanwhile is seen, and the save fails.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from dcpsvc import linux
from dcpsvc.witness import Extent, Watch, Witness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Executor

BATCH_NBYTES = 32 << 20
"""Copied by one call, so that a thread busy with Python code holds it up once in that many bytes."""

PATIENCE_S = 120.0
"""Longest wait for what a machine copies in a moment, unless it swaps."""

_LOOK_S = 0.2


class Task(Protocol):
    """Something to be read from tensors that are about to change."""

    @property
    def owner(self) -> int | None:
        """``id`` of the optimizer that alone changes them; None: anybody may."""
        ...

    @property
    def begin(self) -> int | None:
        """Where in the file its bytes begin; None if it writes none."""
        ...

    def run(self) -> None:
        """Do it. Any thread."""
        ...

    def check(self) -> None:
        """Raises TornSnapshotError if a tensor has changed since the task was made."""
        ...


class Beside(Protocol):
    """A copy that a device does by itself; its tasks tell when it is done."""

    @property
    def idle(self) -> bool:
        """Nothing of it is under way."""
        ...

    def order(self, owner: int | None) -> None:
        """Have whatever the calling thread does next on that device come after what is read for this owner."""
        ...


class Batch:
    """Bytes that lie one behind the other in the file: a :class:`Task`.

    Args:
        begin: Where in the file.
        owner: Of all of them.
        extents: At most :data:`BATCH_NBYTES`.
        watch: How closely; where training stands still, not at all.
    """

    def __init__(self, begin: int, owner: int | None, extents: Sequence[Extent], watch: Watch) -> None:
        self.begin, self.owner, self._extents = begin, owner, extents
        self._witness = None if watch is Watch.NOT else Witness(extents, every_byte=watch is Watch.EVERY_BYTE)

    def run(self) -> None:
        """Copy. Other threads run meanwhile; torch would start a team of threads of its own for each of ours."""
        for extent in self._extents:
            ctypes.memmove(extent.target.data_ptr(), extent.source.data_ptr(), extent.source.numel())

    def check(self) -> None:
        """Raises TornSnapshotError if what was copied is not what was there when this was made."""
        if self._witness is not None:
            self._witness.check()


class Copying:
    """All tasks of one save.

    Args:
        tasks: In the order in which they are wanted.
        on_done: Called once, on whichever thread ends the last of them; not if one fails or they are called off.
        beside: Copies of devices that some of the tasks wait for.

    Attributes:
        error: What went wrong; the rest was not done then.
    """

    def __init__(self, tasks: Iterable[Task], on_done: Callable[[], None], beside: Sequence[Beside] = ()) -> None:
        self._waiting = sorted(tasks, key=lambda task: task.owner is not None)  # save() returns when those are done
        self._undone = set(self._waiting)
        self._on_done, self._beside = on_done, beside
        self._changed = threading.Condition()
        self._running = 0
        self.error: BaseException | None = None

    @property
    def ended(self) -> bool:
        """Nobody reads or writes any more."""
        with self._changed:
            return not self._running and not self._waiting and all(each.idle for each in self._beside)

    def start(self, threads: Executor) -> None:
        """Begin, on another thread."""
        if self._waiting:
            threads.submit(self._run)
        else:
            self._on_done()

    def release(self, owner: int | None) -> None:
        """Help with what this owner is about to change, and wait for it. Training thread."""
        for each in self._beside:
            self._try(functools.partial(each.order, owner))
        while (task := self._take(lambda waiting: waiting.owner == owner)) is not None:
            self._do(task)
        ends = time.monotonic() + PATIENCE_S
        with self._changed:
            while any(task.owner == owner for task in self._undone):
                self._changed.wait(_LOOK_S)  # a Ctrl-C that came a moment before is seen only between two waits
                if time.monotonic() > ends:
                    self._fail(TimeoutError(f"the state was not copied within {PATIENCE_S} s"))

    def release_all(self) -> None:
        """As :meth:`release`, for all owners."""
        with self._changed:
            owners = {task.owner for task in self._undone}
        for owner in owners:
            self.release(owner)

    def wait_below(self, end: int) -> None:
        """Until all bytes of the file before ``end`` that are copied here are there. Any thread.

        Raises:
            TornSnapshotError: One of them was changed meanwhile.
            InterruptedError: They were called off.
        """
        self._wait(lambda task: task.begin is not None and task.begin < end)

    def wait(self) -> None:
        """Until all is done; raises as :meth:`wait_below`."""
        self._wait(lambda _: True)

    def call_off(self) -> None:
        """Nobody wants the rest."""
        self._fail(InterruptedError("the save ended while its state was being copied"))

    def _wait(self, matters: Callable[[Task], bool]) -> None:
        ends = time.monotonic() + PATIENCE_S
        with self._changed:
            while self.error is None and any(matters(task) for task in self._undone):
                self._changed.wait(PATIENCE_S)
                if time.monotonic() > ends:
                    self._fail(TimeoutError(f"the state was not copied within {PATIENCE_S} s"))
            if self.error is not None:
                raise self.error

    def _run(self) -> None:
        while (task := self._take(lambda _: True)) is not None:
            self._do(task)

    def _take(self, wanted: Callable[[Task], bool]) -> Task | None:
        with self._changed:
            for index, task in enumerate(self._waiting):
                if wanted(task):
                    self._running += 1
                    return self._waiting.pop(index)
            return None

    def _do(self, task: Task) -> None:
        try:
            self._try(task.run)
            self._try(task.check)  # before its owner is let go
        finally:
            with self._changed:
                self._running -= 1
                self._undone.discard(task)
                done = not self._undone and self.error is None
                self._changed.notify_all()
        if done:
            self._on_done()

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as err:  # noqa: BLE001 - the save reports it; training goes on
            self._fail(err)
        except BaseException as err:  # a Ctrl-C while an optimizer helps
            self._fail(err)
            raise

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self.error = self.error or error
            self._undone.clear()
            self._waiting.clear()
            self._changed.notify_all()


def thread() -> ThreadPoolExecutor:
    """One that copies, with a lower priority than the training thread: made once, for that takes a millisecond."""
    return ThreadPoolExecutor(1, "dcpsvc-copy", initializer=linux.yield_to_training)


def batches(extents: Iterable[tuple[int, int | None, Extent]], watch: Watch) -> Iterator[Batch]:
    """Batches to be copied by threads. What has no owner is copied before anybody may change it."""
    for begin, owner, batch in grouped(extents):
        yield Batch(begin, owner, batch, Watch.NOT if owner is None else watch)


def grouped(
    extents: Iterable[tuple[int, int | None, Extent]],
) -> Iterator[tuple[int, int | None, list[Extent]]]:
    """Whole batches of (begin in the file, owner, extent), as they come; large tensors in parts."""
    begin, batch, owner, nbytes = 0, list[Extent](), None, 0
    for at, each_owner, whole in extents:
        for offset in range(0, whole.source.numel(), BATCH_NBYTES):
            part = slice(offset, offset + BATCH_NBYTES)
            extent = whole._replace(source=whole.source[part], target=whole.target[part])
            if batch and (each_owner != owner or nbytes + extent.source.numel() > BATCH_NBYTES):
                yield begin, owner, batch
                batch, nbytes = [], 0
            if not batch:
                begin, owner = at + offset, each_owner
            batch.append(extent)
            nbytes += extent.source.numel()
    if batch:
        yield begin, owner, batch

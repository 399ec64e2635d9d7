"""What a job writes beside its checkpoints after their commit: metrics and pins. One rank, in the background.

The training thread only leaves a request: it never waits for the run root.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

from dcpsvc import deadline, sidefiles
from dcpsvc.errors import CheckpointGoneError, ClosedError, DcpsvcError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dcpsvc.catalog import Catalog
    from dcpsvc.format.keys import Attempt
    from dcpsvc.laststep import LastStep
    from dcpsvc.ranks.job import Job
    from dcpsvc.save import Save
    from dcpsvc.storage.base import Store

logger = logging.getLogger("dcpsvc")


class Annotator:
    """Carries requests out in the order they were made. On the other ranks it does nothing.

    Args:
        job: The ranks.
        remote: The run root.
        catalog: What is committed.
        under_way: Saves that are neither committed nor failed: their requests wait for them.
        last: The last step, which may be saved at the end, and has its metrics until then.
        timeout_s: Longest time a request may take.
    """

    def __init__(
        self,
        job: Job,
        remote: Store,
        catalog: Catalog,
        under_way: Callable[[], tuple[Save, ...]],
        *,
        last: LastStep,
        timeout_s: float,
    ) -> None:
        self._writes, self._remote, self._catalog, self._last = job.coordinates, remote, catalog, last
        self._under_way, self._timeout_s = under_way, timeout_s
        self._asked: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._open: set[Future[None]] = set()
        self._thread: threading.Thread | None = None
        self._closed = False

    def record(self, step: int, metrics: Mapping[str, float]) -> Future[None]:
        """See :func:`dcpsvc.sidefiles.record`; of the last step, while no save of it was begun: see ``LastStep.add``.

        Raises:
            ConfigError: Something is no number.
        """
        checked = sidefiles.numbers_of(metrics)
        if (noted := self._last.add(step, checked)) is not None:
            return noted
        return self._ask(step, functools.partial(self._record, metrics=checked))

    def pin(self, step: int, note: str) -> Future[None]:
        """See :func:`dcpsvc.sidefiles.pin`."""
        return self._ask(step, functools.partial(sidefiles.pin, self._remote, note=note))

    def unpin(self, step: int) -> Future[None]:
        """See :func:`dcpsvc.sidefiles.unpin_step`."""
        return self._ask(step, lambda attempt: sidefiles.unpin_step(self._remote, attempt.step))

    def steps(self) -> set[int]:
        """What is committed, or may be soon."""
        coming = {save.key.step for save in self._under_way()}  # first: what ends meanwhile is in the catalog
        return coming.union(tuple(self._catalog.attempts))

    def close(self, timeout_s: float) -> None:
        """Finish what was asked for, within that time; what is left is given up."""
        _, left = wait(set(self._open), timeout_s)
        self._closed = True
        for promise in left:
            _break(promise, ClosedError("the Checkpointer was closed before it was written"))
        if left:
            logger.warning("%s notes beside checkpoints were not written before the end", len(left))
        self._asked.put(None)

    def _ask(self, step: int, work: Callable[..., Any]) -> Future[None]:
        promise: Future[None] = Future()
        if not self._writes or self._closed:
            promise.set_result(None)
            return promise
        self._open.add(promise)
        promise.add_done_callback(self._open.discard)
        begun = [*(save.pending for save in self._under_way()), self._last.begun(step)]
        coming = next((pending for pending in begun if pending is not None and pending.step == step), None)
        if coming is None:
            self._put(step, work, promise)
        else:
            coming.committed.add_done_callback(lambda _: self._put(step, work, promise))
        return promise

    def _put(self, step: int, work: Callable[..., Any], promise: Future[None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="dcpsvc-annotator", daemon=True)
            self._thread.start()
        self._asked.put(functools.partial(self._do, step, work, promise))

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            asked()

    def _do(self, step: int, work: Callable[..., Any], promise: Future[None]) -> None:
        try:
            attempt = self._attempt(step)
            deadline.call(lambda: work(attempt=attempt), self._timeout_s, "writing beside a checkpoint")
        except (DcpsvcError, TimeoutError) as err:
            logger.warning("step %s: %s", step, err)
            _break(promise, err)
        except Exception as err:  # whatever it is, the thread goes on with the next
            logger.exception("step %s: nothing is noted beside it", step)
            _break(promise, err)
        else:
            if not promise.done():
                promise.set_result(None)

    def _record(self, attempt: Attempt, metrics: Mapping[str, float]) -> None:
        sidefiles.record(self._remote, attempt, metrics)
        self._catalog.record(attempt, metrics)

    def _attempt(self, step: int) -> Attempt:
        if (attempt := self._catalog.attempts.get(step)) is None:
            raise CheckpointGoneError(self._remote.url, step, "it is not committed, or deleted")
        return attempt


def _break(promise: Future[None], error: Exception) -> None:
    if not promise.done():
        promise.set_exception(error)

"""Back-pressure: what happens to a save that is due while others are under way. All ranks do the same.

Each rank sees its own uploader, a moment before or after the others see theirs. So the rank that comes first writes
what it sees to the ranks' store, by compare-and-set, and all act on that word; nobody waits for a peer.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dcpsvc.errors import WaitTimeoutError

if TYPE_CHECKING:
    from dcpsvc.config import Options
    from dcpsvc.ranks.job import Job
    from dcpsvc.uploader import Uploader

_GO, _SKIP = "go", "skip"


class Admission:
    """Decides on the training thread, before anything is staged."""

    def __init__(self, job: Job, options: Options, uploader: Uploader) -> None:
        self._job, self._options, self._uploader = job, options, uploader
        self._tries: dict[int, int] = {}

    def admit(self, step: int, *, must: bool, left_s: float | None = None) -> str:
        """Make room for a save, or say why it is left out; empty: it may begin.

        Waits until fewer than ``max_inflight`` saves are under way, unless the policy leaves this one out.

        Args:
            step: Of the new save.
            must: It is never left out, and gives nothing up: it waits.
            left_s: Time until the process must have ended; None: the timeouts of the stages bound the wait. Half of it
                may go to the saves under way; then they are left to the next start, so that this one gets its turn.

        Raises:
            WaitTimeoutError: No room within ``left_s``.
        """
        limit = self._options.max_inflight
        if self._options.backpressure != "wait" and not must:
            word = self._agree(step)
            if word == _SKIP:
                return f"{limit} saves were under way (backpressure='skip')"
            if word != _GO:
                self._give_up(word, step)
        try:
            self._uploader.wait(None if left_s is None else left_s / 2, below=limit)
        except WaitTimeoutError:
            self._leave_to_the_next_start(step)
            self._uploader.wait(left_s and left_s / 2, below=limit)
        return ""

    def _leave_to_the_next_start(self, step: int) -> None:
        for save in self._uploader.under_way:
            save.keeps_files, save.dropped = True, f"the process has to end, and step {step} comes first"

    def _agree(self, step: int) -> str:
        number = self._tries.get(step, 0)
        self._tries = {step: number + 1}
        key = f"{self._job.rendezvous.namespace}/admission/{step}/{number}"
        try:
            return self._job.rendezvous.store.compare_set(key, self._see())
        except RuntimeError as err:  # the ranks' store is gone: the save will say so, not the training step
            logging.getLogger("dcpsvc").debug("no word on the admission of step %s: %s", step, err)
            return _GO

    def _see(self) -> str:
        under_way = self._uploader.under_way
        if len(under_way) < self._options.max_inflight:
            return _GO
        if self._options.backpressure == "skip":
            return _SKIP
        return under_way[0].key.attempt

    def _give_up(self, attempt: str, step: int) -> None:
        """Each rank brings it to the save's next meeting; a save past its last one is committed all the same."""
        for save in self._uploader.under_way:
            if save.key.attempt == attempt:
                save.dropped = f"given up for step {step} (backpressure='drop-oldest')"

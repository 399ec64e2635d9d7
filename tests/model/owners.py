"""Who owns the run root at each moment, and what only its owner may do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcpsvc.errors import RunBusyError
from dcpsvc.format import keys
from dcpsvc.format.keys import NO_EPOCH, Epoch
from tests.model.stores import LAG_S

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable

    from dcpsvc.errors import RankFailure
    from tests.model.host import Host
    from tests.model.kernel import Kernel


class Owners:
    """Every claim that was made.

    Args:
        kernel: For the time.
        broken: Makes the error of a broken invariant.
        outcomes: What happened how often.

    Attributes:
        newest: The owner.
        claimed: When each claim appeared.
    """

    def __init__(self, kernel: Kernel, broken: Callable[[str], Exception], outcomes: Counter[str]) -> None:
        self._kernel, self._broken, self._outcomes = kernel, broken, outcomes
        self.newest = NO_EPOCH
        self.claimed: dict[Epoch, float] = {}

    def claim(self, epoch: Epoch) -> None:
        """One more."""
        self.newest = max(self.newest, epoch)
        self.claimed[epoch] = self._kernel.now

    def asked(self, key: str, author: Host) -> None:
        """A rank is about to create an object: a manifest only if it has looked whether its job is still the owner."""
        if (attempt := keys.attempt_of(key)) is None or key != attempt.manifest or author.epoch == NO_EPOCH:
            return
        newer = [when for epoch, when in self.claimed.items() if epoch > author.epoch]
        if newer and min(newer) + LAG_S < author.acked:
            raise self._broken(f"{author.process.name} writes the manifest of {attempt}, long after it was replaced")

    def refused(self, host: Host, error: BaseException) -> None:
        """A job could not take the run root over: only if another one has."""
        failures: tuple[RankFailure, ...] = getattr(error, "failures", ())
        if any(failure.error == RunBusyError.__name__ for failure in failures):
            self._outcomes["a start was refused by a newer claim"] += 1
            if self.newest.token == host.token:
                raise self._broken(f"{host.process.name} is refused, and its claim is the newest: {error}")

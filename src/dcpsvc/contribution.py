"""What one rank does for a save, phase by phase: what goes wrong becomes a value for the next meeting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from dcpsvc import deadline
from dcpsvc.errors import ClosedError, RankFailure, SaveSkippedError
from dcpsvc.ranks.rendezvous import DisagreementError
from dcpsvc.state import dcp_quirks

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from dcpsvc.save import Save

T = TypeVar("T")

_CLOSED = "the Checkpointer was closed before the save ended"


class Contribution:
    """Does this rank's part, unless nobody wants the save any more.

    Args:
        rank: This one.
        abandoned: Set once the Checkpointer gives up what is under way.
    """

    def __init__(self, rank: int, abandoned: threading.Event) -> None:
        self._rank, self._abandoned = rank, abandoned

    def why_given_up(self, save: Save) -> str:
        """Why nobody wants it any more; empty if somebody does."""
        return save.dropped or (_CLOSED if self._abandoned.is_set() else "")

    def given_up(self, save: Save, phase: str) -> RankFailure | None:
        """That, as what this rank says at the next meeting."""
        if not (reason := self.why_given_up(save)):
            return None
        kind = SaveSkippedError if save.dropped else ClosedError
        return RankFailure(self._rank, phase, kind.__name__, reason)

    def guarded(self, save: Save, phase: str, work: Callable[[], T]) -> T | RankFailure:
        """Do this rank's part, unless nobody wants it any more."""
        given_up = self.given_up(save, phase)
        return self.tried(save, phase, work) if given_up is None else given_up

    def tried(self, save: Save, phase: str, work: Callable[[], T]) -> T | RankFailure:
        """What goes wrong becomes a value for the next meeting."""
        try:
            return work()
        except deadline.GivenUpError as err:
            return self.given_up(save, phase) or RankFailure(self._rank, phase, type(err).__name__, str(err))
        except DisagreementError:
            raise
        except BaseException as err:  # noqa: BLE001 - DCP's own is no Exception; all become values for the meeting
            cause = dcp_quirks.cause(err)
            return RankFailure(self._rank, phase, type(cause).__name__, str(cause) or "no message")

    def then(self, save: Save, phase: str, before: Any, work: Callable[[Any], T]) -> T | RankFailure:
        """With what came of the part before; a failure is passed on."""
        return before if isinstance(before, RankFailure) else self.guarded(save, phase, lambda: work(before))

"""What the ranks said about a failed save, as the error that each of them gets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcpsvc.errors import CommitUnknownError, FencedError, RanksMissingError, SaveFailedError, SaveSkippedError

if TYPE_CHECKING:
    from dcpsvc.errors import RankFailure, SaveError
    from dcpsvc.format.keys import Attempt
    from dcpsvc.ranks.rendezvous import DisagreementError
    from dcpsvc.save import Save


def of_disagreement(key: Attempt, newest: int | None, err: DisagreementError) -> SaveError:
    """A meeting that did not agree: the same on every rank.

    Args:
        key: The attempt.
        newest: Newest committed step, which is intact.
        err: What the meeting came to.
    """
    if err.missing and err.phase == "commit" and not err.failures:  # a failure would have kept it from being written
        return CommitUnknownError(*key, newest, f"ranks {err.missing} fell silent")
    if err.missing:
        return RanksMissingError(*key, newest, err.phase, err.missing, err.present, err.waited_s)
    if fenced := [failure.text for failure in err.failures if failure.error == FencedError.__name__]:
        return FencedError(*key, newest, fenced[0])
    if err.failures and all(failure.error == SaveSkippedError.__name__ for failure in err.failures):
        return SaveSkippedError(*key, newest, err.failures[0].text)
    return SaveFailedError(*key, newest, err.failures)


def of_control(save: Save, newest: int | None, failure: RankFailure) -> SaveError:
    """This rank cannot reach the others: what it says is its own."""
    if save.may_exist:
        return CommitUnknownError(*save.key, newest, str(failure))
    return SaveFailedError(*save.key, newest, (failure,))

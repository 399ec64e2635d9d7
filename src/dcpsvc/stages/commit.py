"""Commit: one rank creates the manifest, after every rank has confirmed; the verdict goes to all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from dcpsvc import fence
from dcpsvc.errors import FencedError, ManifestError, RankFailure, StoreError, StoreNotFoundError
from dcpsvc.format import manifest as manifests
from dcpsvc.format.digest import digest
from dcpsvc.ranks.rendezvous import RefusalError

if TYPE_CHECKING:
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.ranks.job import Job
    from dcpsvc.ranks.rendezvous import Meeting
    from dcpsvc.storage.base import Store


Within = Callable[[Callable[[], Any]], Any]


def _at_once(work: Callable[[], Any]) -> Any:
    return work()


def publish(
    job: Job,
    place: str,
    mine: Manifest | RankFailure,
    store: Store,
    *,
    meeting: Meeting,
    within: Within,
    created: Callable[[], None],
) -> Published:
    """Commit when every rank holds the same manifest. Uploader thread, every rank.

    Args:
        job: The ranks.
        place: The attempt.
        mine: The manifest as this rank made it from the acknowledgements.
        store: The run root.
        meeting: Deadlines.
        within: Runs a store call with a deadline; raises TimeoutError past it.
        created: Called on the coordinator once the manifest is durable.

    Raises:
        DisagreementError: Somebody failed, and nothing was written; or ranks are missing, and only the
            store can tell.
    """

    def write(messages: list[str]) -> list[str]:
        assert not isinstance(mine, RankFailure)  # noqa: S101 - a failure would have ended the meeting
        if len(set(messages)) > 1:
            raise RefusalError([RankFailure(0, "commit", ManifestError.__name__, "the ranks made different manifests")])
        _check_owner(store, mine, within)
        if (unknown := create(store, mine, within)) is not None:
            return [unknown, ""]
        published = _confirm(store, mine, within)
        if not published.unknown:
            created()
        return list(published)

    message = mine if isinstance(mine, RankFailure) else digest(mine.dumps())
    return Published(*job.meet(f"{place}/commit", message, write, meeting))


class Published(NamedTuple):
    """How the one write that counts went.

    Attributes:
        unknown: Why nobody can tell whether it is committed; empty if it is.
        replaced: Committed, and a newer job has inherited it: who. This job owns nothing any more.
    """

    unknown: str
    replaced: str


def _check_owner(store: Store, manifest: Manifest, within: Within) -> None:
    """Before anything is written: a job that was replaced must not even try."""
    try:
        theirs = within(lambda: fence.successor(store, manifest.key.epoch))
    except Exception as err:  # whatever it is, every rank hears of it: nothing was written
        raise RefusalError([RankFailure(0, "commit", type(err).__name__, str(err))]) from err
    if theirs:
        raise _replaced(manifest, theirs)


def _confirm(store: Store, manifest: Manifest, within: Within) -> Published:
    """After it was written: it counts unless a newer job has listed the commits without it.

    Raises:
        RefusalError: It does not, and never will.
    """

    def ask() -> tuple[fence.Verdict, bool]:
        verdict = fence.verdict(store, manifest.key)
        return verdict, bool(verdict.counts and verdict.theirs) and _take_back(store, manifest)

    try:
        verdict, taken_back = within(ask)
    except Exception as err:  # noqa: BLE001 - whatever it is, nobody knows who owns the run root
        return Published(f"the manifest stands, but whether a newer job has taken over is not known: {err}", "")
    if verdict.counts is None:
        return Published(f"at this moment {verdict.theirs} is taking the run root over", "")
    if taken_back or not verdict.counts:
        raise _replaced(manifest, verdict.theirs)
    return Published("", verdict.theirs)


def _take_back(store: Store, manifest: Manifest) -> bool:
    """Whether the newer job had finished this very attempt, and deleted it before our write landed.

    Then nothing stands behind the manifest, and nothing ever will.
    """
    try:
        store.size(manifest.shards[0].path)
    except StoreNotFoundError:
        if not store.list(manifest.key.data):  # else it is damaged, which people want to know
            store.delete(manifest.key.manifest)
            return True
    return False


def _replaced(manifest: Manifest, theirs: str) -> RefusalError:
    reason = fence.replaced(manifest.key.epoch, theirs)
    return RefusalError([RankFailure(0, "commit", FencedError.__name__, reason)])


def create(store: Store, manifest: Manifest, within: Within = _at_once) -> str | None:
    """Write a manifest that nobody has written.

    Returns:
        None if it stands there now; else why nobody can tell.

    Raises:
        RefusalError: It does not stand there, and never will.
    """
    try:
        within(lambda: store.create(manifest.key.manifest, manifest.dumps()))
    except Exception as err:  # noqa: BLE001 - it may have been written all the same: look
        return _look(store, manifest, err, within)
    return _look(store, manifest, None, within)


def _look(store: Store, manifest: Manifest, error: Exception | None, within: Within) -> str | None:
    """What stands under the key decides; where the answer to a write was lost, absence proves nothing."""
    key = manifest.key.manifest
    try:
        found = within(lambda: store.get(key, max_nbytes=manifests.MAX_NBYTES))
    except StoreNotFoundError:
        if isinstance(error, StoreError) and not error.transient:
            raise RefusalError([RankFailure(0, "commit", type(error).__name__, str(error))]) from error
        return f"{key} was written and is not there" if error is None else _told(error)
    except Exception as err:  # noqa: BLE001 - whatever it is, nobody knows what stands there
        return _told(error or err)
    if found != manifest.dumps():
        raise RefusalError([RankFailure(0, "commit", StoreError.__name__, f"{key} exists with other content")])
    return None


def _told(error: Exception) -> str:
    """Never empty, which would mean that all is well: some exceptions have no text."""
    return str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"

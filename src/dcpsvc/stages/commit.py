"""Commit: one rank creates the manifest, after every rank has confirmed; the verdict goes to all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcpsvc.errors import RankFailure, StoreError
from dcpsvc.format import manifest as manifests
from dcpsvc.ranks.rendezvous import RefusalError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.format.manifest import Manifest
    from dcpsvc.ranks.job import Job
    from dcpsvc.ranks.rendezvous import Meeting
    from dcpsvc.storage.base import Store


def publish(
    job: Job,
    place: str,
    mine: Manifest | RankFailure,
    store: Store,
    *,
    meeting: Meeting,
    created: Callable[[], None],
) -> str | None:
    """Commit when every rank holds the same manifest. Uploader thread, every rank.

    Args:
        job: The ranks.
        place: The attempt.
        mine: The manifest as this rank made it from the acknowledgements.
        store: The run root.
        meeting: Deadlines.
        created: Called on the coordinator once the manifest is durable.

    Returns:
        None if it is committed; else why nobody can tell: the store did not answer the coordinator.

    Raises:
        DisagreementError: Somebody failed, and nothing was written; or ranks are missing, and only the
            store can tell.
    """

    def write(_: object) -> str | None:
        assert not isinstance(mine, RankFailure)  # noqa: S101 - a failure would have ended the meeting
        try:
            create(store, mine)
        except StoreError as err:
            if err.transient:
                return str(err)
            raise RefusalError([RankFailure(0, "commit", type(err).__name__, str(err))]) from err
        created()
        return None

    verdict: str | None = job.meet(
        f"{place}/commit", mine if isinstance(mine, RankFailure) else mine.key, write, meeting
    )
    return verdict


def create(store: Store, manifest: Manifest) -> None:
    """Write a manifest that nobody has written.

    Raises:
        RefusalError: One stands there, and it is not this one.
        StoreError: The store did not answer; whether it wrote, only a listing can tell.
    """
    key, data = manifest.key.manifest, manifest.dumps()
    if not store.create(key, data) and store.get(key, max_nbytes=manifests.MAX_NBYTES) != data:
        raise RefusalError([RankFailure(0, "commit", StoreError.__name__, f"{key} exists with other content")])

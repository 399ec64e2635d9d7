"""Loading a checkpoint from outside a training job, into whatever state you have."""

from __future__ import annotations

import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from dcpsvc import choosing, deletions
from dcpsvc.config import Options
from dcpsvc.errors import NoSuchStepError, NoValidCheckpointError, RankFailure, RestoreFailedError
from dcpsvc.leases import held
from dcpsvc.ranks.job import Job
from dcpsvc.ranks.rendezvous import DisagreementError
from dcpsvc.reader import CheckpointReader
from dcpsvc.reading import open_root
from dcpsvc.resuming import Resuming
from dcpsvc.sidefiles import Lease
from dcpsvc.stages import discover
from dcpsvc.state.app import AppState
from dcpsvc.state.drift import Terms

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Mapping, MutableMapping

    from dcpsvc.choosing import Found
    from dcpsvc.format.keys import Attempt
    from dcpsvc.storage.base import Store


def storage_reader(
    root: str | os.PathLike[str], step: int | None = None, *, storage_options: Mapping[str, Any] | None = None
) -> CheckpointReader:
    """A DCP StorageReader: ``torch.distributed.checkpoint.load(state, storage_reader=...)`` reads the checkpoint.

    While DCP reads, each rank holds the checkpoint by a lease of its own, if the root can be written: a live job does
    not delete it then. Before that, it may.

    Args:
        root: The run.
        step: A committed step; None takes the newest that is not tagged as diverged.
        storage_options: For fsspec.

    Raises:
        NoSuchStepError: The step is not committed, or its files are not all there.
        StepDeletedError: It is being deleted, or, as that says, never was committed.
        NoValidCheckpointError: Nothing can be loaded.
        FormatError: Its layout or JSON values are damaged.
    """
    store = open_root(root, storage_options)
    manifest, _, layout = _choose(store, step)
    hold = functools.partial(held, store, manifest.key)
    with deletions.noticed(store, manifest.key):
        reader = CheckpointReader(manifest, layout or discover.read_layout(store, manifest), [store], hold)
        reader.read_metadata()  # now, because DCP turns what goes wrong here into an AssertionError
    return reader


def load(
    root: str | os.PathLike[str],
    state: MutableMapping[str, Any],
    step: int | None = None,
    *,
    skip: Collection[str] = (),
    rename: Mapping[str, str] | None = None,
    strict: bool = True,
    only: Literal["all", "trainable"] = "all",
    storage_options: Mapping[str, Any] | None = None,
    sync_timeout_s: float = 60.0,
    even_diverged: bool = False,
    read_together: bool | None = None,
) -> int:
    """Load a checkpoint into ``state``, whatever the number of ranks; components it does not name are left out.

    While it is read a live job does not delete it: a lease is left beside it, if the root can be written.
    Collective if a process group is initialised: the ranks agree on one checkpoint.

    Args:
        root: The run.
        state: As for :class:`~dcpsvc.Checkpointer`.
        step: A committed step; None takes the newest that is whole.
        skip: Components, or keys of modules and optimizers by their dotted beginning, to leave as they are.
        rename: Saved keys by their dotted beginning, and what they are called here.
        strict: False lets pass what only the checkpoint or only the state has, and logs it as a warning. Shapes and
            dtypes must fit all the same.
        only: ``trainable``: parameters that need no gradient are loaded only if the checkpoint has them.
        storage_options: For fsspec.
        sync_timeout_s: Longest wait for a peer.
        even_diverged: Take the newest even if it is tagged as diverged; one that is named is taken anyway.
        read_together: False: no rank gets anything from another; see :class:`~dcpsvc.Options`. Rank 0's counts.

    Returns:
        The step that was loaded.

    Raises:
        ConfigError: An argument makes no sense.
        NoSuchStepError: ``step`` is not committed, or damaged.
        StepDeletedError: It is being deleted, or, as that says, never was committed.
        NoValidCheckpointError: Nothing can be loaded.
        RestoreFailedError: The state does not fit, or a rank is missing; says so if anything in memory was changed.
    """
    together = Options(read_together=read_together).read_together
    store, app = open_root(root, storage_options), AppState(state, only)
    work_s = max(sync_timeout_s, 1800.0)
    try:
        job = Job.join(sync_timeout_s)
    except DisagreementError as err:
        raise RestoreFailedError(store.url, err.failures, err.missing) from None
    except RuntimeError as err:  # the ranks' store does not answer
        raise RestoreFailedError(store.url, (RankFailure(-1, "join", type(err).__name__, str(err)),)) from err
    lease = _Lease(store, 2 * work_s)
    try:
        resuming = Resuming(
            job, "load", store, (), app, sync_timeout_s, work_s, hold=lease.take, even_diverged=even_diverged,
            read_together=together,
        )  # fmt: skip
        found = resuming.run(step, Terms(strict=strict, skip=tuple(skip), rename=dict(rename or {})))
        with contextlib.suppress(RuntimeError):  # it is loaded; a peer that cannot be reached is not waited for
            job.linger("load", sync_timeout_s)
    finally:
        lease.release()
        job.leave()
    if found is None:
        raise NoValidCheckpointError(store.url, ("nothing is committed",))
    return found.attempt.step


class _Lease:
    """A lease whose requests nobody waits for while there is something to read.

    Args:
        store: The run root.
        seconds: How long reading may take.
    """

    def __init__(self, store: Store, seconds: float) -> None:
        self._lease = Lease(store, seconds)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dcpsvc-lease")

    def take(self, attempt: Attempt) -> None:
        """Hold a checkpoint."""
        self._thread.submit(self._lease.take, attempt)

    def release(self) -> None:
        """Hold nothing any more; when this returns it is gone."""
        self._thread.submit(self._lease.release)
        self._thread.shutdown()


def _choose(store: Store, step: int | None) -> Found:
    choice = choosing.choose(store, step)
    if choice.found is not None:
        return choice.found
    if step is None:
        raise NoValidCheckpointError(store.url, choice.rejected or ("nothing is committed",))
    raise choice.deleted or NoSuchStepError(store.url, step, choice.steps, "; ".join(choice.rejected))

"""Reading a run root from outside a training job: what is there, and into whatever state you have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcpsvc.errors import NoSuchStepError, NoValidCheckpointError, RootError, StoreNotFoundError
from dcpsvc.format import keys, run
from dcpsvc.stages import discover
from dcpsvc.storage.open import open_store

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Mapping, MutableMapping

    from dcpsvc.stages.discover import Checkpoint
    from dcpsvc.stages.restore import CheckpointReader
    from dcpsvc.storage.base import Store


def open_root(root: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Store:
    """The store of an existing run.

    Raises:
        RootError: There is no run at that place, or another format version.
    """
    store = open_store(root, storage_options)
    try:
        run.loads(store.url, store.get(keys.RUN, max_nbytes=run.MAX_NBYTES))
    except StoreNotFoundError as err:
        raise RootError(store.url, "no run is stored here (run.json is missing); check the path or URL") from err
    return store


def list_checkpoints(
    root: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None
) -> list[Checkpoint]:
    """Every checkpoint of a run, and every attempt at one, ascending by step. Needs no process group.

    ``.state`` tells ``committed`` from ``incomplete``; ``.reason`` says why.

    Raises:
        RootError: There is no run at that place.
        StoreError: The store could not be listed. That is never an empty list.
    """
    return discover.listing(open_root(root, storage_options))


def latest(root: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> Checkpoint | None:
    """The newest commit whose files are all there; None if there is none. Same errors as :func:`list_checkpoints`."""
    found = [c for c in list_checkpoints(root, storage_options=storage_options) if c.state == "committed"]
    return found[-1] if found else None


def storage_reader(
    root: str | os.PathLike[str], step: int | None = None, *, storage_options: Mapping[str, Any] | None = None
) -> CheckpointReader:
    """A DCP StorageReader: ``torch.distributed.checkpoint.load(state, storage_reader=...)`` reads the checkpoint.

    Args:
        root: The run.
        step: A committed step; None takes the newest.
        storage_options: For fsspec.

    Raises:
        NoSuchStepError: The step is not committed, or its files are not all there.
        NoValidCheckpointError: Nothing can be loaded.
    """
    from dcpsvc.stages.restore import CheckpointReader

    store = open_root(root, storage_options)
    manifest = discover.read_manifest(store, _choose(store, step).key)
    return CheckpointReader(manifest, discover.read_layout(store, manifest), [store])


def load(
    root: str | os.PathLike[str],
    state: MutableMapping[str, Any],
    step: int | None = None,
    *,
    skip: Collection[str] = (),
    storage_options: Mapping[str, Any] | None = None,
    sync_timeout_s: float = 60.0,
) -> int:
    """Load a checkpoint into ``state``, whatever the number of ranks; components it does not name are left out.

    Collective if a process group is initialised: the ranks agree on one checkpoint.

    Args:
        root: The run.
        state: As for :class:`~dcpsvc.Checkpointer`.
        step: A committed step; None takes the newest that is whole.
        skip: Names in ``state`` to leave as they are.
        storage_options: For fsspec.
        sync_timeout_s: Longest wait for a peer.

    Returns:
        The step that was loaded.

    Raises:
        NoSuchStepError: ``step`` is not committed, or damaged.
        NoValidCheckpointError: Nothing can be loaded.
        RestoreFailedError: The state does not fit, or a rank is missing. Nothing in memory was changed.
    """
    from dcpsvc.ranks.job import Job
    from dcpsvc.resuming import Resuming
    from dcpsvc.state.app import AppState

    store, app = open_root(root, storage_options), AppState(state)
    job = Job.join(sync_timeout_s)
    try:
        found = Resuming(job, "load", store, (), app, sync_timeout_s, max(sync_timeout_s, 1800.0)).run(step, skip)
        job.linger("load", sync_timeout_s)
    finally:
        job.leave()
    if found is None:
        raise NoValidCheckpointError(store.url, ("nothing is committed",))
    return found.attempt.step


def find(store: Store, step: int | None) -> list[Checkpoint]:
    """The checkpoints and attempts of one step, or all.

    Raises:
        NoSuchStepError: There is nothing of that step.
    """
    everything = discover.listing(store)
    found = [checkpoint for checkpoint in everything if step in {None, checkpoint.step}]
    if step is not None and not found:
        raise NoSuchStepError(store.url, step, _steps(everything))
    return found


def _choose(store: Store, step: int | None) -> Checkpoint:
    found = find(store, step)
    whole = [checkpoint for checkpoint in found if checkpoint.state == "committed"]
    if whole:
        return whole[-1]
    reasons = tuple(f"step {checkpoint.step}: {checkpoint.reason}" for checkpoint in found)
    if step is None:
        raise NoValidCheckpointError(store.url, reasons or ("nothing is committed",))
    raise NoSuchStepError(store.url, step, _steps(discover.listing(store)), "; ".join(reasons))


def _steps(checkpoints: list[Checkpoint]) -> tuple[int, ...]:
    return tuple(checkpoint.step for checkpoint in checkpoints if checkpoint.state == "committed")

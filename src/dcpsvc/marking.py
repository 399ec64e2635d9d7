"""Metrics and pins from outside a training job: by an evaluation, by hand. Needs write access to the run root."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcpsvc import deletions, sidefiles
from dcpsvc.errors import NoSuchStepError
from dcpsvc.reading import open_root
from dcpsvc.stages import discover

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from dcpsvc.format.keys import Attempt
    from dcpsvc.storage.base import Store


def record_metrics(
    root: str | os.PathLike[str],
    step: int,
    metrics: Mapping[str, float],
    *,
    attempt: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Add numbers to a checkpoint; a live job's ``Best(...)`` counts them from its next commit on.

    Where a name was recorded before, the later number counts. ``{"diverged": 1}`` has every resume pass it over unless
    asked for; 0 takes that back.

    Args:
        root: The run.
        step: A committed step.
        metrics: Numbers by name.
        attempt: Which commit of the step, where there are several; None: the one that a resume would take.
        storage_options: For fsspec.

    Raises:
        NoSuchStepError: The step is not committed.
        CheckpointGoneError: It was deleted meanwhile.
        ConfigError: Something is no number.
    """
    store = open_root(root, storage_options)
    sidefiles.record(store, find(store, step, attempt), metrics)


def pin(
    root: str | os.PathLike[str],
    step: int,
    note: str = "",
    *,
    attempt: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Have a checkpoint stay until :func:`unpin`, whatever a live job's policy says. Arguments and errors as above.

    Args:
        root: The run.
        step: A committed step.
        note: Why, for people.
        attempt: Which commit of the step.
        storage_options: For fsspec.
    """
    store = open_root(root, storage_options)
    sidefiles.pin(store, find(store, step, attempt), note)


def unpin(
    root: str | os.PathLike[str],
    step: int,
    *,
    attempt: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> int:
    """Leave a checkpoint to the policy again; says how many pins it had. Arguments and errors as above.

    A pin keeps all attempts of a step, so without ``attempt`` those of all of them go.
    """
    store = open_root(root, storage_options)
    found = find(store, step, attempt)
    return sidefiles.unpin_step(store, step) if attempt is None else sidefiles.unpin(store, found)


def find(store: Store, step: int, attempt: str | None = None) -> Attempt:
    """The commit of a step; with several of them the newest, or the one named.

    Raises:
        NoSuchStepError: There is none.
        StepDeletedError: It is being deleted, or, as that says, never was committed.
    """
    everything = discover.committed(store)
    found = [one for one in everything if one.step == step and attempt in {None, one.attempt}]
    if not found:
        deletions.check_step(store, step, attempt)
        have = tuple(sorted({one.step for one in everything}))
        there = tuple(one.attempt for one in everything if one.step == step)
        reason = f"has no committed attempt {attempt}" if there else ""
        raise NoSuchStepError(store.url, step, have, reason, there)
    return discover.newest_first(store, found)[0]

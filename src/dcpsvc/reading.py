"""Looking at a run root from outside a training job: what is there. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcpsvc import choosing, identity
from dcpsvc.errors import FormatError, NoRunError, RootError
from dcpsvc.stages import discover
from dcpsvc.storage.open import open_store
from dcpsvc.storage.threads import at_once

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from dcpsvc.stages.discover import Checkpoint
    from dcpsvc.storage.base import Store


def open_root(root: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Store:
    """The store of an existing run.

    Raises:
        NoRunError: There is no run at that place.
        RootError: It is one of another format version, or damaged.
    """
    store = open_store(root, storage_options)
    check_root(store)
    return store


def check_root(store: Store) -> None:
    """Raises RootError, or NoRunError, unless there is a run of this format version."""
    try:
        found = identity.find(store)
    except FormatError as err:
        raise RootError(store.url, f"its run.json is damaged: {err.reason}") from err
    if found is None:
        raise NoRunError(store.url, "no run is stored here (run.json is missing); check the path or URL")


def list_checkpoints(
    root: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None
) -> list[Checkpoint]:
    """Every checkpoint of a run, and every attempt at one, ascending by step. Needs no process group.

    ``.state`` tells ``committed`` from ``incomplete``; ``.reason`` says why.

    Raises:
        RootError: There is no run at that place.
        StoreError: The store could not be listed. That is never an empty list.
    """
    store = open_root(root, storage_options)
    return discover.listing(store, at_once=at_once(store))


def latest(
    root: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None, checked: bool = True
) -> Checkpoint | None:
    """The newest commit whose files are all there and that is not tagged as diverged; None if there is none.

    However many commits there are, one LIST and the newest manifest are read.

    Args:
        root: The run.
        storage_options: For fsspec.
        checked: False believes the manifest: nobody looks for its files, or for a tag that came after the commit.

    Raises:
        RootError: There is no run at that place.
        StoreError: The store could not be asked. That is never None.
    """
    store = open_store(root, storage_options)
    choice = choosing.choose(store, None, look=choosing.looked if checked else choosing.told)
    if choice.found is None:
        check_root(store)
        return None
    return discover.checkpoint_of(choice.found.manifest, choice.found.metrics)

"""Which run lies at a run root, if any."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcpsvc.errors import RootError, StoreNotFoundError, StoreObjectError
from dcpsvc.format import keys, run
from dcpsvc.storage.placed import is_file

if TYPE_CHECKING:
    from dcpsvc.format.run import Run
    from dcpsvc.storage.base import Store


def find(store: Store) -> Run | None:
    """The run; None if there is none yet. One request, and where there is none one more.

    Raises:
        RootError: The root is a file, or an object with that very name, or of another format version.
        FormatError: Its run.json is damaged.
        StoreError: The store could not be asked.
    """
    try:
        return run.loads(store.url, store.get(keys.RUN, max_nbytes=run.MAX_NBYTES))
    except StoreNotFoundError:
        check_folder(store)
        return None
    except StoreObjectError:  # of directories: there cannot be anything below a file
        check_folder(store)
        raise


def check_folder(store: Store) -> None:
    """Raises RootError if the root is a file: S3 would take a run below one, and people would not find it."""
    if is_file(store):
        raise RootError(store.url, "a file, not a folder; name a folder, or a prefix that no object has for its name")

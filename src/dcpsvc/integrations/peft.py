"""A ready PEFT folder in each checkpoint, for whoever serves or evaluates adapters: ``pip install dcpsvc[peft]``.

::

    folders = dcpsvc.integrations.peft.Folders("s3://bucket/runs/exp42")
    ckpt = dcpsvc.Checkpointer("s3://bucket/runs/exp42", state, only="trainable", on_event=folders)

Rank 0 writes it right after the commit, in a thread of its own, out of what was committed, verified:
``data/step-<step>.<attempt>/adapter/`` at the run root, which a policy deletes with the checkpoint. What a kill, or a
store that was down, left out is caught up by the next start. The last file of a folder is ``files.json``.
"""

from __future__ import annotations

import functools
import logging
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import DcpsvcError
from dcpsvc.events import Point
from dcpsvc.format.digest import digest
from dcpsvc.format.keys import Attempt
from dcpsvc.format.seal import seal
from dcpsvc.reading import open_root
from dcpsvc.stages import discover
from dcpsvc.storage.base import is_there
from dcpsvc.tools import adapterfolder
from dcpsvc.tools.exporting import Source, export_peft

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from dcpsvc.events import Event
    from dcpsvc.storage.base import Store

logger = logging.getLogger("dcpsvc")


class Folders:
    """An observer for ``on_event``.

    Args:
        root: The run root.
        component: The module's name in the state, or a dotted beginning below it.
        storage_options: For fsspec.
        on_event: Another observer, called first.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        component: str = "model",
        storage_options: Mapping[str, Any] | None = None,
        on_event: Any = None,
    ) -> None:
        self._root, self._component = root, component
        self._options, self._next = storage_options, on_event
        self._thread: ThreadPoolExecutor | None = None

    def __call__(self, event: Event) -> None:
        """Begin what is missing at the start, and a folder at each commit; wait for them at the end."""
        if self._next is not None:
            self._next(event)
        if event.rank != 0:
            return
        if event.name == Point.OPENED:
            self._begin(self._catch_up)
        elif event.name == Point.COMMITTED and event.step is not None:
            self._begin(functools.partial(self._write, Attempt(event.step, event.attempt)))
        elif event.name == Point.CLOSED:
            self.wait()

    def wait(self) -> None:
        """Until every folder that was begun is whole. Any thread."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            thread.shutdown()

    def _begin(self, work: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="dcpsvc-peft")
        self._thread.submit(self._tried, work)

    def _tried(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (DcpsvcError, OSError) as err:  # the commit stands, whatever becomes of its folder
            logger.warning("a PEFT folder was not made, the next start tries again: %s", err)

    def _catch_up(self) -> None:
        store = open_root(self._root, self._options)
        for attempt in reversed(discover.committed(store)):
            if not is_there(store, attempt.adapter + adapterfolder.LIST):
                self._write(attempt)

    def _write(self, attempt: Attempt) -> None:
        store = open_root(self._root, self._options)
        with tempfile.TemporaryDirectory(prefix="dcpsvc-peft-") as scratch:
            export_peft(Source(store, attempt.step, self._component, attempt.attempt), scratch)
            _carry(store, attempt, Path(scratch))
        if not is_there(store, attempt.manifest):  # it was deleted meanwhile, and so is this
            for entry in store.list(attempt.adapter):
                store.delete(entry.key)


def _carry(store: Store, attempt: Attempt, folder: Path) -> None:
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = {name: {"nbytes": (folder / name).stat().st_size, "digest": _digest(folder / name)} for name in names}
    for name in names:
        store.put_file(attempt.adapter + name, folder / name)
    store.put(
        attempt.adapter + adapterfolder.LIST, seal({"step": attempt.step, "attempt": attempt.attempt, "files": files})
    )


def _digest(path: Path) -> str:
    return digest(path.read_bytes())

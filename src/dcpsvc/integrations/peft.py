"""A ready PEFT folder beside each commit, for whoever serves or evaluates adapters: ``pip install dcpsvc[peft]``.

::

    folders = dcpsvc.integrations.peft.Folders("s3://bucket/runs/exp42", "./adapters")
    ckpt = dcpsvc.Checkpointer("s3://bucket/runs/exp42", state, only="trainable", on_event=folders)

Written by rank 0 in a thread of its own, out of what was committed, verified. A step becomes visible as ``step-N`` when
its folder is whole.
"""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import DcpsvcError
from dcpsvc.events import Point
from dcpsvc.reading import open_root
from dcpsvc.tools.exporting import Source, export_peft

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from dcpsvc.events import Event

logger = logging.getLogger("dcpsvc")


class Folders:
    """An observer for ``on_event``.

    Args:
        root: The run root.
        directory: Where ``step-N`` folders go.
        component: The module's name in the state, or a dotted beginning below it.
        storage_options: For fsspec.
        on_event: Another observer, called first.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        directory: str | os.PathLike[str],
        *,
        component: str = "model",
        storage_options: Mapping[str, Any] | None = None,
        on_event: Any = None,
    ) -> None:
        self._root, self._directory, self._component = root, Path(directory), component
        self._options, self._next = storage_options, on_event
        self._thread: ThreadPoolExecutor | None = None

    def __call__(self, event: Event) -> None:
        """Begin a folder when a step is committed; wait for what is begun when the Checkpointer closes."""
        if self._next is not None:
            self._next(event)
        if event.rank != 0:
            return
        if event.name == Point.COMMITTED and event.step is not None:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="dcpsvc-peft")
            self._thread.submit(self._write, event.step)
        elif event.name == Point.CLOSED:
            self.wait()

    def wait(self) -> None:
        """Until every folder that was begun is whole. Any thread."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            thread.shutdown()

    def _write(self, step: int) -> None:
        name, partial = self._directory / f"step-{step}", self._directory / f".step-{step}.partial"
        try:
            if not name.exists():
                export_peft(Source(open_root(self._root, self._options), step, self._component), partial)
                partial.rename(name)
        except (DcpsvcError, OSError) as err:  # the commit stands, whatever becomes of its folder
            shutil.rmtree(partial, ignore_errors=True)
            logger.warning("step %s: no PEFT folder was made: %s", step, err)

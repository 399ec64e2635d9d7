"""What one rank takes in of a checkpoint: what there is, what of it the state wants, and that read and proven.

Nothing of the state is changed here, and nobody is met. Only :meth:`Intake.read_together` needs the other ranks.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from dcpsvc import progress, together
from dcpsvc.format import manifest as manifests
from dcpsvc.preflight import mebibytes
from dcpsvc.ranks.exchange import Exchange
from dcpsvc.reader import CheckpointReader
from dcpsvc.stages import discover, restore
from dcpsvc.stages.restore import Ready
from dcpsvc.state import app as states
from dcpsvc.state.drift import Drift
from dcpsvc.together import Sources

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from dcpsvc.format.keys import Attempt
    from dcpsvc.format.layout import Layout
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.ranks.job import Job
    from dcpsvc.state.app import AppState
    from dcpsvc.state.drift import Terms
    from dcpsvc.state.saved import Component, Saved, Want
    from dcpsvc.storage.base import Store
    from dcpsvc.storage.scatter import Needs

logger = logging.getLogger("dcpsvc")

_TOLD_NBYTES = 64 << 10


class Chosen(NamedTuple):
    """The checkpoint that all ranks take, and what this one knows of it without asking the run root.

    Attributes:
        attempt: Which.
        manifest: Its text; empty if it is to be read.
        layout: None if it is to be read.
        together: The ranks read together what any of them lacks near by.
    """

    attempt: Attempt
    manifest: str = ""
    layout: Layout | None = None
    together: bool = False


class Taken(NamedTuple):
    """What one rank has taken in, so far.

    Attributes:
        reader: Of the checkpoint.
        components: Of the state, that are loaded.
        saved: The checkpoint as they see it.
        wants: What they want of it.
        versions: What it says about its origin.
        lacking: Something that they want is not near by, and the ranks read that together.
        ready: What is read and proven.
        received_nbytes: Of that, from other ranks.
    """

    reader: CheckpointReader
    components: dict[str, Component]
    saved: Saved
    wants: list[Want]
    versions: dict[str, str]
    lacking: bool
    ready: Ready = Ready([])
    received_nbytes: int = 0

    @property
    def sources(self) -> Sources:
        """Where its bytes came from."""
        near, far = self.reader.nbytes_read
        return Sources(near, self.received_nbytes, far)


@dataclass(frozen=True, slots=True)
class Intake:
    """Of one rank. Any thread.

    Attributes:
        job: The ranks.
        stores: Where the files are, nearest first; the run root is the last.
        state: What wants them.
        folder: On a disk of this node, for what may not be in the state yet; None: it waits in memory.
    """

    job: Job
    stores: Sequence[Store]
    state: AppState
    folder: Path | None

    def look(self, chosen: Chosen, terms: Terms) -> Taken:
        """What there is, and what of it this rank wants.

        Raises:
            FormatError: The manifest, the layout or a JSON value is damaged.
            StateError: The state does not fit.
            StoreError: The run root does not answer.
        """
        found = self._manifest(chosen)
        layout = chosen.layout or discover.read_layout(self.stores[-1], found)
        reader = CheckpointReader(found, layout, self.stores, once=chosen.together)
        saved = replace(
            reader.saved_for(self.job.rank),
            ranks=self.job.world_size,
            documents_of=reader.documents,
            terms=terms,
            drift=Drift(chosen.attempt.step, terms.strict),
        )
        components = self.state.chosen(saved)
        wants = states.wants(components, saved)
        return Taken(reader, components, saved, wants, found.versions, chosen.together and reader.lacks(wants))

    def _manifest(self, chosen: Chosen) -> Manifest:
        if chosen.manifest:
            return manifests.loads(chosen.attempt.manifest, chosen.manifest.encode())
        return discover.read_manifest(self.stores[-1], chosen.attempt)

    def read(self, looked: Taken) -> Taken:
        """All of it read and proven, by this rank alone. Raises what :func:`~dcpsvc.stages.restore.prepare` does."""
        return self._prepared(looked)

    def read_together(self, looked: Taken, place: str, timeout_s: float) -> Taken:
        """Likewise, with all other ranks at the same time; raises what :func:`together.read` does, too.

        Args:
            looked: What there is.
            place: Where they find each other.
            timeout_s: Longest wait for a peer.
        """
        job, received = self.job, 0

        def bring(needs: dict[int, Needs]) -> None:
            nonlocal received
            namespace = f"{job.incarnation}/{place}"
            exchange = Exchange(rank=job.rank, world_size=job.world_size, namespace=namespace, timeout_s=timeout_s)
            received = together.read(exchange, job.rank, looked.reader.shards, needs, self._watch)

        return self._prepared(looked, bring)._replace(received_nbytes=received)

    def _prepared(self, looked: Taken, bring: restore.Bring | None = None) -> Taken:
        ready = restore.prepare(looked.reader, looked.wants, self.folder, self._watch, bring)
        if ready.why:
            logger.log(
                logging.WARNING if self.folder or self.job.coordinates else logging.DEBUG,
                "rank %s holds %s of the state twice in memory until every rank has proven what it read: %s",
                self.job.rank, mebibytes(ready.held_nbytes), ready.why,
            )  # fmt: skip
        return looked._replace(ready=ready)

    def _watch(self, total_nbytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """One rank tells how far it is, with what all do at the same time."""
        return progress.shown("resuming", total_nbytes, quiet=not self.job.coordinates, say=logger.info)


def told(found: Manifest | None) -> str:
    """A manifest for all ranks, so that none of them has to fetch it; empty where it is large for the ranks' store."""
    text = found.dumps().decode() if found is not None else ""
    return text if len(text) <= _TOLD_NBYTES else ""

"""How a save is staged: into an arena beside the training, into one at once, or not at all; and the memory for it."""

from __future__ import annotations

import functools
import logging
import time
from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from dcpsvc import copying, preflight
from dcpsvc.arena import Arena
from dcpsvc.arenas import Arenas
from dcpsvc.devicecopy import Devices
from dcpsvc.errors import TornSnapshotError
from dcpsvc.holdback import Holdback
from dcpsvc.stages.stage import Snapshot
from dcpsvc.stages.stream import Stream
from dcpsvc.state.dtypes import dtype_of
from dcpsvc.state.replicas import Copied, Replicas
from dcpsvc.witness import Watch, is_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.optim import Optimizer

    from dcpsvc.config import Options
    from dcpsvc.copying import Copying
    from dcpsvc.outline import Outline
    from dcpsvc.pending import PendingSave
    from dcpsvc.ranks.job import Job
    from dcpsvc.save import Save
    from dcpsvc.stages.shard import DcpShard
    from dcpsvc.state.collected import Collected

logger = logging.getLogger("dcpsvc")


class Staging:
    """Makes snapshots, in arenas of its own. Training thread.

    Args:
        job: The ranks.
        options: How.
        held: Hears how many seconds an optimizer waited for the copy of a save.

    Attributes:
        arenas: The memory.
        overlaps: Large tensors are copied while training goes on.
    """

    def __init__(self, job: Job, options: Options, held: Callable[[Save, float], None]) -> None:
        spare = 1  # for a save after one that the disk has not taken in time
        self.arenas = Arenas(options.staging_nbytes, options.max_inflight + spare, preflight.memory_share_nbytes)
        self.overlaps = options.staging == "overlap"
        self._job, self._holdback, self._held = job, Holdback(), held
        self._watch = Watch.EVERY_BYTE if options.verify_staging else Watch.CLOSELY
        self._copier = copying.thread()
        self._devices = Devices() if torch.accelerator.is_available() else None
        self._copying: Copying | None = None
        self._has_warned = False

    @property
    def held_s(self) -> float:
        """What optimizers waited for copies, all saves together."""
        return self._holdback.waited_s

    def look_back(self) -> None:
        """Whoever changes tensors behind their optimizer's back does so again: better wait for the copy from now on."""
        if self._copying is not None and isinstance(self._copying.error, TornSnapshotError) and self.overlaps:
            self.overlaps = False
            logger.warning(
                'rank %s: as with staging="block", save() returns when all is copied, from now on: %s',
                self._job.rank,
                self._copying.error,
            )

    def look_for_device(self, collected: Collected) -> None:
        """Memory is pinned for the accelerator the state is on, if it is on one."""
        if self._devices is not None:
            tensors = (item.tensor for item in collected.items.values())
            self.arenas.device = next((tensor.device for tensor in tensors if not tensor.is_cpu), None)

    def staged(self, save: Save, outline: Outline, collected: Collected) -> Snapshot | Stream:
        """Where there is memory for a copy, one is made; else the state itself has to hold still.

        Raises:
            TimeoutError: The saves before are still being written, all that may be.
        """
        self.look_for_device(collected)
        arena = self.arenas.take(outline.nbytes)
        if self._job.world_size > 1:
            later = isinstance(arena, Arena)
            copied = _copied(outline, collected) if later else {}
            save.replicas = Replicas(collected, copied, later=later, guarded=self.overlaps)
        if not isinstance(arena, Arena):
            return self._streamed(outline, arena.spare_nbytes)
        snapshot = arena.reader = Snapshot(
            outline,
            arena,
            self._copier,
            beside=save.replicas.tasks if save.replicas else [],
            on_copied=functools.partial(_has_copied, save.pending, time.perf_counter()),
            watch=self._watch,
            devices=self._devices,
            waits=not self.overlaps,
        )
        snapshot.hasher = save.replicas
        return snapshot

    def begun(self, save: Save, staged: Snapshot | Stream, shard: DcpShard, optimizers: Sequence[Optimizer]) -> None:
        """DCP has it: what is not copied yet is, before these optimizers step."""
        if isinstance(staged, Snapshot):
            staged.reader, save.copying, self._copying = shard, staged.copying, staged.copying
            save.image = staged.image
            self._holdback.watch(optimizers, staged.copying, functools.partial(self._held, save))

    def wait_copied(self) -> None:
        """Until nothing of the state is being read: it is about to be changed."""
        self._holdback.wait()

    def close(self) -> None:
        """Nothing is going to be staged any more."""
        self._holdback.close()
        self._copier.shutdown(wait=self._copying is None or self._copying.ended)  # never for memory that is not given
        self.arenas.close()

    def _streamed(self, outline: Outline, spare_nbytes: int) -> Stream:
        window_nbytes = preflight.window_nbytes(spare_nbytes)
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "rank %s: its shard of %s does not fit into the %s of memory there is for staging, so a save writes it "
                "through a window of %s while training waits; give the machine more memory, or raise staging_nbytes=",
                self._job.rank,
                *map(preflight.mebibytes, (outline.nbytes, spare_nbytes, window_nbytes)),
            )
        return Stream(outline, window_nbytes)


def _copied(outline: Outline, collected: Collected) -> dict[str, list[Copied]]:
    """Where the large tensors, or parts of them, are going to be whose bytes are the file's."""
    found: dict[str, list[Copied]] = defaultdict(list)
    for number in (large.number for large in outline.large):
        piece, source = outline.placement.pieces[number], outline.sources[number]
        tensor = collected.items[piece.key].tensor
        target = torch.empty(0, dtype=dtype_of(piece.dtype), device="cpu")
        if source.is_cpu and tensor.is_contiguous() and is_plain(source, target):
            begin = source.data_ptr() - tensor.data_ptr()
            found[piece.key].append(Copied(begin, begin + piece.nbytes, outline.placement.begins[number]))
    return found


def _has_copied(pending: PendingSave, began: float) -> None:
    """Any thread."""
    pending.timings.stage_s = time.perf_counter() - began
    pending.resolve(pending.staged)

"""This rank's files on their way to the run root; what the newest commit has of them need not be sent again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcpsvc import fence
from dcpsvc.errors import FencedError, RankFailure
from dcpsvc.recovery import known_shard
from dcpsvc.stages import upload
from dcpsvc.storage import wholefile

if TYPE_CHECKING:
    from dcpsvc.catalog import Catalog
    from dcpsvc.format.manifest import Manifest, ShardRecord
    from dcpsvc.ranks.job import Job
    from dcpsvc.settling import OpenRun
    from dcpsvc.storage.cargo import Carried


class Carrier:
    """Of one rank.

    Args:
        job: The ranks.
        run: Its tiers.
        catalog: What is committed.
    """

    def __init__(self, job: Job, run: OpenRun, catalog: Catalog) -> None:
        self._job, self._run, self._catalog = job, run, catalog
        self._committed: upload.Known | None = None

    def carry(self, manifest: Manifest, layout: Any, image: memoryview | None) -> Carried | RankFailure:
        """To the run root, unless that has another owner by now. Raises what :func:`upload.upload_shard` does."""
        epoch, remote = self._run.settled.epoch, self._run.remote
        record = manifest.shards[self._job.rank]
        if self._job.coordinates and (theirs := fence.successor(remote, epoch)):
            return RankFailure(self._job.rank, "upload", FencedError.__name__, fence.replaced(epoch, theirs))
        carried = upload.upload_shard(remote, record, self._run.local_path / record.path, self._known(), image)
        if self._job.coordinates:
            for file in manifest.adapter.files if manifest.adapter else ():
                wholefile.put(remote, file, self._run.local_path / file.path)
            upload.put_layout(remote, layout)
        return carried

    def committed(self, record: ShardRecord) -> None:
        """This rank's shard is part of the newest commit now."""
        self._committed = upload.Known(record, [self._run.local])

    def _known(self) -> upload.Known | None:
        """This rank's shard of the newest commit: retention lets that one stay."""
        if self._committed is None and (newest := self._catalog.newest) is not None:
            self._committed = known_shard(self._run, self._catalog.attempts[newest], self._job.rank)
        return self._committed

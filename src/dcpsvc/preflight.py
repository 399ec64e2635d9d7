"""What a save needs against what the machine has: host memory for the arena, room on the local tier's disk.

Memory is this rank's own affair: a shard that does not fit is written straight from the state. Disks are shared, so
their needs are added up over the ranks and all ranks hear the same answer.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from dcpsvc import whereabouts
from dcpsvc.format import shardfile
from dcpsvc.format.digest import BLOCK_NBYTES, table_nbytes
from dcpsvc.format.keys import DATA, Attempt, attempt_below, writer_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from dcpsvc.format.shardfile import Piece
    from dcpsvc.storage.base import Store

MIN_STAGING_NBYTES = BLOCK_NBYTES
"""The least a shard can be written through: one block of the checksum table."""

_MAX_WINDOW_NBYTES = 16 << 20
_USABLE = 0.9
"""The rest stays for what the training itself asks for next."""

_MEMINFO = Path("/proc/meminfo")
_MEMBERSHIP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


# --- memory ---------------------------------------------------------------------------------------


def window_nbytes(spare_nbytes: int) -> int:
    """How much of a shard to hold at once while it is written from the state: whole blocks, at least one."""
    return max(MIN_STAGING_NBYTES, min(spare_nbytes, _MAX_WINDOW_NBYTES) // BLOCK_NBYTES * BLOCK_NBYTES)


def memory_share_nbytes(ranks: int | None = None) -> int | None:
    """What one rank may take of this machine's free memory; None where the machine does not say.

    Args:
        ranks: How many share the machine; default: ``$LOCAL_WORLD_SIZE``, as torchrun sets it, else 1.
    """
    free = free_memory_nbytes()
    return None if free is None else int(free * _USABLE) // (ranks or ranks_here(os.environ))


def ranks_here(environ: Mapping[str, str]) -> int:
    """Ranks of this job on this machine, as far as the launcher says."""
    said = environ.get("LOCAL_WORLD_SIZE", "")
    return max(int(said), 1) if said.isdecimal() else 1


def free_memory_nbytes(
    *, meminfo: Path = _MEMINFO, membership: Path = _MEMBERSHIP, cgroups: Path = _CGROUPS
) -> int | None:
    """What could be allocated without swapping: the machine's, or less if a control group (v1, v2) has less left.

    Args:
        meminfo: As ``/proc/meminfo``.
        membership: As ``/proc/self/cgroup``.
        cgroups: Where control groups are mounted.
    """
    available = _table(meminfo).get("MemAvailable:")
    found = [] if available is None else [available * 1024]
    for version in _VERSIONS:
        found += [room for folder in version.folders(membership, cgroups) if (room := version.room(folder)) is not None]
    return min(found, default=None)


@dataclass(frozen=True, slots=True)
class _Version:
    """Where one version of control groups keeps its numbers."""

    mounts: tuple[str, ...]
    controller: str
    limit: str
    usage: str
    cache: str

    def folders(self, membership: Path, cgroups: Path) -> Iterator[Path]:
        """The group of this process and all above it, each of which may have a limit.

        In a container the path may be the host's; then only the mount point is there, and it is the container's group.
        """
        for line in _lines(membership):
            _, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if self.controller in controllers.split(",") and ".." not in path:
                for mount in self.mounts:
                    group = cgroups / mount / path.lstrip("/")
                    yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(cgroups / mount))

    def room(self, folder: Path) -> int | None:
        """What is left of a group's limit. Page cache that nobody uses does not count as used."""
        limit, usage = _number(folder / self.limit), _number(folder / self.usage)
        if limit is None or usage is None:
            return None
        return max(0, limit - max(0, usage - _table(folder / "memory.stat").get(self.cache, 0)))


_VERSIONS = (
    _Version((".", "unified"), "", "memory.max", "memory.current", "inactive_file"),
    _Version(("memory",), "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


# --- disk -----------------------------------------------------------------------------------------


class Size(NamedTuple):
    """What one rank's part of a save takes on disks.

    Attributes:
        shard_nbytes: Its shard, on its own node's.
        folder_nbytes: What of that shard the folder of PEFT repeats, on rank 0's.
    """

    shard_nbytes: int
    folder_nbytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskNeed:
    """What one rank is about to write, and the disk it goes to.

    Attributes:
        rank: Global rank.
        disk: Tells file systems apart, also across machines.
        path: Where the local tier is.
        need_nbytes: Of everything that is not written yet.
        free_nbytes: Room this user has there; None where the file system does not say.
        folder_nbytes: What folders of PEFT that are not made yet repeat of this rank's shards, on rank 0's disk.
    """

    rank: int
    disk: str
    path: str
    need_nbytes: int
    free_nbytes: int | None
    folder_nbytes: int = 0

    @classmethod
    def measure(cls, path: Path, *, rank: int, size: Size) -> Self:
        """As of now.

        Raises:
            OSError: ``path`` is not there.
        """
        disk, free_nbytes = whereabouts.file_system(path), _free_nbytes(path)
        need_nbytes, folder_nbytes = size
        return cls(
            rank=rank, disk=disk, path=str(path), need_nbytes=need_nbytes, free_nbytes=free_nbytes,
            folder_nbytes=folder_nbytes,
        )  # fmt: skip

    def again(self) -> Self:
        """The same need, against the room of now."""
        return replace(self, free_nbytes=_free_nbytes(Path(self.path)))

    def to_json(self) -> dict[str, Any]:
        """For the other ranks."""
        return asdict(self)

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        """What another rank's :meth:`to_json` gave."""
        return cls(**said)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """A disk without enough room for what its ranks are about to write: shards, and on rank 0's the folder of PEFT."""

    path: str
    ranks: tuple[int, ...]
    need_nbytes: int
    free_nbytes: int
    folder_nbytes: int = 0

    @property
    def missing_nbytes(self) -> int:
        """How much must go before it fits."""
        return self.need_nbytes - self.free_nbytes

    def __str__(self) -> str:
        folder = f", {mebibytes(self.folder_nbytes)} of it for the adapter folder" if self.folder_nbytes else ""
        return (
            f"{self.path} has {mebibytes(self.free_nbytes)} free and ranks {self.ranks} need "
            f"{mebibytes(self.need_nbytes)}{folder}: {mebibytes(self.missing_nbytes)} short"
        )


def shortage(needs: Iterable[DiskNeed]) -> list[Shortage]:
    """The disks without enough room for all ranks that write to them, by their first rank. Pure."""
    by_disk: dict[str, list[DiskNeed]] = defaultdict(list)
    for need in sorted(needs, key=lambda need: need.rank):
        by_disk[need.disk].append(need)
    folder_nbytes = sum(need.folder_nbytes for sharing in by_disk.values() for need in sharing)
    found = (_room(sharing, folder_nbytes if sharing[0].rank == 0 else 0) for sharing in by_disk.values())
    return [room for room in found if room.missing_nbytes > 0]


def _room(sharing: Sequence[DiskNeed], folder_nbytes: int) -> Shortage:
    """Of one disk what its ranks need against what it has, short or not."""
    needed = sum(need.need_nbytes for need in sharing) + folder_nbytes
    free = min((need.free_nbytes for need in sharing if need.free_nbytes is not None), default=needed)
    ranks = tuple(need.rank for need in sharing)
    return Shortage(
        path=sharing[0].path, ranks=ranks, need_nbytes=needed, free_nbytes=free, folder_nbytes=folder_nbytes
    )


def file_nbytes(body_nbytes: int) -> int:
    """Size of a shard with that body."""
    return body_nbytes + table_nbytes(body_nbytes)


def predicted(pieces: Iterable[Piece], objects_nbytes: int = 0) -> int:
    """Size of the shard that these pieces and documents make; nothing is copied or hashed."""
    return file_nbytes(shardfile.place(pieces).tensors_end + objects_nbytes)


def free_up(
    local: Store, *, rank: int, world_size: int, uploaded: Collection[Attempt], keep: Collection[Attempt]
) -> int:
    """Remove this rank's shards of committed checkpoints from its node's disk, oldest first; says how many bytes.

    They are whole at the run root: all that is lost is a fast restart.

    Args:
        local: The local tier.
        rank: Whose shards; those of ranks beyond the world size are shared out by rank modulo world size.
        world_size: Ranks in the job.
        uploaded: What may go: attempts that are committed for certain.
        keep: What of it stays all the same, such as the newest.

    Raises:
        StoreError: The disk says no; what was removed before is gone.
    """
    files = [(attempt_below(entry.key), writer_of(entry.key), entry) for entry in local.list(DATA)]
    mine = [(attempt, entry) for attempt, of, entry in files if attempt and of is not None and of % world_size == rank]
    freed = 0
    for attempt, entry in sorted(mine):
        if attempt in uploaded and attempt not in keep:
            local.delete(attempt.manifest)
            local.delete(entry.key)
            freed += entry.nbytes
    return freed


def mebibytes(nbytes: int) -> str:
    """For people."""
    return f"{nbytes / 2**20:.1f} MiB"


# --- what the kernel says -------------------------------------------------------------------------


def _free_nbytes(path: Path) -> int | None:
    room = os.statvfs(path)
    return room.f_bavail * room.f_frsize if room.f_blocks else None  # some FUSE file systems say 0 of everything


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text().splitlines()
    return []


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else None


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number, as in ``/proc/meminfo`` and ``memory.stat``."""
    rows = [line.split() for line in _lines(path)]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}

"""What this machine offers to a rank: disk, memory, limits, processors. Needs no torch."""

from __future__ import annotations

import os
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dcpsvc import preflight
from dcpsvc.doctor.findings import Finding, Verdict, broken, ok
from dcpsvc.progress import size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

NETWORKED = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "lustre", "gpfs", "ceph", "beegfs", "afs", "wekafs"}
)
MEMORY = "memory"
_SHM = "/dev/shm"  # noqa: S108 - what is measured
_MIN_SHM_NBYTES = 256 << 20
_MIN_OPEN_FILES, _FEW_OPEN_FILES = 256, 4096
_SLOW_SYNC_S = 0.05
_MANY_DIRTY_NBYTES = 16 << 30
_PROBE_NBYTES = 32 << 20
_SYNCS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What to look at; the defaults are this machine.

    Attributes:
        local: Where the local tier is or will be.
        shard_nbytes: What one rank will write at each save; None if nobody said.
        ranks: Ranks on this machine.
        folder_nbytes: Of the folder of PEFT of each checkpoint, if it goes to this machine's disk.
        keep_local: Checkpoints that stay on the local tier.
        proc: As ``/proc``.
        shm: As ``/dev/shm``.
        masks: Processors of each rank on this machine; empty: only this one's are known.
        cpus: This process's.
    """

    local: Path
    shard_nbytes: int | None = None
    ranks: int = 1
    folder_nbytes: int = 0
    keep_local: int = 2
    proc: Path = Path("/proc")
    shm: Path = Path(_SHM)
    masks: tuple[frozenset[int], ...] = ()
    cpus: frozenset[int] = field(default_factory=lambda: frozenset(os.sched_getaffinity(0)))


def examine(machine: Machine) -> list[Finding]:
    """Look at everything. Writes a small file to the local tier, and removes it."""
    checks: list[tuple[str, Callable[[Machine], Finding], str]] = [
        ("local disk", local_kind, "give local= a directory that this user may write to"),
        ("disk space", disk_space, "give local= a directory that this user may write to"),
        ("fsync", sync_speed, "give local= a directory that this user may write to"),
        (MEMORY, memory, ""),
        (_SHM, shared_memory, "mount a tmpfs at /dev/shm (docker run --shm-size, Kubernetes emptyDir)"),
        ("open files", lambda _: open_files(), ""),
        ("dirty pages", dirty_pages, ""),
        ("processors", processors, ""),
    ]
    return [_checked(name, check, machine, remedy) for name, check, remedy in checks]


def _checked(name: str, check: Callable[[Machine], Finding], machine: Machine, remedy: str) -> Finding:
    try:
        return check(machine)
    except (OSError, ValueError) as err:
        return broken(name, err, remedy)


def local_kind(machine: Machine) -> Finding:
    """Whether ``local`` is really a disk of this node."""
    machine.local.mkdir(parents=True, exist_ok=True, mode=0o700)
    kind, where = mount_of(machine.local, (machine.proc / "self" / "mountinfo").read_text().splitlines())
    found = f"{machine.local}: {kind}, mounted at {where}"
    if kind in NETWORKED or kind.startswith("fuse"):
        remedy = "give local= a disk of this node; every save goes over the network twice here"
        return Finding(name="local disk", verdict=Verdict.WARN, found=found, remedy=remedy)
    if kind == "overlay":
        remedy = "mount a disk of the node into the container and give it as local=: this one is slow and ends with it"
        return Finding(name="local disk", verdict=Verdict.WARN, found=found, remedy=remedy)
    if kind in {"tmpfs", "ramfs"}:
        note = f"{found}: takes memory, and is gone after a reboot"
        return Finding(name="local disk", verdict=Verdict.NOTE, found=note)
    return ok("local disk", found)


def mount_of(path: Path, mounts: Iterable[str]) -> tuple[str, str]:
    """Kind and mount point of the file system a path is on, from the lines of ``mountinfo``."""
    best, kind = "/", "unknown"
    resolved = path.resolve()
    for line in mounts:
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) > 4 and after:  # noqa: PLR2004 - proc(5): the fifth field is the mount point
            point = fields[4].replace("\\040", " ")
            if resolved.is_relative_to(point) and len(point) >= len(best):
                best, kind = point, after.split()[0]
    return kind, best


def disk_space(machine: Machine) -> Finding:
    """Room for what stays there, what is under way, and what is written next."""
    room = os.statvfs(machine.local)
    free = room.f_bavail * room.f_frsize
    if machine.shard_nbytes is None:
        return ok("disk space", f"{size(free)} free at {machine.local}")
    one = machine.shard_nbytes * machine.ranks + machine.folder_nbytes
    need = one * (machine.keep_local + 1)
    folder = f", {size(machine.folder_nbytes)} of each for the adapter folder" if machine.folder_nbytes else ""
    room_for = f"{machine.keep_local + 1} checkpoints of {machine.ranks} ranks need {size(need)}{folder}"
    found = f"{size(free)} free at {machine.local}; {room_for}"
    if free >= need:
        return ok("disk space", found)
    enough = free >= one * 2
    verdict = Verdict.WARN if enough else Verdict.FAIL
    return Finding(name="disk space", verdict=verdict, found=found, remedy="give local= a larger disk, or keep_local=1")


def sync_speed(machine: Machine) -> Finding:
    """How fast the local disk takes bytes for good."""
    machine.local.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryFile(dir=machine.local) as file:
        began = time.perf_counter()
        file.write(b"\x5a" * _PROBE_NBYTES)
        file.flush()
        os.fsync(file.fileno())
        took_s = time.perf_counter() - began
        waits = [_one_sync_s(file.fileno()) for _ in range(_SYNCS)]
    typical_s = statistics.median(waits)
    found = f"{size(_PROBE_NBYTES / took_s)}/s; one small sync takes {typical_s * 1000:.1f} ms"
    if typical_s < _SLOW_SYNC_S:
        return ok("fsync", found)
    return Finding(name="fsync", verdict=Verdict.WARN, found=found, remedy="give local= an NVMe disk or a tmpfs")


def _one_sync_s(fd: int) -> float:
    began = time.perf_counter()
    os.write(fd, b"x")
    os.fsync(fd)
    return time.perf_counter() - began


def memory(machine: Machine) -> Finding:
    """Host memory for the copies."""
    free = preflight.free_memory_nbytes(meminfo=machine.proc / "meminfo")
    if free is None:
        return Finding(name=MEMORY, verdict=Verdict.NOTE, found="this system does not say how much is free")
    if machine.shard_nbytes is None:
        return ok(MEMORY, f"{size(free)} free")
    need = machine.shard_nbytes * machine.ranks * 2
    found = f"{size(free)} free; two copies of the shards of {machine.ranks} ranks take {size(need)}"
    if free >= need:
        return ok(MEMORY, found)
    remedy = "saves are written from the state while training waits: more memory, or more ranks for the same model"
    return Finding(name=MEMORY, verdict=Verdict.WARN, found=found, remedy=remedy)


def shared_memory(machine: Machine) -> Finding:
    """What data loaders share tensors through."""
    room = os.statvfs(machine.shm)
    total, free = room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
    found = f"{size(free)} of {size(total)} free"
    if free >= _MIN_SHM_NBYTES:
        return ok(_SHM, found)
    remedy = "data loader workers die with a bus error here: docker run --shm-size=8g, or an emptyDir of medium Memory"
    return Finding(name=_SHM, verdict=Verdict.WARN, found=found, remedy=remedy)


def open_files(limit: int | None = None) -> Finding:
    """Sockets and files of a rank."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    if soft == resource.RLIM_INFINITY:
        return ok("open files", "no limit")
    if soft >= _FEW_OPEN_FILES:
        return ok("open files", f"at most {soft}")
    verdict = Verdict.FAIL if soft < _MIN_OPEN_FILES else Verdict.WARN
    return Finding(name="open files", verdict=verdict, found=f"at most {soft}", remedy="ulimit -n 65536 before the job")


def dirty_pages(machine: Machine) -> Finding:
    """How much unwritten data the kernel gathers before it makes everybody wait."""
    vm = machine.proc / "sys" / "vm"
    limit = _number(vm / "dirty_bytes")
    if not limit:
        total = next(
            int(line.split()[1]) * 1024
            for line in (machine.proc / "meminfo").read_text().splitlines()
            if line.startswith("MemTotal:")
        )
        limit = total * _number(vm / "dirty_ratio") // 100
    found = f"writers wait once {size(limit)} are unwritten"
    if limit <= _MANY_DIRTY_NBYTES:
        return ok("dirty pages", found)
    remedy = "sysctl vm.dirty_bytes=4294967296: else one sync of anybody may take minutes"
    return Finding(name="dirty pages", verdict=Verdict.NOTE, found=found, remedy=remedy)


def processors(machine: Machine) -> Finding:
    """Copies, checksums and uploads run beside training."""
    count, online = len(machine.cpus), os.cpu_count() or 1
    sharing = [mask for mask in machine.masks or (machine.cpus,) if mask & machine.cpus]
    shared = f"shared by {len(sharing)} of the {machine.ranks} ranks here"
    found = f"{count} of {online} for this process, {shared}"
    if count == 1 and online > 1:
        remedy = "this rank is bound to one processor: torchrun without taskset, srun --cpus-per-task, numactl by node"
        return Finding(name="processors", verdict=Verdict.WARN, found=found, remedy=remedy)
    if any(mask != machine.cpus for mask in sharing):
        remedy = (
            "some of them are another rank's, too: bind each rank to its own, or all ranks of a socket to all of it"
        )
        return Finding(name="processors", verdict=Verdict.WARN, found=found, remedy=remedy)
    if count < 2 * len(sharing):
        remedy = "fewer than two for each rank: checkpoints in the background will slow training down"
        return Finding(name="processors", verdict=Verdict.NOTE, found=found, remedy=remedy)
    return ok("processors", found)


def mask() -> tuple[str, list[int]]:
    """Which machine this is, and the processors of this process, to be told to other ranks."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return boot, sorted(os.sched_getaffinity(0))


def _number(path: Path) -> int:
    return int(path.read_text().split()[0])

"""Where a process is, in names that two processes have in common exactly if they share the thing.

A host's name says nothing of that: containers of one machine have different names, and machines may have the same.
"""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NETWORK = Path("/proc/thread-self/ns/net")


def machine() -> str:
    """One kernel, whatever the containers on it are called."""
    said = ""
    with contextlib.suppress(OSError):
        said = _BOOT_ID.read_text().strip().replace("-", "")
    return said[:16] or platform.node()


def network() -> str:
    """What is reached without a cable: a container may have a network of its own."""
    with contextlib.suppress(OSError):
        return f"{machine()}:{_NETWORK.stat().st_ino}"
    return machine()


def file_system(path: Path) -> str:
    """One mount of a file system: two machines that share one have mounted it twice.

    Raises:
        OSError: ``path`` is not there.
    """
    return f"{machine()}:{path.stat().st_dev}"


def page_cache(path: Path) -> str:
    """The memory in which the kernel keeps what was read there: each mount has its own. Empty if nothing is there."""
    with contextlib.suppress(OSError):
        return file_system(path)
    return ""

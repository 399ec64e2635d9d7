"""Where live jobs listen: one socket per process, in a directory of one user alone. Both sides look here."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import struct
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MAX_PATH_NBYTES = 107
"""What fits into the kernel's ``sun_path`` beside its closing zero. Source: unix(7)."""

_NAME = re.compile(r"(?P<run_id>[0-9a-z][0-9a-z-]{0,62})-(?P<pid>[0-9]{1,10})\.sock")
_BOUND = Path("/proc/net/unix")
_CREDENTIALS = struct.Struct("3i")
_BACKLOG = 64


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """The socket of one process of a job.

    Attributes:
        run_id: Of the run root.
        pid: The process that listens, as it numbers itself.
        path: Where.
    """

    run_id: str
    pid: int
    path: Path


def listen(run_id: str) -> tuple[socket.socket, Place]:
    """A listening socket that only this user can reach.

    Raises:
        OSError: None can be made; says why for each directory that was tried.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        raise OSError("this system does not tell who connects to a socket")
    reasons: list[str] = []
    for directory in _directories():
        place = Place(run_id, os.getpid(), directory / f"{run_id}-{os.getpid()}.sock")
        try:
            _make_own(directory)
            _sweep(directory)
            return _bind(place.path), place
        except OSError as err:
            reasons.append(f"{place.path}: {err.strerror or err}")
    raise OSError("; ".join(reasons))


def found(run_id: str | None = None) -> list[Place]:
    """The sockets of a run on this host, or of all runs of this user. Those of dead processes may be among them."""
    places: set[Place] = set()
    for directory in {*_directories(), *_bound_directories()}:
        if _trusted(directory):
            places.update(place for place in _listing(directory) if run_id in {None, place.run_id})
    return sorted(places)


def connect(place: Place, timeout_s: float) -> socket.socket | None:
    """A connection to the process; None if it is dead: then its socket is removed.

    Raises:
        OSError: It is alive and cannot be reached, or is another user's.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)
    try:
        connection.connect(str(place.path))
        _check_permitted(connection, place.path)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        if not _alive(place.pid):  # a live one is between bind and listen, or has just ended
            remove(place.path)
        return None
    except BaseException:  # whatever it is, the descriptor is not lost
        connection.close()
        raise
    return connection


def remove(path: Path) -> None:
    """Nobody listens there any more."""
    with suppress(OSError):
        path.unlink()


def permitted(connection: socket.socket) -> bool:
    """Whether the process at the other end is this user's, or root's, by the word of the kernel."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(credentials)
    return user in {0, os.geteuid()}


def _check_permitted(connection: socket.socket, path: Path) -> None:
    if not permitted(connection) and os.geteuid() != 0:
        raise PermissionError(errno.EPERM, "another user listens there", str(path))


def _directories() -> list[Path]:
    """Where a job of this user listens, best first: the runtime directory, if it is ours, and the temporary one."""
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nonexistent")
    temporary = Path(tempfile.gettempdir()) / f"dcpsvc-control-{os.geteuid()}"
    try:
        ours = runtime.is_absolute() and runtime.stat().st_uid == os.geteuid()
    except OSError:
        ours = False
    return [runtime / "dcpsvc", temporary] if ours else [temporary]


def _bound_directories() -> set[Path]:
    """Where processes of this host do listen: a job may have another ``TMPDIR`` than this shell."""
    try:
        lines = _BOUND.read_text(errors="replace").splitlines()
    except OSError:
        return set()
    paths = [Path(line[line.index("/") :]) for line in lines if "/" in line]
    return {path.parent for path in paths if path.parent.name.startswith("dcpsvc") and _NAME.fullmatch(path.name)}


def _make_own(directory: Path) -> None:
    """Make it, or make sure that it is a directory of this user that nobody else can enter.

    Raises:
        OSError: It is not, or is a symlink.
    """
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    if directory.is_symlink():
        raise OSError(errno.ELOOP, "the directory is a symlink", str(directory))
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        about = os.fstat(descriptor)
        if about.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, f"the directory belongs to user {about.st_uid}", str(directory))
        if stat.S_IMODE(about.st_mode) != 0o700:  # noqa: PLR2004 - ours alone
            os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)


def _trusted(directory: Path) -> bool:
    try:
        about = directory.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(about.st_mode) and (about.st_uid == os.geteuid() or os.geteuid() == 0)


def _bind(path: Path) -> socket.socket:
    if (nbytes := len(os.fsencode(path))) > MAX_PATH_NBYTES:
        raise OSError(errno.ENAMETOOLONG, f"its {nbytes} bytes are more than the {MAX_PATH_NBYTES} a socket may have")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), 0o600)  # before the bind, so that the file is never anything else
        listener.bind(str(path))
        listener.listen(_BACKLOG)
        listener.settimeout(0.0)
    except BaseException:  # whatever it is, the descriptor is not lost
        listener.close()
        raise
    return listener


def _sweep(directory: Path) -> None:
    """Remove the sockets of dead processes; one of our own number is from a process before us."""
    for place in _listing(directory):
        with suppress(OSError):
            if (connection := connect(place, 0.0)) is not None:
                connection.close()
            elif place.pid == os.getpid():
                remove(place.path)


def _listing(directory: Path) -> list[Place]:
    try:
        names = [path.name for path in directory.iterdir()]
    except OSError:
        return []
    matches = [match for name in names if (match := _NAME.fullmatch(name))]
    return [Place(match["run_id"], int(match["pid"]), directory / match[0]) for match in matches]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

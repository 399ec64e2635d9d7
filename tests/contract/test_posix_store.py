"""What only a directory can do to us: links, permissions, killed writers, leftovers."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_contract import MIB, local_file

import dcpsvc
from dcpsvc.errors import (
    StoreAccessError,
    StoreError,
    StoreFullError,
    StoreNotFoundError,
    StoreObjectError,
    StoreUnavailableError,
)
from dcpsvc.storage.oserror import from_os_error
from dcpsvc.storage.posix import PosixStore

SOURCE = str(Path(dcpsvc.__file__).parents[1])


def child(code: str, *args: str) -> subprocess.Popen[str]:
    """A process of its own that runs ``code``; it hears nothing more when its stdin is closed."""
    env = {**os.environ, "PYTHONPATH": SOURCE}
    return subprocess.Popen(
        [sys.executable, "-c", code, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )


def everything_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


HALF_WAY = """
import sys
from pathlib import Path
from dcpsvc.storage.posix import PosixStore

def progress(nbytes):
    print("half way", flush=True)
    sys.stdin.read()

PosixStore(Path(sys.argv[1])).put_file("data/step/rank-00000", Path(sys.argv[2]), progress=progress)
"""


def test_a_writer_killed_half_way_leaves_no_visible_object(tmp_path: Path) -> None:
    source, root = local_file(tmp_path, 20 * MIB), tmp_path / "root"
    with child(HALF_WAY, str(root), str(source)) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == "half way\n"
        writer.send_signal(signal.SIGKILL)
    assert writer.returncode == -signal.SIGKILL
    store = PosixStore(root)
    assert store.list("") == []
    with pytest.raises(StoreNotFoundError):
        store.size("data/step/rank-00000")
    assert [path.name[:5] for path in (root / "data" / "step").iterdir()] == [".tmp-"]
    store.put_file("data/step/rank-00000", source)
    assert store.read("data/step/rank-00000", 0, 20 * MIB) == source.read_bytes()


UNPRIVILEGED = """
import os, sys
from pathlib import Path
from dcpsvc.errors import StoreAccessError
from dcpsvc.storage.posix import PosixStore

if os.geteuid() == 0:
    os.seteuid(65534)
store = PosixStore(Path(sys.argv[1]))
for call in (
    lambda: store.create("manifests/b", b"x"),
    lambda: store.put("manifests/b", b"x"),
    lambda: store.put("elsewhere/b", b"x"),
    lambda: store.delete("manifests/a"),
):
    try:
        call()
    except StoreAccessError as err:
        print(err.reason)
"""


def test_a_directory_one_may_not_write_to_is_an_access_error(tmp_path: Path) -> None:
    root = tmp_path / "root"
    PosixStore(root).put("manifests/a", b"a")
    for folder in (root / "manifests", root):
        folder.chmod(0o555)
    with child(UNPRIVILEGED, str(root)) as process:
        out, _ = process.communicate()
    for folder in (root, root / "manifests"):
        folder.chmod(0o755)
    assert process.returncode == 0
    assert out.splitlines() == ["permission denied; this user may not do that here"] * 4
    assert everything_below(root) == ["manifests", "manifests/a"]


def test_making_a_store_and_reading_it_makes_no_directory(tmp_path: Path) -> None:
    store = PosixStore(tmp_path / "root")
    assert store.list("manifests/") == []
    store.delete("manifests/a")
    with pytest.raises(StoreNotFoundError):
        store.size("manifests/a")
    assert everything_below(tmp_path) == []


def test_a_relative_root_stays_where_it_was_when_the_process_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = PosixStore(Path("root"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.put("run.json", b"x")
    assert everything_below(tmp_path) == ["elsewhere", "root", "root/run.json"]


def test_unfinished_files_are_never_listed(tmp_path: Path) -> None:
    store = PosixStore(tmp_path)
    store.put("data/step/x", b"x")
    (tmp_path / "data" / "step" / ".tmp-0123").write_bytes(b"half")
    (tmp_path / ".tmp-4567").mkdir()
    (tmp_path / ".tmp-4567" / "y").write_bytes(b"half")
    assert [entry.key for entry in store.list("")] == ["data/step/x"]


def test_a_failed_write_leaves_no_file_at_all(tmp_path: Path) -> None:
    def fail(_: int) -> None:
        raise KeyboardInterrupt

    source, root = local_file(tmp_path, MIB), tmp_path / "root"
    with pytest.raises(KeyboardInterrupt):
        PosixStore(root).put_file("data/step/x", source, progress=fail)
    assert everything_below(root) == ["data", "data/step"]


def test_deleting_the_last_object_removes_its_folder_but_no_top_level_one(tmp_path: Path) -> None:
    store = PosixStore(tmp_path)
    for key in ("data/step/x", "data/step/y", "manifests/a", "run.json"):
        store.put(key, b"x")
    store.delete("data/step/x")
    assert (tmp_path / "data" / "step").is_dir()
    for key in ("data/step/y", "manifests/a", "run.json"):
        store.delete(key)
    assert everything_below(tmp_path) == ["data", "manifests"]


def test_writers_and_deleters_of_one_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    store, start = PosixStore(tmp_path), threading.Barrier(8)

    def work(worker: int) -> None:
        start.wait()
        for _ in range(50):
            store.put(f"data/step/{worker}", b"x")
            store.list("data/step/")
            store.delete(f"data/step/{worker}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert store.list("") == []


@pytest.mark.parametrize("operation", ["create", "put", "get", "read", "size", "delete", "list"])
def test_a_symbolic_link_does_not_lead_out_of_the_root(tmp_path: Path, operation: str) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "secret").write_bytes(b"secret")
    root.mkdir()
    (root / "data").symlink_to(outside)
    store, key = PosixStore(root), "data/deep/secret"
    calls = {
        "create": lambda: store.create("data/deep/new", b"x"),
        "put": lambda: store.put("data/deep/new", b"x"),
        "get": lambda: store.get(key, max_nbytes=100),
        "read": lambda: store.read(key, 0, 1),
        "size": lambda: store.size(key),
        "delete": lambda: store.delete(key),
        "list": lambda: store.list("data/deep/"),
    }
    with pytest.raises(StoreError, match="out of the run root"):
        calls[operation]()
    assert everything_below(outside) == ["deep", "deep/secret"]


def test_an_object_that_is_a_symbolic_link_is_neither_listed_nor_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    store = PosixStore(tmp_path / "root")
    store.put("data/step/x", b"x")
    (tmp_path / "root" / "data" / "step" / "y").symlink_to(tmp_path / "secret")
    assert [entry.key for entry in store.list("data/step/")] == ["data/step/x"]
    with pytest.raises(StoreError, match="symbolic link"):
        store.get("data/step/y", max_nbytes=100)


def test_a_root_that_is_itself_a_link_works(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "real")
    store = PosixStore(tmp_path / "root")
    store.put("data/step/x", b"x")
    assert [entry.key for entry in store.list("data/step/")] == ["data/step/x"]
    assert everything_below(tmp_path / "real") == ["data", "data/step", "data/step/x"]


def test_a_pipe_among_the_objects_does_not_hang_its_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="not a regular file"):
        PosixStore(tmp_path).get("pipe", max_nbytes=10)
    assert PosixStore(tmp_path).list("") == []


TOO_LARGE = """
import resource, signal, sys
from pathlib import Path
from dcpsvc.errors import StoreError
from dcpsvc.storage.posix import PosixStore

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    PosixStore(Path(sys.argv[1])).put("data/step/x", b"x" * 2000)
except StoreError as err:
    print(type(err).__name__, err.reason)
"""


def test_a_write_that_runs_out_of_room_leaves_nothing(tmp_path: Path) -> None:
    with child(TOO_LARGE, str(tmp_path)) as process:
        out, _ = process.communicate()
    assert out.startswith("StoreError the file would be larger")
    assert everything_below(tmp_path) == ["data", "data/step"]


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOENT, StoreNotFoundError),
        (errno.EACCES, StoreAccessError),
        (errno.EPERM, StoreAccessError),
        (errno.EROFS, StoreAccessError),
        (errno.ENOSPC, StoreFullError),
        (errno.EDQUOT, StoreFullError),
        (errno.EIO, StoreUnavailableError),
        (errno.ESTALE, StoreUnavailableError),
        (errno.ETIMEDOUT, StoreUnavailableError),
        (errno.EAGAIN, StoreUnavailableError),
        (errno.ECONNRESET, StoreUnavailableError),
        (errno.ENOTDIR, StoreObjectError),
        (errno.EINVAL, StoreError),
    ],
)
def test_each_failure_of_the_system_has_its_type_and_a_sentence(number: int, kind: type[StoreError]) -> None:
    error = from_os_error("put", "run.json", OSError(number, os.strerror(number)))
    assert type(error) is kind
    assert " " in error.reason
    assert str(error).startswith("put run.json: ")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(key=st.text(alphabet="abc./\\\0~ é-", max_size=12))
def test_any_key_is_refused_or_comes_back_from_within_the_root(tmp_path: Path, key: str) -> None:
    store = PosixStore(tmp_path / "root")
    try:
        store.put(key, b"x")
    except StoreError:
        assert store.list("") == []
    else:
        assert store.list("") == [(key, 1)]
        store.delete(key)
    assert {path.name for path in tmp_path.iterdir()} <= {"root"}


def test_what_a_killed_writer_left_goes_and_what_somebody_writes_now_stays(tmp_path: Path) -> None:
    store = PosixStore(tmp_path)
    old = tmp_path / "data" / "step-000000000001.cafe-0" / ".tmp-dead"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"half")
    os.utime(old, ns=(0, 0))
    store.put("probes/now", b"")
    new = tmp_path / "manifests" / ".tmp-alive"
    new.parent.mkdir()
    new.write_bytes(b"half")

    store.remove_unfinished(before="probes/now")

    assert not old.parent.exists()
    assert new.exists()


def test_what_killed_writers_left_is_counted_and_only_what_is_older_than_a_time_goes(tmp_path: Path) -> None:
    store = PosixStore(tmp_path)
    old, new = tmp_path / ".tmp-old", tmp_path / ".tmp-new"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    assert store.remove_unfinished(2000.0, dry_run=True) == 1
    assert old.exists()
    assert store.remove_unfinished(2000.0) == 1
    assert not old.exists()
    assert new.exists()


def test_folders_of_attempts_that_a_killed_writer_left_empty_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    store = PosixStore(tmp_path)
    old, full, new = (tmp_path / "data" / name for name in ("step-1.dead", "step-2.whole", "step-3.begun"))
    for folder in (old, full, new):
        folder.mkdir(parents=True)
    (full / "rank-00000.safetensors").write_bytes(b"x")
    for folder in (old, full):
        os.utime(folder, (1000.0, 1000.0))
    os.utime(new, (3000.0, 3000.0))
    store.remove_unfinished(2000.0, dry_run=True)
    assert old.is_dir()
    store.remove_unfinished(2000.0)
    assert [folder.is_dir() for folder in (old, full, new)] == [False, True, True]

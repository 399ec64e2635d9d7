"""A verification that was cut short reads only the rest, and believes nothing that may have changed since."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dcpsvc
from dcpsvc.format import manifest as manifests
from dcpsvc.storage.posix import PosixStore
from dcpsvc.tools import verifying
from dcpsvc.tools.verifyjournal import Journal, _name


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Five checkpoints, one shard of 1.2 MB each."""
    folder = tmp_path_factory.mktemp("run")
    with dcpsvc.Checkpointer(folder / "root", {"x": torch.rand(300_000)}, local=folder / "local") as ckpt:
        for step in range(1, 6):
            ckpt.state["x"] += 1
            ckpt.save(step).wait(30)
    return folder / "root"


class Counting(PosixStore):
    """Counts what is read of shards; its process is killed when it begins to read the n-th."""

    def __init__(self, root: Path, kill_at: int = 10**6) -> None:
        super().__init__(root)
        self.bodies: list[str] = []
        self._kill_at = kill_at

    def stream(self, key, begin, end, look):
        self.bodies.append(key)
        if len({*self.bodies}) > self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().stream(key, begin, end, look)


def verify(store: PosixStore, *, resume: bool) -> list[verifying.Finding]:
    with Journal(store.url, resume=resume) as journal:
        return verifying.verify(store, verifying.commits(store, None), at_once=1, journal=journal)


def killed(root: Path, at: int) -> None:
    code = f"""
        from pathlib import Path
        from tests.unit.test_verify_resumes import Counting, verify
        verify(Counting(Path({str(root)!r}), {at}), resume=False)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=False, cwd=Path(__file__).parents[2], capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dcpsvc"


def read_again(root: Path, *, resume: bool = True) -> int:
    store = Counting(root)
    assert all(finding.intact for finding in verify(store, resume=resume))
    return len({*store.bodies})


def test_killed_after_three_of_five_shards_it_reads_the_other_two(root, cache):
    killed(root, 3)
    assert len(list(cache.iterdir())) == 1
    assert read_again(root) == 2
    assert not list(cache.iterdir()), "it has come to its end"
    assert read_again(root) == 5, "and proves anew from then on"


def test_without_being_asked_it_believes_no_journal(root):
    killed(root, 3)
    assert read_again(root, resume=False) == 5


def test_a_journal_of_other_manifests_another_place_or_another_day_is_not_believed(root, cache, tmp_path):
    killed(root, 3)
    (journal,) = cache.iterdir()
    lines = journal.read_text()
    for old, new in (('"t": 1', '"t": '), ("step-000000000001", "step-000000000009"), ('"shard": "', '"shard": "0')):
        journal.write_text(lines.replace(old, new))
        assert read_again(root) > 2, new
    journal.write_text(lines)
    (tmp_path / "twin").symlink_to(root)
    assert read_again(tmp_path / "twin") == 5


def test_a_shard_whose_manifest_was_replaced_is_read_again(root, tmp_path):
    twin = tmp_path / "twin"
    shutil.copytree(root, twin)
    killed(twin, 3)
    path = max((twin / "manifests").glob("order-*"))
    found = manifests.loads(f"manifests/{path.name}", path.read_bytes())
    path.write_bytes(replace(found, metrics={"new": 1.0}).dumps())
    assert read_again(twin) == 3


def test_lines_that_were_cut_short_or_are_none_say_nothing(root, cache):
    killed(root, 3)
    (journal,) = cache.iterdir()
    with journal.open("a") as file:
        file.write('{"shard": "x"}\nnot json\n[1, 2]\n{"shard": "y", "upto": "z", "t": 1}\n{"sha')
    assert read_again(root) == 2


def test_large_shards_go_on_in_the_middle(tmp_path):
    folder = tmp_path / "big"
    with dcpsvc.Checkpointer(folder / "root", {"x": torch.zeros(20 << 20)}, local=folder / "local") as ckpt:
        ckpt.save(1).wait(60)
    store = Counting(folder / "root")
    (attempt,) = verifying.commits(store, None)
    manifest = verifying.discover.read_manifest(store, attempt)
    journal = Journal(store.url, resume=False)
    journal.path.parent.mkdir(parents=True)
    line = {"shard": _name(manifest, manifest.shards[0]), "upto": 64 << 20, "t": time.time()}
    journal.path.write_text(json.dumps(line) + "\n")
    begins: list[int] = []

    class Begins(Counting):
        def stream(self, key, begin, end, look):
            begins.append(begin)
            return super().stream(key, begin, end, look)

    assert verify(Begins(folder / "root"), resume=True)[0].intact
    assert min(begins) == 64 << 20


def test_a_cache_that_cannot_be_written_is_done_without(root, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert read_again(root) == 5
    assert "cannot be resumed" in caplog.text


def test_the_command_resumes_and_damage_is_found_all_the_same(root, tmp_path):
    twin = tmp_path / "twin"
    shutil.copytree(root, twin)
    killed(twin, 3)
    shard = sorted((twin / "data").glob("*/*"))[4]
    data = bytearray(shard.read_bytes())
    data[500_000] ^= 1
    shard.write_bytes(data)
    command = [sys.executable, "-m", "dcpsvc", "verify", str(twin), "--resume"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, shard.name in done.stdout) == (1, True), done.stdout + done.stderr

"""A run root that cannot be written: commands that look at it work, those that write say what is missing."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import dcpsvc

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(120)

PROGRAM = str(Path(sys.executable).with_name("dcpsvc"))
MOUNTED = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
LOAD = """
import sys, dcpsvc, torch
model = torch.nn.Linear(100, 30)
print(dcpsvc.load(sys.argv[1], {"model": model}), model.weight.sum().item())
"""


def train(folder: Path, value: float = 1.0) -> Path:
    model = torch.nn.Linear(100, 30)
    torch.nn.init.constant_(model.weight, value)
    state = {"model": model, "optim": torch.optim.SGD(model.parameters(), lr=0.5)}
    with dcpsvc.Checkpointer(folder / "root", state, local=folder / "local", run_log=True) as ckpt:
        ckpt.save(1, metrics={"loss": 2.0}).wait(30)
        ckpt.save(2).wait(30)
    return folder / "root"


@pytest.fixture(scope="module")
def writable(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def read_only(writable) -> Iterator[list[str]]:
    """What to put before a command: root sees a read-only mount, somebody else a tree without the right to write."""
    if os.geteuid() == 0:
        if not can_mount(writable):
            pytest.skip("this system does not let root mount")
        yield ["unshare", "--mount", "sh", "-c", MOUNTED, str(writable)]
        return
    below = [writable, *writable.rglob("*")]
    modes = {path: path.stat().st_mode for path in below}
    for path in below:
        path.chmod(modes[path] & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    yield []
    for path in below:
        path.chmod(modes[path])


def can_mount(root: Path) -> bool:
    if shutil.which("unshare") is None:
        return False
    tried = ["unshare", "--mount", "sh", "-c", MOUNTED, str(root), "true"]
    return subprocess.run(tried, capture_output=True, check=False, timeout=30).returncode == 0


def run(prefix: list[str], *command: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*prefix, *map(str, command)], capture_output=True, text=True, check=False, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


READING = {
    "ls": ("ls", "ROOT", "--json"),
    "show": ("show", "ROOT", 1, "--json"),
    "verify": ("verify", "ROOT", "--json"),
    "diff": ("diff", "ROOT", 1, 2, "--values", "--json"),
    "du": ("du", "ROOT", "--json"),
    "fetch": ("fetch", "ROOT", 1, "OUT", "--json"),
    "cp": ("cp", "ROOT", "OUT", "--json"),
    "promote": ("promote", "ROOT", 1, "OUT", "--json"),
    "export": ("export", "ROOT", 1, "OUT", "--format", "hf", "--json"),
    "report": ("report", "ROOT", "-o", "OUT", "--json"),
    "gc --dry-run": ("gc", "ROOT", "--dry-run", "--keep", "latest:1", "--json"),
    "edit --dry-run": ("edit", "ROOT", 1, "--set", "optim.lr=0.1", "--dry-run", "--json"),
}


@pytest.mark.parametrize("arguments", READING.values(), ids=READING)
def test_a_root_that_cannot_be_written_is_read_by(arguments, writable, read_only, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = tree(writable)
    places = {"ROOT": writable, "OUT": tmp_path / "out"}
    done = run(read_only, PROGRAM, *(places.get(str(each), each) for each in arguments))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert tree(writable) == before


def test_a_root_that_cannot_be_written_is_loaded(writable, read_only):
    done = run(read_only, sys.executable, "-c", LOAD, writable)
    assert done.stdout == "2 3000.0\n", done.stderr


WRITING = {
    "pin": ("pin", "ROOT", 1),
    "gc": ("gc", "ROOT", "--keep", "latest:1"),
    "edit": ("edit", "ROOT", 1, "--set", "optim.lr=0.1"),
    "promote into it": ("promote", "OTHER", 3, "ROOT"),
    "import into it": ("import", "MODEL", "ROOT", 9),
    "export into it": ("export", "ROOT", 1, "BELOW", "--format", "hf"),
}


@pytest.fixture(scope="module")
def others(tmp_path_factory, writable) -> dict[str, Path]:
    """A run with a later step, and a folder of safetensors."""
    folder = tmp_path_factory.mktemp("others")
    with dcpsvc.Checkpointer(folder / "root", {"x": 1}, local=folder / "local") as ckpt:
        ckpt.save(3).wait(30)
    done = run([], PROGRAM, "export", writable, 1, folder / "model", "--format", "hf")
    assert done.returncode == 0, done.stderr
    return {"OTHER": folder / "root", "MODEL": folder / "model"}


@pytest.mark.parametrize("arguments", WRITING.values(), ids=WRITING)
def test_what_would_write_into_it_says_so_with_the_remedy_and_leaves_it(arguments, writable, others, read_only):
    before = tree(writable)
    places = {"ROOT": writable, "BELOW": writable / "below", **others}
    done = run(read_only, PROGRAM, *(places.get(str(each), each) for each in arguments))
    said, remedy = done.stderr.splitlines()
    assert done.returncode == 3
    assert str(writable) in said
    assert "read-only" in said or "permission denied" in said
    assert "mount it read-write" in remedy
    assert "AWS" not in remedy
    assert tree(writable) == before


def test_the_doctor_says_that_jobs_do_not_work_there_and_why(writable, read_only, tmp_path):
    done = run(read_only, PROGRAM, "doctor", writable, "--local", tmp_path / "local", "--size", "1MiB", "--json")
    found = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert done.returncode == 1
    assert found["permissions"]["verdict"] == "fail"
    assert "mount it read-write" in found["permissions"]["remedy"]

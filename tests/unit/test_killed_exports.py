"""R33: an export into a format of torch that was killed goes on where it was, and nobody can tell afterwards."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from dcpsvc import conversion
from dcpsvc.reading import open_root
from dcpsvc.tools.exporting import Source, export_peft, planned_nbytes
from tests.unit.one_process import save
from tests.unit.test_adapter_folders import Adapted
from tests.unit.training import seed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EXPORT = """
import os, signal, sys
from dcpsvc import conversion
from dcpsvc.tools.exporting import Source, export_peft
from dcpsvc.reading import open_root

kind, root, out, event, number, log = sys.argv[1:]
left = int(number)

def die(happened):
    global left
    left -= happened
    if happened and left == 0:  # the kill itself is an event too
        os.kill(os.getpid(), signal.SIGKILL)

def told(nbytes):
    with open(log, "a") as file:
        print(nbytes, file=file)
    die(event == "progress")

store = open_root(root)
options = {"dtype": "BF16", "progress": told, "batch_nbytes": 1}
sys.addaudithook(lambda name, arguments: die(name == event and str(arguments[0]).startswith(out)))
if kind == "dcp":
    conversion.export_dcp(store, 7, out, **options)
elif kind == "peft":
    export_peft(Source(store, 7, "model"), out, dtype="BF16", progress=told)
else:
    conversion.export_torch(Source(store, 7, "model"), store, out, **options)
"""
"""Killed at one of its calls: of the bar, or of the system with a path in the directory."""

POINTS = [
    ("dcp", "progress", 1), ("dcp", "progress", 2), ("dcp", "progress", 4), ("dcp", "os.rename", 1),
    ("dcp", "os.rename", 2), ("dcp", "os.rename", 3), ("dcp", "os.rmdir", 1), ("dcp", "os.remove", 1),
    ("torch", "progress", 1), ("torch", "progress", 2), ("torch", "progress", 4), ("torch", "os.rename", 1),
    ("torch", "os.rmdir", 1), ("torch", "os.remove", 1),
]  # fmt: skip


ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


def model() -> nn.Module:
    """Tensors that are cast, that are not, that are tied, and one that is empty."""
    seed(0)
    found = nn.Sequential(
        nn.Embedding(10, 4), nn.Linear(4, 6).bfloat16(), nn.BatchNorm1d(6), nn.Linear(4, 10, bias=False)
    )
    found[3].weight = found[0].weight
    found.register_buffer("none", torch.empty(0, 3))
    return found


def export(kind: str, folder: Path, progress: Callable[[int], None] = lambda _: None) -> dict[str, bytes]:
    """What lies in the directory then."""
    store, options = open_root(folder / "root"), {"dtype": "BF16", "progress": progress, "batch_nbytes": 1}
    out = folder / "out"
    if kind == "dcp":
        conversion.export_dcp(store, 7, out, **options)
    else:
        conversion.export_torch(Source(store, 7, "model"), store, out, **options)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def killed(kind: str, folder: Path, event: str, number: int) -> int:
    """How many bytes it had told of."""
    log = folder / "log"
    arguments = [kind, folder / "root", folder / "out", event, number, log]
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, *map(str, arguments)], timeout=60, check=False, capture_output=True
    )
    assert done.returncode == -9, done.stderr
    return sum(map(int, log.read_text().split()))


def undisturbed(kind: str, folder: Path) -> dict[str, bytes]:
    """Its files, by an export into the same directory, which is moved away."""
    state: dict[str, Any] = {"model": model(), "sched": {"last": 3}}
    save(folder, state, step=7)
    expected = export(kind, folder)
    (folder / "out").rename(folder / "expected")
    return expected


@pytest.mark.parametrize(("kind", "event", "number"), POINTS)
def test_a_killed_export_goes_on_where_it_was_and_gives_the_bytes_of_an_undisturbed_one(
    tmp_path: Path, kind: str, event: str, number: int
) -> None:
    expected = undisturbed(kind, tmp_path)
    assert expected.keys() == ({".metadata", "__0_0.distcp"} if kind == "dcp" else {"model.pt"})
    before = killed(kind, tmp_path, event, number)
    told: list[int] = []
    result = "model.pt" if kind == "torch" else ".metadata"
    was_whole = (tmp_path / "out" / result).exists()
    assert export(kind, tmp_path, told.append) == expected
    assert told[:1] == ([] if was_whole else [before])  # found, not read; of a whole one not even that


@pytest.mark.parametrize("kind", ["dcp", "torch"])
def test_what_an_export_had_kept_is_read_again_if_it_is_not_what_it_was(tmp_path: Path, kind: str) -> None:
    expected = undisturbed(kind, tmp_path)
    before = killed(kind, tmp_path, "progress", 5)
    (tmp_path / "out" / ".dcpsvc-scratch" / "state").write_bytes(b"")
    with (tmp_path / "out" / ".dcpsvc-scratch" / "parts.jsonl").open("ab") as file:
        file.write(b'{"key":"model.0.wei')  # as a kill in the middle of a line leaves it
    told: list[int] = []
    assert export(kind, tmp_path, told.append) == expected
    assert told[0] < before < sum(told)


def test_a_killed_export_of_adapters_keeps_those_that_are_whole_and_goes_on(tmp_path: Path) -> None:
    save(tmp_path, {"model": Adapted("default", "other")}, step=7)
    source, out = Source(open_root(tmp_path / "root"), 7, "model"), tmp_path / "out"
    export_peft(source, out, dtype="BF16")
    out.rename(tmp_path / "expected")
    killed("peft", tmp_path, "os.rename", 3)  # the first adapter has its file and its configuration
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("adapter_*")}
    told: list[int] = []
    export_peft(source, out, dtype="BF16", progress=told.append)
    assert before == {name: (out / name).stat().st_mtime_ns for name in ADAPTER}
    for name in [*ADAPTER, *(f"other/{name}" for name in ADAPTER)]:
        assert (out / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    assert [path.name for path in (out / "other").iterdir() if path.name not in ADAPTER] == []
    assert sum(told) == planned_nbytes(source, adapters=True)

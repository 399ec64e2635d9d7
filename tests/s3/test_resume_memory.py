"""A module that comes back from S3, or from its node's disk, takes no second copy of itself in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import dcpsvc

if TYPE_CHECKING:
    from tests.s3.servers import Server

pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]

MIB = 2**20
SIZE = 512
SOURCE = str(Path(dcpsvc.__file__).parents[1])

LIFE = """
import json, re, sys
from pathlib import Path
import torch, dcpsvc

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

what, root, options, local, size = sys.argv[1:]
model = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096, bias=False) for _ in range(int(size) // 64)))
for number, parameter in enumerate(model.parameters()):
    torch.nn.init.constant_(parameter, number + 1.0 if what == "save" else 0.0)
told = []
with dcpsvc.Checkpointer(
    root, {"model": model}, local=local, storage_options=json.loads(options), save_last=False,
    staging_nbytes=2**20, on_event=told.append,
) as ckpt:
    if what == "save":
        ckpt.save(1).wait(200)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
        before = status("VmRSS")
        assert ckpt.resume() == 1
        grown = status("VmHWM") - before
        assert all(bool((p == number + 1.0).all()) for number, p in enumerate(model.parameters()))
        print(json.dumps([grown, next(event.detail for event in told if event.name == "resumed")]))
"""


def lived(server: Server, what: str, run_root: str, local: Path) -> tuple[int, str]:
    argv = [sys.executable, "-c", LIFE, what, run_root, json.dumps(server.storage_options), str(local), str(SIZE)]
    done = subprocess.run(
        argv, env={**os.environ, "PYTHONPATH": SOURCE}, timeout=200, check=True, capture_output=True, text=True
    )
    grown, detail = json.loads(done.stdout) if done.stdout else (0, "")
    return grown, detail


def test_a_module_of_512_mib_takes_less_than_256_mib_more_from_s3_and_from_its_own_disk(
    s3_server: Server, run_root: str, tmp_path: Path
) -> None:
    lived(s3_server, "save", run_root, tmp_path / "node")
    near, told_near = lived(s3_server, "resume", run_root, tmp_path / "node")
    far, told_far = lived(s3_server, "resume", run_root, tmp_path / "empty")
    print(f"{near / MIB:.0f} MiB more from the node's disk, {far / MIB:.0f} MiB from S3")
    assert "from the run root" not in told_near
    assert "from local disks" not in told_far
    assert near < 256 * MIB
    assert far < 256 * MIB

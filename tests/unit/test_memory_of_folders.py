"""R33: exports and imports of folders take the memory of a tensor or two, whatever there is of them."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import dcpsvc
from tests.unit.one_process import save

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
SHARD_MIB = 32

MEASURE = """
import sys
from pathlib import Path
import numpy
import dcpsvc.commandline.exporting, dcpsvc.commandline.importing, dcpsvc.tools.exporting, dcpsvc.tools.importing
from dcpsvc.cli import cli

def status(name):
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(name))

Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
before = status("VmRSS")
cli(sys.argv[1:], standalone_mode=False)
print(status("VmHWM") - before)
"""


def grown(*arguments: object) -> int:
    """By how many bytes the memory of a command grew, at most."""
    command = [sys.executable, "-c", MEASURE, *map(str, arguments), "--max-shard-mib", str(SHARD_MIB)]
    done = subprocess.run(command, timeout=100, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def layers() -> nn.Module:
    return nn.ModuleList(nn.Linear(2048, 2048, bias=False) for _ in range(16))


@pytest.mark.timeout(150)
def test_a_model_of_256_mib_goes_out_and_in_with_the_memory_of_less_than_two_shards(tmp_path: Path) -> None:
    model, fresh = layers(), layers()
    save(tmp_path, {"model": model}, step=1)
    folder = tmp_path / "folder"
    out = grown("export", tmp_path / "root", 1, folder, "--format", "hf")
    parts = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert sum(parts) > 256 * MIB
    assert max(parts) < (SHARD_MIB + 1) * MIB
    back = grown("import", folder, tmp_path / "again", 1)
    print(f"out: {out / MIB:.0f} MiB, in: {back / MIB:.0f} MiB")
    assert max(out, back) < 2 * SHARD_MIB * MIB
    dcpsvc.load(tmp_path / "again", {"model": fresh})
    assert all(map(torch.equal, fresh.parameters(), model.parameters()))

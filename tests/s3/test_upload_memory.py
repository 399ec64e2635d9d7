"""An upload takes the memory of the parts under way, however large the file is."""

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
PART, AT_ONCE = 8 * MIB, 4
SOURCE = str(Path(dcpsvc.__file__).parents[1])

UPLOAD = """
import json, re, sys
from pathlib import Path
from dcpsvc.config import Limits
from dcpsvc.storage.open import open_store

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

root, options, small, large, part, at_once = sys.argv[1:]
store = open_store(root, json.loads(options), limits=Limits(part_nbytes=int(part), concurrency=int(at_once)))
store.put_file("data/first", Path(small))
Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
before = status("VmRSS")
store.put_file("data/second", Path(large))
print(status("VmHWM") - before)
"""


def test_a_file_of_256_mib_takes_the_memory_of_the_parts_under_way(
    s3_server: Server, run_root: str, tmp_path: Path
) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(os.urandom(2 * PART))
    large.write_bytes(os.urandom(MIB) * 256)
    argv = [sys.executable, "-c", UPLOAD, run_root, json.dumps(s3_server.storage_options), str(small), str(large)]
    done = subprocess.run(
        [*argv, str(PART), str(AT_ONCE)], env={**os.environ, "PYTHONPATH": SOURCE}, timeout=200, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    print(f"{int(done.stdout) / MIB:.0f} MiB more for 256 MiB")
    assert int(done.stdout) < AT_ONCE * PART + 32 * MIB

"""Jobs of two ranks under torchrun on this machine, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BOUND_S = 60
TORCHRUN = (
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2",
)  # fmt: skip
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

_TRAIN = """
import sys, time
import torch
import torch.distributed as dist
import dcpsvc

root, saves = sys.argv[1], sys.argv[2] == "saves"
options = {"keep": dcpsvc.Latest(2), "run_log": True} if saves else {}
dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(256, 256))
optimizer = torch.optim.AdamW(model.parameters())
with dcpsvc.Checkpointer(root, {"model": model, "optim": optimizer}, local=root + "-local", **options) as ckpt:
    for step in range(ckpt.resume() + 1, 10**9):  # until it is stopped
        model(torch.randn(4, 256)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if saves:
            ckpt.save(step, metrics={"loss": 1 / step})
        else:
            time.sleep(0.02)
        if ckpt.step(step).should_stop:
            break
dist.destroy_process_group()
"""


@contextmanager
def live_job(folder: Path, is_ready: Callable[[Path], bool], *, saves: bool) -> Iterator[subprocess.Popen[bytes]]:
    """A job that trains until it is stopped, as soon as it is ready; its run root is ``folder / "run"``.

    Args:
        folder: For its script, its output, and both tiers.
        is_ready: Asked with the run root until it says so.
        saves: At every step, of which two are kept; else when somebody asks for it.
    """
    (folder / "train.py").write_text(_TRAIN)
    command = [*TORCHRUN, str(folder / "train.py"), str(folder / "run"), "saves" if saves else "waits"]
    with (
        (folder / "output").open("w+b") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | ENVIRONMENT) as process,
    ):
        try:
            deadline = time.monotonic() + BOUND_S
            while not is_ready(folder / "run"):
                assert process.poll() is None, (folder / "output").read_text()
                assert time.monotonic() < deadline, (folder / "output").read_text()
            yield process
        finally:
            process.terminate()
            process.wait(BOUND_S)


def processes_of(directory: Path) -> list[int]:
    """Whoever runs with its working directory there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if path.readlink() == directory and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found

"""Bring the samples in docs/tools.md up to date: ``python -m tests.s3.samples``.

Each line ``$ dcpsvc ...`` in a block of that file is run, in order, on a run of two ranks on a real Ceph gateway, and
what it prints takes the place of what stands below it. Only the local tier's path is replaced, by ``/nvme/ckpt``.

The run, which trains the demo's model: steps 1 to 30; then on to step 80, where a rank is killed in the middle of a
save; and a third start, which lives from the first ``dcpsvc status`` to ``dcpsvc stop``.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

import dcpsvc
from dcpsvc.demo.journal import Journal, Kill
from dcpsvc.demo.model import GPT, GPTConfig
from dcpsvc.demo.text import TextLoader, read_corpus
from dcpsvc.demo.train import parallelize, start_ranks, train_step

if TYPE_CHECKING:
    from collections.abc import Generator

    from tests.s3.servers import Server

DOCUMENT = Path(__file__).parents[2] / "docs" / "tools.md"
ROOT = "s3://bucket/runs/exp42"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")
BLOCK = re.compile(r"(?<=```console\n).*?(?=```)", re.DOTALL)
BOUND_S = 120


def train(until: int, every: int, kill: str) -> None:
    """One start of the job, as a rank of a launcher."""
    rank, world = start_ranks("fsdp")
    config = GPTConfig()
    torch.manual_seed(0)
    model = parallelize(GPT(config), "fsdp")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = TextLoader(read_corpus(), 4, config.block, rank=rank, world=world, seed=0)
    journal = Journal(Path(os.devnull), rank, Kill.parse(kill) if kill else None)
    with dcpsvc.Checkpointer(
        ROOT,
        {"model": model, "optim": optimizer, "loader": dcpsvc.PerRank(loader), "rng": dcpsvc.Rng()},
        every=dcpsvc.Every(steps=every),
        keep=dcpsvc.Latest(2) | dcpsvc.Best(1, "eval", mode="min") | dcpsvc.EveryNSteps(20),
        run_log=True,
        on_event=journal.event,
    ) as ckpt:
        for step in range(ckpt.resume() + 1, until + 1):
            loss = train_step(model, optimizer, loader)
            metrics = {"loss": loss, "eval": round(loss + abs(step - 30) / 100, 4)}
            if ckpt.step(step, metrics=metrics).should_stop:
                break
    dist.destroy_process_group()


def job(until: int, every: int = 10, kill: str = "") -> subprocess.Popen[bytes]:
    command = [*TORCHRUN, "--nproc-per-node=2", "-m", "tests.s3.samples", str(until), str(every), kill]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def prepare() -> None:
    """What the run has been through before anybody looks."""
    assert job(30).wait(BOUND_S) == 0
    told = said(f"dcpsvc pin {ROOT} 30 --note 'paper, table 3'")
    assert "pinned" in told, told
    assert job(90, kill="shard-written:80:1").wait(BOUND_S) != 0


@contextlib.contextmanager
def living() -> Generator[None]:
    """A third start, once it trains; whoever asked for it stops it."""
    with job(10**6, every=10**6) as process:
        try:
            deadline = time.monotonic() + BOUND_S
            while not re.search(r'"step": [0-9]', said("dcpsvc status --json " + ROOT)):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
            yield
            assert process.wait(BOUND_S) == 0
        finally:
            process.terminate()


def said(command: str) -> str:
    """What a command prints, a shell's way; its exit code is part of the sample only where it says so itself."""
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    local = os.environ["DCPSVC_LOCAL"]
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.replace(local, "/nvme/ckpt").splitlines())


def renewed(text: str) -> str:
    with contextlib.ExitStack() as alive:

        def block(found: re.Match[str]) -> str:
            parts = []
            for line in re.findall(r"^\$ .*", found[0], re.MULTILINE):
                if line.startswith("$ dcpsvc status"):
                    alive.enter_context(living())
                parts.append(f"{line}\n{said(line[2:])}")
            return "\n".join(parts)  # a blank line between two commands, and none of what stood there before

        return BLOCK.sub(block, text)


def environment(server: Server, folder: Path) -> dict[str, str]:
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {
        "AWS_ENDPOINT_URL": server.endpoint, "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key, "AWS_DEFAULT_REGION": "us-east-1", "DCPSVC_LOCAL": f"{folder}/ckpt",
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PATH": programs, "COLUMNS": "160",
    }  # fmt: skip


def main() -> None:
    from tests.s3.conftest import started
    from tests.s3.servers import KINDS

    with tempfile.TemporaryDirectory() as name, started(KINDS["ceph"], Path(name) / "server") as server:
        os.environ |= environment(server, Path(name))
        server.client().create_bucket(Bucket="bucket")
        python_path = [str(Path.cwd()), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        os.environ["PYTHONPATH"] = os.pathsep.join(str(Path(each).absolute()) for each in python_path)
        here = Path(name, "here")
        here.mkdir()
        with contextlib.chdir(here):  # no checkout of anything: a checkpoint records the commit of where its job runs
            prepare()
            text = renewed(DOCUMENT.read_text(encoding="utf-8"))
        DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    else:
        main()

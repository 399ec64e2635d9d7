"""What one save costs, side by side: dcpsvc, DCP save, DCP async_save, torch.save. One process, medians, ratios.

    python benchmarks/bench_save.py --mib 512 --rounds 5 [--json] [--dir DIRECTORY]

blocked: until the caller may change the state. durable: until the bytes are on disk with fsync. Every tensor is
changed right after the call returns, and what was saved is compared with what was there: a torn snapshot is an error.
dcpsvc is measured to its local tier (durable on this node's disk), which is what the others do, and to its commit,
which also copies the shard to the run root, reads it back, and writes the manifest.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict

import dcpsvc


class Workload:
    """A stack of linear layers with AdamW, about ``mib`` MiB in all."""

    def __init__(self, mib):
        width = 1024
        layers = max(1, round(mib * 2**20 / (3 * 4 * width * width)))
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.nbytes = sum(p.nbytes * 3 for p in self.model.parameters())

    def change(self):
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(1.0)

    def probe(self):
        return self.model[-1].weight[:4, :4].clone()

    def state_dict(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer}


def fsync_tree(directory):
    for path in directory.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class TorchSave:
    name = "torch.save"

    def __init__(self, workload, directory):
        self.workload, self.directory = workload, directory

    def save(self, step):
        path = self.directory / f"{step}.pt"
        torch.save({"m": self.workload.model.state_dict(), "o": self.workload.optimizer.state_dict()}, path)
        self.path = path

    def durable(self):
        fsync_tree(self.directory)

    def saved(self):
        return torch.load(self.path, weights_only=True)["m"][f"{len(self.workload.model) - 1}.weight"][:4, :4]

    def close(self):
        pass


class DcpSave(TorchSave):
    name = "DCP save"

    def save(self, step):
        self.path = self.directory / str(step)
        dcp.save(self.workload.state_dict(), checkpoint_id=self.path)

    def saved(self):
        key = f"{len(self.workload.model) - 1}.weight"
        state = {"model": {key: torch.empty(1024, 1024)}}
        dcp.load(state, checkpoint_id=self.path)
        return state["model"][key][:4, :4]


class DcpAsync(DcpSave):
    name = "DCP async_save"

    def save(self, step):
        self.path = self.directory / str(step)
        self.future = dcp.async_save(self.workload.state_dict(), checkpoint_id=self.path)

    def durable(self):
        self.future.result()
        fsync_tree(self.directory)


class DcpAsyncCached(DcpAsync):
    name = "DCP async_save, cached stager"

    def __init__(self, workload, directory):
        super().__init__(workload, directory)
        self.stager = DefaultStager(StagingOptions(*[False] * 4))

    def save(self, step):
        self.path = self.directory / str(step)
        self.future = dcp.async_save(self.workload.state_dict(), checkpoint_id=self.path, async_stager=self.stager)

    def close(self):
        self.stager.close()


class Dcpsvc:
    name = "dcpsvc, local tier"

    def __init__(self, workload, directory):
        self.workload = workload
        state = {"model": workload.model, "optim": workload.optimizer}
        self.root = directory / "root"
        self.checkpointer = dcpsvc.Checkpointer(
            self.root, state, local=directory / "local", keep=dcpsvc.Latest(1), save_last=False
        )

    def save(self, step):
        self.pending = self.checkpointer.save(step)

    def durable(self):
        self.pending.local.result()

    def saved(self):
        self.checkpointer.wait()
        fresh = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in self.workload.model))
        dcpsvc.load(self.root, {"model": fresh})
        return fresh[-1].weight[:4, :4]

    def close(self):
        self.checkpointer.close()


class DcpsvcCommit(Dcpsvc):
    name = "dcpsvc, committed"

    def durable(self):
        self.pending.wait()


SYSTEMS = [TorchSave, DcpSave, DcpAsync, DcpAsyncCached, DcpsvcCommit, Dcpsvc]


def measure(system, workload, rounds, parent):
    directory = Path(tempfile.mkdtemp(dir=parent))
    subject = system(workload, directory)
    blocked, durable = [], []
    try:
        for step in range(1, rounds + 2):
            before = workload.probe()
            began = time.perf_counter()
            subject.save(step)
            blocked.append(time.perf_counter() - began)
            workload.change()
            subject.durable()
            durable.append(time.perf_counter() - began)
            if not torch.equal(subject.saved(), before):
                raise SystemExit(f"{system.name}: the snapshot of round {step} is torn")
    finally:
        subject.close()
        shutil.rmtree(directory, ignore_errors=True)
    return {
        "system": system.name,
        "blocked_s": statistics.median(blocked[1:]),
        "first_blocked_s": blocked[0],
        "durable_s": statistics.median(durable[1:]),
        "first_durable_s": durable[0],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    workload = Workload(options.mib)
    rows = [measure(system, workload, options.rounds, options.dir) for system in SYSTEMS]
    dist.destroy_process_group()
    report(rows, workload, options)


def report(rows, workload, options):
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "state_mib": round(workload.nbytes / 2**20),
        "rounds": options.rounds,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    ours = rows[-1]
    for row in rows:
        row["blocked_ratio"] = row["blocked_s"] / ours["blocked_s"]
        row["durable_ratio"] = row["durable_s"] / ours["durable_s"]
    if options.json:
        print(json.dumps({"facts": facts, "rows": rows}, indent=1))
        return
    print("  ".join(f"{name}={value}" for name, value in facts.items()))
    print(f"{'system':32}{'blocked s':>10}{'x':>7}{'first':>8}{'durable s':>11}{'x':>7}{'first':>8}")
    for row in rows:
        print(
            f"{row['system']:32}{row['blocked_s']:10.3f}{row['blocked_ratio']:7.2f}{row['first_blocked_s']:8.2f}"
            f"{row['durable_s']:11.3f}{row['durable_ratio']:7.2f}{row['first_durable_s']:8.2f}"
        )


if __name__ == "__main__":
    main()

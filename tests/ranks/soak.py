"""Many saves of a real job, most of them disturbed: nothing that was reported committed is lost, nothing leaks.

``python -m tests.ranks.soak --saves 200`` prints the balance; a test runs a short one.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

import dcpsvc
from dcpsvc.errors import CommitUnknownError, SaveError, StoreFullError, StoreUnavailableError
from dcpsvc.storage.posix import PosixStore
from tests.ranks.harness import run_ranks, values
from tests.ranks.models import Training, checkpointer

SYNC_TIMEOUT_S, UPLOAD_TIMEOUT_S, PAUSE_S = 1.5, 3.0, 2.5
QUIET = 0.45
"""Share of saves that nothing disturbs."""

FAULTS = (
    "upload refused", "upload refused once", "upload truncated", "upload corrupted", "upload hangs", "manifest lost",
    "listing fails", "state_dict raises", "comes late", "stays away", "another step", "stopped after staging",
    "stopped after the local ack", "stopped after the upload",
)  # fmt: skip
_STOPS = {
    "stopped after staging": dcpsvc.Point.STAGED,
    "stopped after the local ack": dcpsvc.Point.ACKED_LOCAL,
    "stopped after the upload": dcpsvc.Point.UPLOADED,
}


class Moody(PosixStore):
    """A run root that does to one rank what the plan of the step says."""

    fault = ""

    def put_file(self, key: str, path: Path, *, progress: Any = None) -> None:
        fault, self.fault = self.fault, "" if self.fault == "upload refused once" else self.fault
        if fault == "upload refused":
            raise StoreFullError("put_file", key, "no space left")
        if fault == "upload refused once":
            raise StoreUnavailableError("put_file", key, "slow down")
        if fault == "upload hangs":
            time.sleep(UPLOAD_TIMEOUT_S + 1)
        if fault in {"upload truncated", "upload corrupted"}:
            data = bytearray(path.read_bytes())
            data = data[:-7] if fault == "upload truncated" else data[:99] + bytes([data[99] ^ 1]) + data[100:]
            self.put(key, bytes(data))
        else:
            super().put_file(key, path, progress=progress)

    def create(self, key: str, data: bytes) -> bool:
        if self.fault == "manifest lost" and key.startswith("manifests/order-"):
            raise StoreFullError("create", key, "no space left")
        return super().create(key, data)

    def list(self, prefix: str) -> Any:
        if self.fault == "listing fails":
            raise StoreFullError("list", prefix, "not today")
        return super().list(prefix)


class Part:
    """A component that can fail."""

    fails = False

    def state_dict(self) -> dict[str, Any]:
        if self.fails:
            raise RuntimeError("this part cannot be saved now")
        return {"value": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


def plan(seed: int, step: int, world: int) -> tuple[str, int]:
    """What happens to which rank at a step; the same on every rank."""
    draw = random.Random(f"{seed}-{step}")
    return ("", 0) if draw.random() < QUIET or step <= WARM_UP else (draw.choice(FAULTS), draw.randrange(world))


WARM_UP = 4


def pause_myself() -> None:
    """SIGSTOP, and SIGCONT by a process that lives for this alone."""
    command = f"import os,time; time.sleep({PAUSE_S}); os.kill({os.getpid()}, {int(signal.SIGCONT)})"
    waker = subprocess.Popen([sys.executable, "-S", "-c", command])
    os.kill(os.getpid(), signal.SIGSTOP)
    waker.wait()


def train(rank: int, world: int, root: Path, saves: int, seed: int) -> dict[str, Any]:
    """One rank: a save a step, each under its fault; what became of each, and what is left at the end."""
    training, part, store = Training("ddp", rank), Part(), Moody(root)
    stops: dict[int, str] = {}

    def on_event(event: dcpsvc.Event) -> None:
        if stops.get(event.step or 0) == event.name:
            pause_myself()

    outcomes: dict[int, str] = {}
    ckpt = checkpointer(
        root, training.state | {"part": part}, store=store, on_event=on_event, save_last=False,
        sync_timeout_s=SYNC_TIMEOUT_S, upload_timeout_s=UPLOAD_TIMEOUT_S, max_consecutive_failures=10**6,
    )  # fmt: skip
    before: dict[str, Any] = {}
    for step in range(1, saves + 1):
        training.step()
        fault, victim = plan(seed, step, world) if step < saves else ("", 0)
        mine = fault if rank == victim else ""
        store.fault, part.fails = mine, mine == "state_dict raises"
        if mine in _STOPS:
            stops[step] = _STOPS[mine]
        outcomes[step] = save(ckpt, step, mine)
        store.fault, part.fails = "", False
        ckpt.wait(60)
        dist.barrier()
        if step == WARM_UP:
            before = held()
    after = settled(before)
    ckpt.close()
    return {"outcomes": outcomes, "before": before, "after": after}


def save(ckpt: dcpsvc.Checkpointer, step: int, fault: str) -> str:
    """``committed``, or the type of the error; ``away`` where this rank did not take part."""
    if fault == "comes late":
        time.sleep(SYNC_TIMEOUT_S / 3)
    if fault == "stays away":
        time.sleep(SYNC_TIMEOUT_S * 1.3)
        return "away"
    try:
        ckpt.save(10**6 + step if fault == "another step" else step).wait(60)
    except SaveError as err:
        return type(err).__name__
    return "committed"


def held() -> dict[str, Any]:
    """Threads by name, and how many descriptors."""
    names = collections.Counter(thread.name.split("_")[0] for thread in threading.enumerate())
    return {"threads": dict(names), "descriptors": len(list(Path("/proc/self/fd").iterdir()))}


def settled(before: dict[str, Any]) -> dict[str, Any]:
    """As :func:`held`, once what was left hanging on purpose has ended, or after a while."""
    ends = time.monotonic() + UPLOAD_TIMEOUT_S + 5
    while (now := held()) != before and time.monotonic() < ends:
        time.sleep(0.1)
    return now


def balance(folder: Path, world: int, saves: int, seed: int) -> dict[str, Any]:
    """Run it and count."""
    root = folder / "run"
    limit_s = 120.0 + saves * (SYNC_TIMEOUT_S + UPLOAD_TIMEOUT_S + PAUSE_S)
    ranks = values(run_ranks(world, train, root, saves, seed, timeout_s=limit_s))
    whole = {found.step for found in dcpsvc.list_checkpoints(root) if found.state == "committed"}
    said: dict[int, set[str]] = {step: {each["outcomes"][step] for each in ranks} for step in range(1, saves + 1)}
    committed = {step for step, words in said.items() if "committed" in words}
    unknown = {step for step, words in said.items() if CommitUnknownError.__name__ in words}
    return {
        "tried": saves,
        "disturbed": sum(bool(plan(seed, step, world)[0]) for step in range(1, saves)),
        "committed": len(committed),
        "failed and reported": len(said) - len(committed),
        "said by all ranks alike": sum(len(words - {"away"}) == 1 for words in said.values()),
        "lost": sorted(committed - whole),
        "there without being reported": sorted(whole - committed - unknown),
        "errors": dict(collections.Counter(word for words in said.values() for word in words)),
        "leaked threads": [added(each, "threads") for each in ranks],
        "leaked descriptors": [each["after"]["descriptors"] - each["before"]["descriptors"] for each in ranks],
        "unfinished files": [str(path) for path in folder.rglob(".tmp-*")],
    }


def added(rank: dict[str, Any], what: str) -> dict[str, int]:
    """What a rank has more of at the end than at the start."""
    return dict(collections.Counter(rank["after"][what]) - collections.Counter(rank["before"][what]))


def main() -> None:
    """Print the balance of one soak."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saves", type=int, default=200)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    choices = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dcpsvc-soak-") as folder:
        began = time.monotonic()
        found = balance(Path(folder), choices.world, choices.saves, choices.seed)
        print(json.dumps(found | {"seconds": round(time.monotonic() - began)}, indent=1))


if __name__ == "__main__":
    main()

"""One life of a training process with Adam: it saves, or it comes back in one of several ways and says what that took.

    python -m benchmarks.common.life SYSTEM FOLDER MIB STARTED

STARTED: seconds since 1970 when whoever wants to know began to start this process: what is imported, and how long a
Checkpointer takes to be made, is in that, and not in the time of coming back. The run root is in FOLDER, or where
DCPSVC_BENCH_ROOT says: a URL and storage options, as JSON.
"""

import json
import os
import re
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import dcpsvc
import dcpsvc.checkpointer  # what it imports counts as the imports of the others above do

MIB = 2**20
PIECE = 8 * MIB
AT_ONCE = 8
WIDTH = 2048


told = []
"""Events of the Checkpointer."""


def training(mib):
    """A model and Adam, together so many MiB once there is a first step."""
    count = max(1, round(mib * MIB / (12 * WIDTH * WIDTH)))
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(count)))
    return model, torch.optim.Adam(model.parameters())


def checkpointer(folder, model, optimizer):
    """With no arena to speak of: it is touched beside the first steps, and is not what is measured."""
    root, storage_options = json.loads(os.environ.get("DCPSVC_BENCH_ROOT", "null")) or (folder / "run", {})
    return dcpsvc.Checkpointer(
        root,
        {"model": model, "optim": optimizer},
        local=folder / "nvme",
        save_last=False,
        staging_nbytes=MIB,
        every=dcpsvc.Every(steps=10**6),
        storage_options=storage_options,
        on_event=told.append,
    )


def save(folder, model, optimizer):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with checkpointer(folder, model, optimizer) as ckpt:
        ckpt.save(1).wait(600)
    if "DCPSVC_BENCH_ROOT" in os.environ:
        return
    states = get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optim"), states, strict=True)), checkpoint_id=folder / "stock", no_dist=True)


def resume(*_, ckpt):
    if ckpt.resume() != 1:
        raise RuntimeError("it did not resume what was saved")
    return ckpt.close


def stock(folder, model, optimizer, **_):
    state = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=folder / "stock", no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])


def plain(folder, model, *_, **__):
    """The same bytes: a third to memory like the model's, which is there, the rest to new memory."""
    (path,) = (folder / "nvme").rglob("*.safetensors")
    nbytes, old = path.stat().st_size, list(model.parameters())
    targets = [memoryview(parameter.detach().view(-1).view(torch.uint8).numpy()) for parameter in old]
    targets.append(memoryview(torch.empty(nbytes - sum(map(len, targets)), dtype=torch.uint8).numpy()))
    begins = [sum(map(len, targets[:at])) for at in range(len(targets))]
    spans = [
        (begin + at, view[at : at + PIECE])
        for begin, view in zip(begins, targets, strict=True)
        for at in range(0, len(view), PIECE)
    ]
    descriptor = os.open(path, os.O_RDONLY)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        read = sum(pool.map(lambda span: os.preadv(descriptor, [span[1]], span[0]), spans))
    if read != nbytes:
        raise RuntimeError(f"{read} of {nbytes} bytes were read")
    os.close(descriptor)
    return targets.clear


LIVES = {"dcpsvc": resume, "plain reads": plain, "DCP load": stock}


def from_root_nbytes():
    """What the run root gave, as the resume says it."""
    detail = next((event.detail for event in told if event.name == "resumed"), "")
    found = re.search(r"([\d.]+) MiB from the run root", detail)
    return float(found[1]) * MIB if found else 0.0


def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def live(system, folder, mib, started):
    model, optimizer = training(mib)
    if system == "save":
        save(folder, model, optimizer)
        return {}
    model_nbytes = sum(parameter.nbytes for parameter in model.parameters())
    before, began = resident("VmRSS"), time.perf_counter()
    ckpt = checkpointer(folder, model, optimizer) if LIVES[system] is resume else None
    opened = time.perf_counter()
    after = LIVES[system](folder, model, optimizer, ckpt=ckpt)
    seconds, start_s = time.perf_counter() - opened, time.time() - started
    over = resident("VmHWM") - before - 2 * model_nbytes
    if after:
        after()
    return {
        "seconds": seconds, "open_s": opened - began, "start_s": start_s,
        "over_nbytes": over, "nbytes": 3 * model_nbytes, "from_root_nbytes": from_root_nbytes(),
    }  # fmt: skip


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(live(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))))

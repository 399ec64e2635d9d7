"""What one rank does with one system, with a clock beside it. Each returns numbers; ranks run them in step.

State is always changed by the optimizer: right after the call (``at_once``), or where a training step does it
(``training``). Whoever wants to hold it back, in a hook of the optimizer or as a guard around it, can.
"""

import contextlib
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.common.process import tree_cpu_s

_REPEATS = 3


def at_once(workload, system, step):
    """Save, change everything right after the call returns, wait until it is on disk, and look what was saved."""
    change = _typical(workload.change)
    expected = workload.digests()
    _quiet()
    cpu_s, began = tree_cpu_s(), time.perf_counter()
    system.save(step)
    returned = time.perf_counter()
    with system.guard():
        workload.change()
    changed = time.perf_counter()
    system.durable()
    ended = time.perf_counter()
    cpu_s = tree_cpu_s() - cpu_s - change["cpu_s"]
    numbers = {
        "blocked_s": returned - began,
        "next_s": changed - returned - change["s"],
        "stall_s": changed - began - change["s"],
        "durable_s": ended - began,
        "cpu_s": cpu_s,
    }
    return numbers | {"torn": _torn(workload, system, step, expected)}


def training(workload, system, step):
    """Save, and go on training until it is on disk."""
    quiet = _typical(lambda: _train(workload))
    _quiet()
    began = time.perf_counter()
    system.save(step)
    returned = time.perf_counter()
    waiting = system.watch()
    _train(workload, system.guard)
    stepped, steps = time.perf_counter(), 1
    while not _everywhere(waiting()):
        _train(workload, system.guard)
        steps += 1
    ended, durable = time.perf_counter(), system.durable_at or time.perf_counter()
    lost_s = ended - returned - steps * quiet["s"]
    system.finish(step)
    system.discard(step)
    return {
        "step_s": quiet["s"],
        "visible_s": stepped - began - quiet["s"],
        "added_s": ended - began - steps * quiet["s"],
    } | ({"speed": 1 - lost_s / max(min(ended, durable) - returned, 1e-3)} if system.background else {})


def saves(workload, system, step, count):
    """As many saves as that, one after another, each durable before the next. No loop begins with a save."""
    _typical(workload.change)
    blocked, durable = [], []
    for number in range(step, step + count):
        _quiet()
        began = time.perf_counter()
        system.save(number)
        blocked.append(time.perf_counter() - began)
        with system.guard():
            workload.change()
        system.durable()
        durable.append(time.perf_counter() - began)
        system.finish(number)
        dist.barrier()
        system.discard(number)
    return {"blocked_s": blocked, "durable_s": durable}


def profiled(workload, system, step, count, switch=None):
    """As many saves as that with nothing beside them; a profiler is switched on while they are under way."""
    durable = []
    for number in range(step, step + count):
        workload.change()
        _quiet()
        _tell(switch, "enable")
        dist.barrier()
        began = time.perf_counter()
        system.save(number)
        system.durable()
        durable.append(time.perf_counter() - began)
        dist.barrier()
        _tell(switch, "disable")
        system.finish(number)
        dist.barrier()
    return {"durable_s": statistics.median(durable)}


def _tell(switch, word):
    if switch is not None and dist.get_rank() == 0:
        Path(switch).write_text(f"{word}\n")


def _torn(workload, system, step, expected):
    """How many tensors of this rank are not as they were. Loads in place, so a tensor left out shows too."""
    system.finish(step)
    dist.barrier()
    system.load(step)
    found = workload.digests()
    dist.barrier()
    system.discard(step)
    return sum(found[key] != digest for key, digest in expected.items())


def _train(workload, guard=contextlib.nullcontext):
    workload.forward_backward()
    with guard():
        workload.change()


def _typical(work):
    """Seconds, and CPU seconds of this process, of one piece of work with nothing beside it."""
    seconds, cpu_s = [], []
    for _ in range(_REPEATS):
        dist.barrier()
        cpu_began, began = time.process_time(), time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
        cpu_s.append(time.process_time() - cpu_began)
    return {"s": statistics.median(seconds), "cpu_s": statistics.median(cpu_s)}


def _everywhere(here):
    flag = torch.tensor([int(here)])
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def _quiet():
    """Nobody pays for what somebody else has left in the page cache."""
    os.sync()
    dist.barrier()


ALL = {"at_once": at_once, "training": training, "saves": saves, "profiled": profiled}

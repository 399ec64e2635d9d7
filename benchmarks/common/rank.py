"""One rank of one system, as a process that is told what to do: one JSON line in, one JSON line out.

Started by :mod:`benchmarks.common.crew`, in the environment of the system.
"""

import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback

import torch
import torch.distributed as dist

from benchmarks.common import exercises
from benchmarks.common.workload import Workload

_STEPS = 3
_BEFORE_THE_FIRST_SAVE_S, _MIB_PER_S = 8.0, 128
"""Of training, for every system, less for a small state: no loop begins with a save; who prepares something may."""


def main():
    spec = json.loads(sys.argv[1])
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with os.fdopen(spec["answers"], "w") as answers:
        try:
            _serve(spec, answers)
        except BaseException:  # noqa: BLE001 - whatever it is, it is the answer
            _answer(answers, {"error": traceback.format_exc()})
            os._exit(1)  # whoever of this system still runs must not hold us
    os._exit(0)


def _serve(spec, answers):
    torch.set_num_threads(spec["threads"] or max(1, os.cpu_count() // int(os.environ["WORLD_SIZE"])))
    dist.init_process_group("gloo")
    workload = Workload(spec["kind"], spec["mib"])
    workload.digests()
    _answer(answers, {"nbytes": workload.nbytes})
    sys.stdin.readline()
    for _ in range(_STEPS):  # what this takes at its peak is the training's own
        workload.step()
    _answer(answers, {})
    steps = _steps_in(workload, min(_BEFORE_THE_FIRST_SAVE_S, spec["mib"] / _MIB_PER_S))
    sys.stdin.readline()
    adapter = importlib.import_module(spec["module"]).Adapter
    system = adapter(workload, spec["directory"], *spec["options"])
    for _ in range(steps):
        workload.step()
    _answer(answers, {})
    for line in sys.stdin:
        told = json.loads(line)
        _answer(answers, exercises.ALL[told.pop("exercise")](workload, system, **told))
    dist.barrier()
    system.close()
    _answer(answers, {})


def _steps_in(workload, seconds):
    """How many training steps that is, alike on all ranks."""
    began = time.perf_counter()
    workload.step()
    steps = torch.tensor([seconds / (time.perf_counter() - began)])
    dist.all_reduce(steps, op=dist.ReduceOp.MAX)
    return max(1, round(steps.item()))


def _end_with(parent):
    """Nobody is left to stop us: end, with everything that was started here."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGTERM)


def _answer(answers, content):
    print(json.dumps(content), file=answers, flush=True)


if __name__ == "__main__":
    main()

"""What a save costs a training that runs on a GPU: blocked time, and how much slower its steps are meanwhile.

    python -m benchmarks.bench_gpu --mib 4096 --rounds 5 --out benchmarks/results/gpu.json

Beside it what the bus gives: GB/s from host to device and back, from memory that is pinned and that is not. A model of
linear layers with AdamW, three times --mib with its state, trained on one device. Blocked: until `save()` returns.
Skipped with the reason where torch finds no CUDA device.
"""

import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from rich.table import Table

import dcpsvc
from benchmarks.common.facts import facts
from benchmarks.common.options import plain_parser
from benchmarks.common.report import write

WIDTH, BATCH, STEPS, TRIES = 4096, 2048, 20, 5
BUS_NBYTES = 1 << 30


def _bus():
    """GB/s of one large copy each way."""
    there = torch.empty(BUS_NBYTES, dtype=torch.uint8, device="cuda")
    found = {}
    for kind in ("pinned", "pageable"):
        here = torch.empty(BUS_NBYTES, dtype=torch.uint8, pin_memory=kind == "pinned").fill_(1)
        for way, (to, of) in {"d2h": (here, there), "h2d": (there, here)}.items():
            taken = statistics.median(_seconds(to, of) for _ in range(TRIES))
            found[f"{way}_{kind}_gb_per_s"] = BUS_NBYTES / 1e9 / taken
    return found


def _seconds(to, of):
    torch.cuda.synchronize()
    began = time.perf_counter()
    to.copy_(of, non_blocking=True)
    torch.cuda.synchronize()
    return time.perf_counter() - began


class Training:
    """A real step: forward, backward, AdamW."""

    def __init__(self, mib):
        torch.manual_seed(0)
        layers = max(1, (mib << 20) // (WIDTH * WIDTH * 4))
        self.model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(layers))).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self._x = torch.randn(BATCH, WIDTH, device="cuda")

    def steps(self, number):
        """Seconds of each."""
        taken = []
        for _ in range(number):
            began = time.perf_counter()
            self.model(self._x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
        return taken


def _round(ckpt, training, number):
    alone = statistics.median(training.steps(STEPS))
    began = time.perf_counter()
    pending = ckpt.save(number)
    blocked = time.perf_counter() - began
    beside = []
    while not pending.local.done() or not beside:
        beside += training.steps(1)
    pending.wait(600)
    return {
        "blocked_s": blocked, "staged_s": pending.timings.stage_s, "durable_s": pending.timings.write_s,
        "step_s": alone, "step_beside_s": statistics.median(beside), "first_step_s": beside[0],
        "steps_beside": len(beside),
    }  # fmt: skip


def measure(options):
    """Both ways of staging, in turn."""
    training = Training(options.mib)
    training.steps(STEPS)
    rows = []
    for staging in ("overlap", "block"):
        folder = Path(tempfile.mkdtemp(prefix="dcpsvc-gpu-", dir=options.dir))
        try:
            state = {"model": training.model, "optim": training.optimizer}
            how = {"local": folder / "local", "staging": staging, "save_last": False, "keep": dcpsvc.Latest(1)}
            with dcpsvc.Checkpointer(folder / "root", state, **how) as ckpt:
                _round(ckpt, training, 1)
                rounds = [_round(ckpt, training, number) for number in range(2, options.rounds + 2)]
        finally:
            shutil.rmtree(folder)
        row = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
        rows.append({"staging": staging, "slowdown": row["step_beside_s"] / row["step_s"], **row})
    return rows


def _draw(console, result):
    if "skipped" in result:
        console.print(f"skipped: {result['skipped']}")
        return
    console.print("  ".join(f"{name}: {value:.1f}" for name, value in result["bus"].items()), highlight=False)
    table = Table(box=None)
    for heading in result["rows"][0]:
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        table.add_row(*(value if isinstance(value, str) else f"{value:.4f}" for value in row.values()))
    console.print(table)


def main():
    warnings.simplefilter("ignore")
    made = plain_parser(__doc__)
    made.add_argument("--mib", type=int, default=1024, help="of parameters (default: %(default)s)")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--dir", default=None, help="where files are written (default: the temporary directory)")
    options = made.parse_args()
    result = {"facts": facts(options.dir or tempfile.gettempdir(), {"mib": options.mib, "rounds": options.rounds})}
    if torch.cuda.is_available():
        result["facts"]["gpu"] = torch.cuda.get_device_name()
        result |= {"bus": _bus(), "rows": measure(options)}
    else:
        result["skipped"] = f"torch {torch.__version__} finds no CUDA device here"
    write(options, result, lambda console: _draw(console, result))


if __name__ == "__main__":
    main()

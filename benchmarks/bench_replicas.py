"""What comparing replicas costs a save: by hash, byte by byte, and not at all, on ranks that hold the same.

    python -m benchmarks.bench_replicas --mib 256 --rounds 5 --out benchmarks/results/replicas.json

Ranks on one machine, each with the whole model and its AdamW state (three times --mib), as under DDP. The three ways
take turns within each round; medians over rounds, the slowest rank counts. Blocked: until `save()` returns, and what
the next step waits for. Committed: until the manifest is at the run root. CPU: of a process, all threads, until then.
"""

import contextlib
import functools
import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

import dcpsvc
from benchmarks.bench_resume import Model
from benchmarks.common.facts import facts
from benchmarks.common.options import plain_parser
from benchmarks.common.report import write

WAYS = ("off", "hash", "full")


def rank_main(rank, world, port, folder, size):
    """One rank; writes what it saw."""
    mib, rounds = size
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.manual_seed(0)
    model = Model(mib)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    rows, step = [], 0
    with contextlib.ExitStack() as open_ones:
        saving = {way: open_ones.enter_context(_checkpointer(folder, way, model, optimizer)) for way in WAYS}
        for number in range(rounds + 1):
            for turn in range(len(WAYS)):
                way = WAYS[(number + turn) % len(WAYS)]
                step += 1
                rows.append({"way": way} | _measured(saving[way], optimizer, step))
                saving[way].wait(600)  # what it deletes is not the next one's
    (folder / f"{rank}.json").write_text(json.dumps(rows[len(WAYS) :]))
    dist.destroy_process_group()


def _checkpointer(folder, way, model, optimizer):
    state = {"model": dcpsvc.Replicated(model, validate=way), "optim": optimizer}
    return dcpsvc.Checkpointer(
        folder / way, state, local=folder / "nvme" / way, keep=dcpsvc.Latest(1), save_last=False, sync_timeout_s=300
    )


def _measured(ckpt, optimizer, step):
    dist.barrier()
    began, cpu = time.perf_counter(), time.process_time()
    pending = ckpt.save(step)
    saved = time.perf_counter()
    optimizer.step()
    stepped = time.perf_counter()
    pending.wait(600)
    committed = time.perf_counter()
    used = time.process_time() - cpu
    dist.barrier()
    began_alone = time.perf_counter()
    optimizer.step()
    alone = time.perf_counter() - began_alone
    blocked = saved - began + max(0.0, stepped - saved - alone)
    return {"blocked_s": blocked, "committed_s": committed - began, "cpu_s": used}


def measure(folder, ranks, mib, rounds):
    """A row for each way."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(rank_main, (ranks, store.port, folder, (mib, rounds)), nprocs=ranks)
    seen = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    together = [
        {name: max(row[name] for row in rows) for name in rows[0] if name != "way"} | {"way": rows[0]["way"]}
        for rows in zip(*seen, strict=True)
    ]
    rows = []
    for way in WAYS:
        mine = [row for row in together if row["way"] == way]
        rows.append({name: statistics.median(row[name] for row in mine) for name in mine[0] if name != "way"})
        rows[-1] |= {"way": way}
    for row in rows:
        row |= {f"{name}_x_off": row[f"{name}_s"] / rows[0][f"{name}_s"] for name in ("blocked", "committed", "cpu")}
    return rows


def draw(result, console):
    """A table."""
    names = ("blocked", "committed", "cpu")
    console.print(f"\n{'validate':10}" + "".join(f"{f'{name} s':>14}{'x off':>8}" for name in names), highlight=False)
    for row in result["rows"]:
        numbers = "".join(f"{row[f'{name}_s']:14.3f}{row[f'{name}_x_off']:8.2f}" for name in names)
        console.print(f"{row['way']:10}{numbers}", highlight=False)


def main():
    made = plain_parser(__doc__)
    made.add_argument("--mib", type=int, default=256, help="of model (default: %(default)s)")
    made.add_argument("--ranks", type=int, default=2, help="on this machine (default: %(default)s)")
    made.add_argument("--rounds", type=int, default=5, help="of which the medians are (default: %(default)s)")
    made.add_argument("--dir", default=None, help="where files are (default: the temporary directory)")
    options = made.parse_args()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    folder = Path(tempfile.mkdtemp(prefix="replicas-", dir=options.dir))
    with contextlib.ExitStack() as after:
        after.callback(shutil.rmtree, folder, ignore_errors=True)
        about = {"mib": options.mib, "ranks": options.ranks, "rounds": options.rounds}
        result = {"facts": facts(folder, about)}
        result["rows"] = measure(folder, options.ranks, options.mib, options.rounds)
        write(options, result, functools.partial(draw, result))


if __name__ == "__main__":
    main()

"""Finished files to a real S3 server: dcpsvc beside the clients that are known to be fast, in one run.

    python -m benchmarks.bench_upload --rounds 5 --out benchmarks/results/upload.json

One file of 1 GiB, and 64 of 16 MiB, eight at a time. dcpsvc checksums every MiB before it sends it and has the server
prove every part, by CRC32C, by CRC32 as without the package, or by MD5; the others send. Parts of 16 MiB and eight
requests at once for all. Systems take turns, so that what the machine does besides meets all of them. Wanted beside
dcpsvc: boto3, obstore, s3torchconnector, crc32c, and ``make peers ARGS=awscli``; what is not there is left out, and
says so. The time of ``aws s3 cp`` is that of its process, which is what one waits for.

Then the file with half of it unchanged since an earlier one, at the speed of the server and over a link of 64 MiB/s.

Last: what a training loop of one thread, in the same process, loses while the file is uploaded again and again. The
loop has one core for itself; the uploader and the server share the others. Ours also with a limit on the rate, for on
a small machine the server itself takes the rest of the processor.
"""

import contextlib
import functools
import os
import resource
import shutil
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path

from benchmarks.common import ceph
from benchmarks.common.facts import facts
from benchmarks.common.options import plain_parser
from benchmarks.common.report import write
from benchmarks.common.senders import AT_ONCE, MIB, NEEDS, OURS, SYSTEMS, Boto3, Ours


def carry(system, paths, prefix):
    """Seconds, and processor seconds."""
    before, began = cpu_s(), time.perf_counter()
    if put_all := getattr(system, "put_all", None):
        put_all(paths, prefix)
    else:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda item: system.put(item[1], f"{prefix}/{item[0]}"), enumerate(paths)))
    return time.perf_counter() - began, cpu_s() - before


def cpu_s():
    """Of this process and of those it has started and seen end."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def empty(options, bucket):
    plain = ceph.client(options)
    for page in plain.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for item in page.get("Contents", []):
            plain.delete_object(Bucket=bucket, Key=item["Key"])


def measure(options, bucket, paths, rounds, names):
    systems, skipped = {}, {}
    for name in names:
        try:
            systems[name] = SYSTEMS[name](options, bucket)
        except Exception as err:  # noqa: BLE001 - a peer that cannot do it is said so, and the others are measured
            skipped[name] = f"{type(err).__name__}: {err}"
    taken = {name: [] for name in systems}
    for round_ in range(rounds + 1):
        order = list(systems)
        for name in order[round_ % len(order) :] + order[: round_ % len(order)]:
            try:
                taken[name].append(carry(systems[name], paths, f"{round_}"))
            except Exception as err:  # noqa: BLE001 - likewise
                skipped[name] = f"{type(err).__name__}: {err}"
                del systems[name], taken[name]
            empty(options, bucket)
    nbytes = sum(path.stat().st_size for path in paths)
    rows = [row(name, runs[1:], nbytes) for name, runs in taken.items()]
    best = max(row["mib_per_s"] for row in rows if not row["system"].startswith(OURS))
    for each in rows:
        each["of_best_peer"] = each["mib_per_s"] / best
    return rows + [{"system": name, "skipped": reason[:200]} for name, reason in skipped.items()]


def half_unchanged(options, bucket, path, rounds, nbytes_per_s=None):
    """The same file in full, and with its second half at the server already: copied there, if that is not slower."""
    from dcpsvc.storage.cargo import Earlier

    system, nbytes = Ours(options, bucket, nbytes_per_s=nbytes_per_s), path.stat().st_size
    system.put(path, "earlier")
    earlier = Earlier("earlier", ((nbytes // 2, nbytes),))
    taken, copied = {"all is sent": [], "half is there": []}, {}
    for round_ in range(rounds + 1):
        for name, known in zip(taken, (None, earlier), strict=True):
            began = time.perf_counter()
            copied[name] = system.put(path, f"{round_}", known).copied_nbytes / MIB
            taken[name].append(time.perf_counter() - began)
            system.store.delete(f"{round_}")
    medians = {name: statistics.median(runs[1:]) for name, runs in taken.items()}
    whole = medians["all is sent"]
    return [
        {
            "system": name,
            "seconds": seconds,
            "mib_per_s": nbytes / MIB / seconds,
            "of_sending": seconds / whole,
            "copied_mib_in_the_end": copied[name],
        }
        for name, seconds in medians.items()
    ]


def training(systems, path, rounds):
    """Steps a second of a loop of one thread, alone and beside uploads, by turns."""
    rows = []
    with cores_apart() as (said, cores):
        loop = Loop()
        for name, system in systems.items():
            ratios = []
            for round_ in range(rounds):
                alone = loop.steps_per_s()
                over = threading.Event()
                sender = threading.Thread(target=_upload_until, args=(system, path, over, round_, cores))
                sender.start()
                beside = loop.steps_per_s()
                over.set()
                sender.join()
                ratios.append(alone / beside)
            slower_by = statistics.median(ratios) - 1.0
            rows.append({"system": name, "slower_by": slower_by, "of_rounds": sorted(ratios), "cores": said})
    return rows


@contextlib.contextmanager
def cores_apart():
    """This thread on one core; every other one of this process, and the server, on the others."""
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        yield "one core for all", usable
        return
    mine, others = usable[:1], usable[1:]
    pin([os.getpid(), *ceph.processes()], others)
    os.sched_setaffinity(0, mine)
    try:
        yield f"training on core {mine[0]}; uploads and the server on {', '.join(map(str, others))}", others
    finally:
        pin([os.getpid(), *ceph.processes()], usable)


def pin(processes, cores):
    """All threads of these processes; a thread that has ended meanwhile needs none."""
    for process in processes:
        for thread in Path(f"/proc/{process}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread.name), cores)


def _upload_until(system, path, over, round_, cores):
    os.sched_setaffinity(0, cores)  # threads that it starts have the same
    count = 0
    while not over.is_set():
        system.put(path, f"training-{round_}-{count % 2}")
        count += 1


class Loop:
    """Steps of a small model, about 10 ms each."""

    def __init__(self):
        import torch

        torch.set_num_threads(1)
        self.model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(8)))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.batch = torch.randn(64, 512)

    def steps_per_s(self, seconds=4.0):
        count, began = 0, time.perf_counter()
        while (took := time.perf_counter() - began) < seconds:
            self.model(self.batch).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            count += 1
        return count / took


def row(name, runs, nbytes):
    seconds = statistics.median(run[0] for run in runs)
    return {
        "system": name,
        "seconds": seconds,
        "mib_per_s": nbytes / MIB / seconds,
        "cpu_s_per_gib": statistics.median(run[1] for run in runs) / (nbytes / 2**30),
    }


def draw(result, console):
    for title, rows in result.get("beside", {}).items():
        console.print(f"\n{title}")
        for each in rows:
            told = "  ".join(f"{name} {value:.2f}" for name, value in each.items() if isinstance(value, float))
            console.print(f"{each['system']:30}{told}", highlight=False)
    for title, rows in result["settings"].items():
        console.print(f"\n{title}")
        console.print(f"{'system':26}{'MiB/s':>8}{'of the best other':>20}{'CPU s/GiB':>12}", highlight=False)
        for each in rows:
            if "skipped" in each:
                console.print(f"{each['system']:26}  skipped: {each['skipped']}", highlight=False, markup=False)
            else:
                console.print(
                    f"{each['system']:26}{each['mib_per_s']:8.0f}{each['of_best_peer']:20.2f}{each['cpu_s_per_gib']:12.2f}",
                    highlight=False,
                )


def main():
    made = plain_parser(__doc__)
    made.add_argument("--rounds", type=int, default=5, help="of which the medians are (default: %(default)s)")
    made.add_argument("--mib", type=int, default=1024, help="in all (default: %(default)s)")
    made.add_argument("--files", type=int, default=64, help="in the second setting (default: %(default)s)")
    made.add_argument("--endpoint", default=None, help="of a server of yours; keys in DCPSVC_TEST_S3_KEY and _SECRET")
    made.add_argument("--dir", default=None, help="where files and the server's data are (default: temporary)")
    options = made.parse_args()
    names = [name for name in SYSTEMS if name not in NEEDS or util.find_spec(NEEDS[name])]
    folder = Path(tempfile.mkdtemp(prefix="upload-", dir=options.dir))
    try:
        result = {"facts": facts(folder, {"mib": options.mib, "rounds": options.rounds}), "settings": {}}
        with ceph.bucket(options.endpoint, options.dir) as (storage_options, bucket):
            for title, count in (("one file", 1), (f"{options.files} files", options.files)):
                paths = make_files(folder, options.mib * MIB, count)
                result["settings"][title] = measure(storage_options, bucket, paths, options.rounds, names)
                if count == 1:
                    result["beside"] = beside(storage_options, bucket, paths[0], options.rounds)
                for path in paths:
                    path.unlink()
        write(options, result, functools.partial(draw, result))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def beside(options, bucket, path, rounds):
    """What only concerns ours."""
    try:
        systems = {OURS: Ours(options, bucket), "dcpsvc, 64 MiB/s": Ours(options, bucket, nbytes_per_s=64 * MIB)}
        if util.find_spec("boto3"):
            systems["boto3"] = Boto3(options, bucket)
        return {
            "half unchanged": half_unchanged(options, bucket, path, rounds),
            "half unchanged, over 64 MiB/s": half_unchanged(options, bucket, path, rounds, 64 * MIB),
            "training while uploading": training(systems, path, rounds),
        }
    finally:
        empty(options, bucket)


def make_files(folder, nbytes, count):
    import numpy as np

    paths = [folder / str(number) for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(np.random.default_rng(number).bytes(nbytes // count))
    return paths


if __name__ == "__main__":
    main()

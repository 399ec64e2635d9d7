"""Finished files to a real S3 server: dcpsvc beside the clients that are known to be fast, in one run.

    python -m benchmarks.bench_upload --rounds 5 --out benchmarks/results/upload.json

One file of 1 GiB, and 64 of 16 MiB, eight at a time. dcpsvc checksums every MiB before it sends it and has the server
prove every part; the others send. Parts of 16 MiB and eight requests at once for all. Systems take turns, so that what
the machine does besides meets all of them. Wanted beside dcpsvc: boto3, obstore, s3torchconnector, crc32c; what is not
installed is left out.

Then the file with half of it unchanged since an earlier one, at the speed of the server and over a link of 64 MiB/s.

Last: what a training loop of one thread, in the same process, loses while the file is uploaded again and again. Ours
also with a limit on the rate, for on a small machine the server itself takes the rest of the processor.
"""

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

MIB = 2**20
PART = 16 * MIB
AT_ONCE = 8
OURS = "dcpsvc"


class Ours:
    """What the uploader does with a shard."""

    def __init__(self, options, bucket, kinds=None, nbytes_per_s=None):
        from dcpsvc.config import Limits
        from dcpsvc.storage import bodysum
        from dcpsvc.storage.objectstore import ObjectStore

        limits = Limits(concurrency=AT_ONCE, part_nbytes=PART, nbytes_per_s=nbytes_per_s)
        self.store = ObjectStore(f"s3://{bucket}/ours", options, limits=limits)
        if kinds:
            self.store._wire._checksum = (kinds(bodysum)(),)  # noqa: SLF001 - there is no option to be slower

    def put(self, path, key, earlier=None):
        from dcpsvc.format import digest
        from dcpsvc.storage.cargo import Cargo

        tables = {}

        def check(begin, view):
            tables[begin] = digest.table(view)

        if not self.store.carry(key, Cargo(path=path, check=check, earlier=earlier)).proven:
            raise SystemExit("the server proves nothing")


class S3fs:
    """s3fs, as it is."""

    def __init__(self, options, bucket):
        from s3fs import S3FileSystem

        self.fs, self.bucket = S3FileSystem(**options, skip_instance_cache=True), bucket

    def put(self, path, key):
        self.fs.put_file(str(path), f"{self.bucket}/{key}", chunksize=PART, max_concurrency=AT_ONCE)


class Boto3:
    """boto3's S3 Transfer, in Python or with the AWS CRT."""

    def __init__(self, options, bucket, preferred="classic"):
        import boto3
        from boto3.s3.transfer import TransferConfig
        from botocore.config import Config

        self.client = boto3.client(
            "s3", endpoint_url=options["endpoint_url"], aws_access_key_id=options["key"], region_name="us-east-1",
            aws_secret_access_key=options["secret"], config=Config(max_pool_connections=32),
        )  # fmt: skip
        self.bucket = bucket
        self.config = TransferConfig(
            multipart_chunksize=PART, max_concurrency=AT_ONCE, preferred_transfer_client=preferred
        )

    def put(self, path, key):
        self.client.upload_file(str(path), self.bucket, key, Config=self.config)


class Obstore:
    """object_store, in Rust; every body signed, or none."""

    def __init__(self, options, bucket, *, unsigned=False):
        from obstore.store import S3Store

        self.store = S3Store(
            bucket, endpoint=options["endpoint_url"], access_key_id=options["key"], region="us-east-1",
            secret_access_key=options["secret"], unsigned_payload=unsigned, client_options={"allow_http": True},
        )  # fmt: skip

    def put(self, path, key):
        import obstore

        obstore.put(self.store, key, Path(path), chunk_size=PART, max_concurrency=AT_ONCE)


class Crt:
    """s3torchconnector: the AWS CRT behind a file object."""

    def __init__(self, options, bucket):
        from s3torchconnectorclient._mountpoint_s3_client import MountpointS3Client

        os.environ |= {"AWS_ACCESS_KEY_ID": options["key"], "AWS_SECRET_ACCESS_KEY": options["secret"]}
        self.client = MountpointS3Client(
            region="us-east-1", part_size=PART, endpoint=options["endpoint_url"], force_path_style=True,
            user_agent_prefix="bench",
        )  # fmt: skip
        self.bucket = bucket

    def put(self, path, key):
        stream = self.client.put_object(self.bucket, key)
        with Path(path).open("rb") as file:
            while data := file.read(PART):
                stream.write(data)
        stream.close()


class Fsspec:
    """DCP's own writer for such places, with one tensor of that size."""

    def __init__(self, options, bucket):
        import torch

        self.options, self.bucket, self.torch = options, bucket, torch

    def put(self, path, key):
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        tensor = self.torch.from_file(str(path), size=Path(path).stat().st_size, dtype=self.torch.uint8)
        dcp.save({"x": tensor}, storage_writer=FsspecWriter(f"s3://{self.bucket}/{key}", **self.options), no_dist=True)


SYSTEMS = {
    OURS: Ours,
    "dcpsvc, CRC32": functools.partial(Ours, kinds=lambda module: module.crc32),
    "dcpsvc, MD5": functools.partial(Ours, kinds=lambda module: module.Md5),
    "s3fs": S3fs,
    "boto3": Boto3,
    "obstore": Obstore,
    "obstore, unsigned": functools.partial(Obstore, unsigned=True),
    "s3torchconnector (CRT)": Crt,
    "DCP FsspecWriter": Fsspec,
}
NEEDS = {
    "boto3": "boto3",
    "obstore": "obstore",
    "obstore, unsigned": "obstore",
    "s3torchconnector (CRT)": "s3torchconnector",
}
ONLY_WHOLE = {"DCP FsspecWriter"}


def carry(system, paths, prefix):
    """Seconds, and processor seconds of this process."""
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda item: system.put(item[1], f"{prefix}/{item[0]}"), enumerate(paths)))
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


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
    """The same file in full, and with its second half at the server already."""
    from dcpsvc.storage.cargo import Earlier

    system, nbytes = Ours(options, bucket, nbytes_per_s=nbytes_per_s), path.stat().st_size
    system.put(path, "earlier")
    earlier = Earlier("earlier", ((nbytes // 2, nbytes),))
    taken = {"all is sent": [], "half is copied by the server": []}
    for round_ in range(rounds + 1):
        for name, known in zip(taken, (None, earlier), strict=True):
            began = time.perf_counter()
            system.put(path, f"{round_}", known)
            taken[name].append(time.perf_counter() - began)
            system.store.delete(f"{round_}")
    medians = {name: statistics.median(runs[1:]) for name, runs in taken.items()}
    whole = medians["all is sent"]
    return [
        {"system": name, "seconds": seconds, "mib_per_s": nbytes / MIB / seconds, "of_sending": seconds / whole}
        for name, seconds in medians.items()
    ]


def training(systems, path, rounds):
    """Steps a second of a loop of one thread, alone and beside uploads, by turns."""
    loop, rows = Loop(), []
    for name, system in systems.items():
        ratios = []
        for round_ in range(rounds):
            alone = loop.steps_per_s()
            over = threading.Event()
            sender = threading.Thread(target=_upload_until, args=(system, path, over, round_))
            sender.start()
            beside = loop.steps_per_s()
            over.set()
            sender.join()
            ratios.append(alone / beside)
        rows.append({"system": name, "slower_by": statistics.median(ratios) - 1.0, "of_rounds": sorted(ratios)})
    return rows


def _upload_until(system, path, over, round_):
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
                chosen = [name for name in names if count == 1 or name not in ONLY_WHOLE]
                result["settings"][title] = measure(storage_options, bucket, paths, options.rounds, chosen)
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

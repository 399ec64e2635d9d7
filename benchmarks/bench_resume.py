"""Reading a checkpoint back: dcpsvc beside plain reads of the same files, DCP and safetensors, warm and cold.

    python -m benchmarks.bench_resume --mib 1024 --rounds 5 --out benchmarks/results/resume.json

dcpsvc proves every block and only then touches the model; the others load in place and prove nothing. Plain reads go to
memory that is already there, as everybody else's do. Cold: the files' pages are dropped from the page cache before.
Memory: peak beyond the model's own, in multiples of it. Then a model with Adam, each time in a new process:
Checkpointer.resume() from the node's own disk, and how long it takes from the start of the process, imports and the
making of the Checkpointer included; over: peak of host memory beyond what model and optimizer need, in MiB. What the
proof before costs: benchmarks.bench_ceiling.
Below, bytes fetched per byte needed when other ranks read a transformer than wrote it: each by itself, and from the run
root when they share what they read. With --s3 the same from a real S3 server, beside downloads by obstore, boto3, the
AWS CRT and DCP's FsspecReader; then model and Adam from there, by a node whose disk has nothing.
"""

import contextlib
import functools
import logging
import os
import shutil
import statistics
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

import dcpsvc
from benchmarks.common import ceph, resharding
from benchmarks.common.facts import facts
from benchmarks.common.lives import drop, from_s3, local_tier
from benchmarks.common.options import plain_parser
from benchmarks.common.report import write

MIB = 2**20
AT_ONCE = 8
PIECE = 8 * MIB
WIDTH = 2048


class Model(torch.nn.Module):
    """Linear layers, about so many MiB."""

    def __init__(self, mib):
        super().__init__()
        count = max(1, round(mib * MIB / (4 * WIDTH * WIDTH)))
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(count))

    @property
    def nbytes(self):
        return sum(parameter.nbytes for parameter in self.parameters())


def spans(path):
    size = path.stat().st_size
    return [(path, begin, min(begin + PIECE, size)) for begin in range(0, size, PIECE)]


def touched(shards):
    """Memory for each, as warm as a model's."""
    return {path: memoryview(torch.ones(path.stat().st_size, dtype=torch.uint8).numpy()) for path in shards}


def plain(shards, memory):
    """The same bytes, and nothing else."""
    work = [span for path in shards for span in spans(path)]
    files = {path: os.open(path, os.O_RDONLY) for path in shards}

    def one(span):
        path, at, end = span
        while at < end:
            at += os.preadv(files[path], [memory[path][at:end]], at)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(one, work))
    for descriptor in files.values():
        os.close(descriptor)


def safetensors(shards, _):
    from safetensors.torch import load_file

    for path in shards:
        {name: tensor.clone() for name, tensor in load_file(path).items()}


def peak(work):
    """Seconds, and how far resident memory rose above what it was."""
    Path("/proc/self/clear_refs").write_text("5")
    before, began = _status("VmRSS"), time.perf_counter()
    work()
    return time.perf_counter() - began, _status("VmHWM") - before


def _status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def compare(systems, rounds, nbytes, prepare=lambda: None):
    """Systems take turns."""
    taken, skipped = {name: [] for name in systems}, {}
    for _ in range(rounds + 1):
        for name, work in systems.items():
            if name in skipped:
                continue
            prepare()
            try:
                taken[name].append(peak(work))
            except Exception as err:  # noqa: BLE001 - a peer that cannot do it is said so, and the others are measured
                skipped[name] = f"{type(err).__name__}: {err}"[:200]
    rows = []
    for name, runs in taken.items():
        if name in skipped:
            rows.append({"system": name, "skipped": skipped[name]})
            continue
        seconds = statistics.median(run[0] for run in runs[1:])
        memory = statistics.median(run[1] for run in runs[1:]) / nbytes
        rows.append({"system": name, "seconds": seconds, "gib_per_s": nbytes / 2**30 / seconds, "memory": memory})
    ours = next(row["seconds"] for row in rows if row["system"] == "dcpsvc")
    for row in rows:
        if "seconds" in row:
            row["x_ours"] = row["seconds"] / ours
    return rows


def local(options, folder, model):
    """From a directory."""
    root, other = folder / "root", folder / "dcp"
    save(root, model, folder)
    dcp.save({"model": model.state_dict()}, checkpoint_id=other, no_dist=True)
    shards = sorted((root / "data").rglob("*.safetensors"))
    state = {"model": model.state_dict()}
    systems = {
        "dcpsvc": lambda: dcpsvc.load(root, {"model": model}),
        "plain reads": functools.partial(plain, shards, touched(shards)),
        "safetensors": functools.partial(safetensors, shards, None),
        "DCP load": lambda: dcp.load(state, checkpoint_id=other, no_dist=True),
        "DCP load, our reader": lambda: dcp.load(
            {f"model.{name}": tensor for name, tensor in state["model"].items()},
            storage_reader=dcpsvc.storage_reader(root), no_dist=True,
        ),
    }  # fmt: skip
    return {
        "warm": compare(systems, options.rounds, model.nbytes),
        "cold": compare(systems, options.rounds, model.nbytes, lambda: drop(folder)),
    }


def save(root, model, folder, **options):
    with dcpsvc.Checkpointer(root, {"model": model}, local=folder / "nvme", save_last=False, **options) as ckpt:
        ckpt.save(1).wait(600)


def remote(options, folder, model):
    """From a real S3 server."""
    with ceph.bucket(options.endpoint, folder) as (storage_options, bucket):
        root = f"s3://{bucket}/run"
        save(root, model, folder, storage_options=storage_options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

        there = f"s3://{bucket}/dcp"
        state = {"model": model.state_dict()}
        dcp.save(state, storage_writer=FsspecWriter(there, **storage_options), no_dist=True)
        plain_client = ceph.client(storage_options)
        keys = [
            (item["Key"], item["Size"])
            for item in plain_client.list_objects_v2(Bucket=bucket, Prefix="run/data/")["Contents"]
        ]
        systems = {
            "dcpsvc": lambda: dcpsvc.load(root, {"model": model}, storage_options=storage_options),
            "obstore": functools.partial(obstore_download, storage_options, bucket, keys),
            "boto3": functools.partial(boto3_download, storage_options, bucket, keys, folder),
            "s3torchconnector (CRT)": functools.partial(crt_download, storage_options, bucket, keys),
            "DCP FsspecReader": lambda: dcp.load(
                state, storage_reader=FsspecReader(there, **storage_options), no_dist=True
            ),
        }
        found = {"S3": compare(systems, options.rounds, model.nbytes)}
        (folder / "far").mkdir()
        return found | from_s3(options, folder / "far", f"s3://{bucket}/life", storage_options)


def obstore_download(options, bucket, keys):
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        bucket, endpoint=options["endpoint_url"], access_key_id=options["key"], region="us-east-1",
        secret_access_key=options["secret"], client_options={"allow_http": True},
    )  # fmt: skip
    for key, nbytes in keys:
        memory = memoryview(torch.empty(nbytes, dtype=torch.uint8).numpy())

        def one(begin, key=key, memory=memory, nbytes=nbytes):
            end = min(begin + PIECE, nbytes)
            memory[begin:end] = memoryview(obstore.get_range(store, key, start=begin, end=end))

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(one, range(0, nbytes, PIECE)))


def boto3_download(options, bucket, keys, folder):
    import boto3
    from boto3.s3.transfer import TransferConfig

    client = boto3.client(
        "s3", endpoint_url=options["endpoint_url"], aws_access_key_id=options["key"], region_name="us-east-1",
        aws_secret_access_key=options["secret"],
    )  # fmt: skip
    for key, _ in keys:
        client.download_file(
            bucket,
            key,
            str(folder / "download"),
            Config=TransferConfig(multipart_chunksize=PIECE, max_concurrency=AT_ONCE),
        )


def crt_download(options, bucket, keys):
    from s3torchconnectorclient._mountpoint_s3_client import MountpointS3Client

    os.environ |= {"AWS_ACCESS_KEY_ID": options["key"], "AWS_SECRET_ACCESS_KEY": options["secret"]}
    client = MountpointS3Client(
        region="us-east-1", part_size=PIECE, endpoint=options["endpoint_url"], force_path_style=True,
        user_agent_prefix="bench",
    )  # fmt: skip
    for key, nbytes in keys:
        memory, at = memoryview(torch.empty(nbytes, dtype=torch.uint8).numpy()), 0
        for data in client.get_object(bucket, key):
            memory[at : at + len(data)] = data
            at += len(data)
        if at != nbytes:
            raise RuntimeError(f"{at} of {nbytes} bytes came")


RESHARDED = (
    (4, 4, "FSDP2"), (4, 2, "FSDP2"), (2, 4, "FSDP2"), (4, 3, "FSDP2"), (4, 8, "FSDP2"), (4, 1, "FSDP2"), (4, 4, "TP"),
)  # fmt: skip


def draw(result, console):
    for title, rows in result["settings"].items():
        console.print(f"\n{title}\n{'system':26}{'s':>8}{'x ours':>8}{'GiB/s':>8}{'memory x':>10}", highlight=False)
        for row in rows:
            if "skipped" in row:
                console.print(f"{row['system']:26}  skipped: {row['skipped']}", highlight=False, markup=False)
                continue
            numbers = f"{row['seconds']:8.3f}{row['x_ours']:8.2f}{row['gib_per_s']:8.2f}{row['memory']:10.2f}"
            over = f"{row['over_mib']:8.0f} MiB over" if "over_mib" in row else ""
            over += f"{row['open_s'] * 1e3:8.0f} ms to open" if row.get("open_s", 0) > 1e-3 else ""
            over += f"{row['fetched']:8.3f} bytes fetched for each needed" if "fetched" in row else ""
            console.print(f"{row['system']:26}{numbers}{over}", highlight=False)
    console.print("\nbytes fetched per byte needed", highlight=False)
    for row in result["resharded"]:
        by_itself, shared = row["each_by_itself"], row["from_root_when_shared"]
        console.print(f"{row['ranks']:12}{by_itself:8.3f} each by itself{shared:8.3f} together", highlight=False)


def main():
    made = plain_parser(__doc__)
    made.add_argument("--mib", type=int, default=1024, help="of model (default: %(default)s)")
    made.add_argument("--rounds", type=int, default=5, help="of which the medians are (default: %(default)s)")
    made.add_argument("--s3", action="store_true", help="from a real S3 server too")
    made.add_argument("--endpoint", default=None, help="of a server of yours; keys in DCPSVC_TEST_S3_KEY and _SECRET")
    made.add_argument("--dir", default=None, help="where files are (default: the temporary directory)")
    options = made.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("dcpsvc").setLevel(logging.ERROR)  # each load() would say that it has no local tier
    folder = Path(tempfile.mkdtemp(prefix="resume-", dir=options.dir))
    with contextlib.ExitStack() as after:
        after.callback(shutil.rmtree, folder, ignore_errors=True)
        model = Model(options.mib)
        result = {"facts": facts(folder, {"mib": options.mib, "rounds": options.rounds})}
        result["settings"] = local(options, folder, model)
        (folder / "life").mkdir()
        result["settings"] |= local_tier(options, folder / "life")
        result["resharded"] = [resharding.fetched(*each) for each in RESHARDED]
        if options.s3:
            result["settings"] |= remote(options, folder, model)
        write(options, result, functools.partial(draw, result))


if __name__ == "__main__":
    main()

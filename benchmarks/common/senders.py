"""Clients that send files to an S3 server: ours, and those that are known to be fast."""

import functools
import os
import subprocess
import tempfile
from pathlib import Path

from benchmarks.peers import install

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

        carried = self.store.carry(key, Cargo(path=path, check=check, earlier=earlier))
        if not carried.proven:
            raise SystemExit("the server proves nothing")
        return carried


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


class AwsCli:
    """``aws s3 cp``, in an environment of its own; all files in one command."""

    def __init__(self, options, bucket):
        python = install.python_of("awscli")
        if python is None:
            raise RuntimeError(install.reason("awscli"))
        self.aws, self.bucket = python.with_name("aws"), bucket
        self.env = os.environ | {
            "AWS_ACCESS_KEY_ID": options["key"], "AWS_SECRET_ACCESS_KEY": options["secret"],
            "AWS_ENDPOINT_URL": options["endpoint_url"], "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip

    def put_all(self, paths, prefix):
        with tempfile.TemporaryDirectory(dir=paths[0].parent) as folder:
            config = Path(folder, "config")
            chunk, at_once = f"multipart_chunksize = {PART}", f"max_concurrent_requests = {AT_ONCE}"
            config.write_text(f"[default]\ns3 =\n  {chunk}\n  {at_once}\n  multipart_threshold = {PART + 1}\n")
            source = Path(folder, "files")
            source.mkdir()
            for number, path in enumerate(paths):
                (source / str(number)).hardlink_to(path)
            command = [self.aws, "s3", "cp", "--quiet", "--recursive", source, f"s3://{self.bucket}/{prefix}"]
            env = self.env | {"AWS_CONFIG_FILE": str(config)}
            subprocess.run(command, env=env, check=True, timeout=600, stdin=subprocess.DEVNULL)


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
    "aws s3 cp": AwsCli,
    "DCP FsspecWriter": Fsspec,
}
NEEDS = {
    "boto3": "boto3",
    "obstore": "obstore",
    "obstore, unsigned": "obstore",
    "s3torchconnector (CRT)": "s3torchconnector",
}

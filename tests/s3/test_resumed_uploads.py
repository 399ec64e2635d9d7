"""An upload that was cut short goes on where it ended: only what is missing is sent, and nothing false is believed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import dcpsvc
from dcpsvc.config import Limits
from dcpsvc.stages.upload import ensure_shard
from dcpsvc.storage.bodysum import candidates
from dcpsvc.storage.open import open_store
from tests.s3 import spoiling as faults
from tests.unit.one_shard import KEY, make_shard

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.storage.base import Store
    from tests.s3.servers import Server
    from tests.s3.spoiling import Proxy, Spoiler

    Truth = Callable[[], tuple[dict[str, bytes], int]]

pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]

MIB = 2**20
PART = 5 * MIB
CONTENT, RECORD = make_shard(4 * PART - MIB)
PARTS = "^PUT .*partNumber"
SOURCE = str(Path(dcpsvc.__file__).parents[1])

RANK = """
import json, sys, torch, dcpsvc

root, options, local, nbytes = sys.argv[1:]
state = {"w": torch.randint(0, 256, (int(nbytes),), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))}
with dcpsvc.Checkpointer(root, state, local=local, storage_options=json.loads(options), save_last=False) as ckpt:
    print("resumed", ckpt.resume(), flush=True)
    ckpt.save(1).wait(100)
"""


def parts(seen: list[str]) -> list[str]:
    return [line for line in seen if line.startswith("PUT") and "partNumber" in line]


def test_a_rank_killed_in_the_middle_of_256_mib_sends_only_the_missing_parts_after_its_restart(
    run_root: str, options: dict[str, object], between: Proxy, tmp_path: Path
) -> None:
    nbytes, over, answered = 256 * MIB, threading.Event(), threading.Semaphore(0)
    options["config_kwargs"] = {}  # patient: on a busy machine a part that is sent twice would count twice

    def passes(spoiler: Spoiler) -> None:
        faults.passes(spoiler)
        answered.release()

    between.spoil(PARTS, passes, 7)
    between.spoil(PARTS, faults.holds_until(over), 1000)
    argv = [sys.executable, "-c", RANK, run_root, json.dumps(options), str(tmp_path / "local"), str(nbytes)]
    with subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": SOURCE}) as rank:
        assert all(answered.acquire(timeout=100) for _ in range(7))
        rank.send_signal(signal.SIGKILL)
    assert rank.returncode == -signal.SIGKILL
    over.set()
    between.calm()
    between.seen.clear()
    state = {"w": torch.zeros(nbytes, dtype=torch.uint8)}
    with dcpsvc.Checkpointer(
        run_root, state, local=tmp_path / "local", storage_options=options, save_last=False
    ) as ckpt:
        assert ckpt.resume() == 1
    wanted = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(state["w"], wanted)
    assert len(parts(between.seen)) == 17 - 7  # of 16 MiB; the last one holds the table
    back = {"w": torch.zeros(nbytes, dtype=torch.uint8)}
    dcpsvc.load(run_root, back, storage_options=options)  # from the run root
    assert torch.equal(back["w"], wanted)


@pytest.fixture
def store(run_root: str, options: dict[str, object]) -> Store:
    return open_store(run_root, options, limits=Limits(part_nbytes=PART, concurrency=2, patience_s=5.0))


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "shard"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def begin(s3_server: Server, run_root: str) -> Callable[..., str]:
    """What a killed writer left: an upload to the shard's key with some parts."""
    client, prefix = s3_server.client(), run_root.removeprefix(f"s3://{s3_server.bucket}/")

    def begin(bodies: dict[int, bytes], *, checksums: bool = True, key: str = KEY) -> str:
        where = {"Bucket": s3_server.bucket, "Key": f"{prefix}/{key}"}
        kind = candidates()[0]
        upload = client.create_multipart_upload(**where, **(kind.upload if checksums else {}))["UploadId"]
        for number, body in bodies.items():
            sums = kind.listed(kind.of(body)) if checksums else {}
            client.upload_part(**where, UploadId=upload, PartNumber=number, Body=body, **sums)
        return str(upload)

    return begin


def part(number: int) -> bytes:
    return CONTENT[(number - 1) * PART : number * PART]


def test_what_has_arrived_is_not_sent_again(
    store: Store, between: Proxy, shard: Path, truth: Truth, begin: Callable[..., str]
) -> None:
    begin({1: part(1), 3: part(3)})
    ensure_shard(store, RECORD, shard)
    assert sorted(line.partition("partNumber=")[2][0] for line in parts(between.seen)) == ["2", "4"]
    assert truth() == ({KEY: CONTENT}, 0)


def test_a_part_of_other_bytes_or_of_another_size_is_sent_again(
    store: Store, between: Proxy, shard: Path, truth: Truth, begin: Callable[..., str]
) -> None:
    begin({1: part(2), 2: part(2)[:-1], 3: part(3)})
    ensure_shard(store, RECORD, shard)
    assert len(parts(between.seen)) == 3
    assert truth() == ({KEY: CONTENT}, 0)


def test_one_with_more_parts_than_the_shard_has_is_ended_and_all_is_sent(
    store: Store, between: Proxy, shard: Path, truth: Truth, begin: Callable[..., str]
) -> None:
    begin({1: part(1), 9: part(1)})
    ensure_shard(store, RECORD, shard)
    assert len(parts(between.seen)) == 4
    assert truth() == ({KEY: CONTENT}, 0)


def test_the_newest_of_several_goes_on_and_the_others_end_but_not_those_of_other_keys(
    store: Store, between: Proxy, shard: Path, truth: Truth, begin: Callable[..., str]
) -> None:
    begin({1: part(1)})
    threading.Event().wait(1.1)  # the server's clock counts in seconds
    begin({1: part(1), 2: part(2)})
    begin({1: part(1)}, key=f"{KEY}.other")
    ensure_shard(store, RECORD, shard)
    assert len(parts(between.seen)) == 2
    assert truth() == ({KEY: CONTENT}, 1)


def test_one_that_was_begun_without_checksums_is_ended_and_all_is_sent(
    store: Store, between: Proxy, shard: Path, truth: Truth, begin: Callable[..., str]
) -> None:
    begin({}, checksums=False)
    ensure_shard(store, RECORD, shard)
    assert len(parts(between.seen)) == 4
    assert truth() == ({KEY: CONTENT}, 0)


@pytest.mark.parametrize("where", ["^GET .*[?&]uploads", "^GET .*uploadId"], ids=["list uploads", "list parts"])
def test_without_the_right_to_look_all_is_sent_and_no_error_comes_of_it(
    store: Store, between: Proxy, shard: Path, truth: Truth, begin: Callable[..., str], *, where: str
) -> None:
    begin({1: part(1)})
    between.spoil(where, faults.says(403, "AccessDenied"), 9)
    ensure_shard(store, RECORD, shard)
    assert len(parts(between.seen)) == 4
    assert truth() == ({KEY: CONTENT}, 1)  # that of the killed writer: a later clean-up has the right, or nobody


def test_a_shard_that_is_whole_at_the_run_root_is_not_sent_at_all(store: Store, between: Proxy, shard: Path) -> None:
    ensure_shard(store, RECORD, shard)
    between.seen.clear()
    ensure_shard(store, RECORD, shard)
    assert parts(between.seen) == []

"""A link that is slow, or stands still in the middle: slow is no error, what stands still is tried again in time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from store_contract import MIB

from dcpsvc.config import Limits
from dcpsvc.stages.upload import upload_shard
from dcpsvc.storage.open import open_store
from dcpsvc.storage.shards import VerifiedShard
from tests.s3 import spoiling as faults
from tests.unit.one_shard import KEY, make_shard

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dcpsvc.storage.base import Store
    from tests.s3.spoiling import Fault, Proxy

    Truth = Callable[[], tuple[dict[str, bytes], int]]

pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]

PART = 12 * MIB
CONTENT, RECORD = make_shard(2 * PART - MIB)
PARTS = "^PUT .*partNumber"
READS = "^GET .*rank-"
SLOW = 2.5 * MIB
"""Bytes a second; so much that a whole part takes longer than any timeout here, and a step of it does not."""


@pytest.fixture
def store(run_root: str, options: dict[str, Any]) -> Store:
    return open_store(run_root, options, limits=Limits(part_nbytes=PART, concurrency=2, patience_s=30.0))


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "shard"
    path.write_bytes(CONTENT)
    return path


def test_an_upload_over_a_slow_link_gets_through_without_being_sent_twice(
    store: Store, between: Proxy, shard: Path, truth: Truth
) -> None:
    between.spoil(PARTS, faults.trickles(SLOW), 2)
    upload_shard(store, RECORD, shard)
    assert len([line for line in between.seen if "partNumber" in line]) == 2
    assert truth() == ({KEY: CONTENT}, 0)


def test_a_read_over_a_slow_link_gets_through_without_being_asked_for_twice(
    store: Store, between: Proxy, shard: Path
) -> None:
    upload_shard(store, RECORD, shard)
    between.seen.clear()
    VerifiedShard([store], RECORD).verify()
    fast = len(between.seen)
    between.seen.clear()
    between.spoil(READS, faults.trickles(SLOW), 1000)
    VerifiedShard([store], RECORD).verify()
    assert len(between.seen) == fast


@pytest.mark.parametrize(
    "fault", [faults.stalls_in_the_request, faults.stalls_in_the_answer], ids=["in the request", "in the answer"]
)
def test_an_upload_that_stalls_in_the_middle_gets_through_whole_and_in_time(
    store: Store, between: Proxy, shard: Path, truth: Truth, fault: Fault
) -> None:
    between.spoil(PARTS if fault is faults.stalls_in_the_request else "^POST .*uploadId", fault)
    began = time.monotonic()
    upload_shard(store, RECORD, shard)
    assert between.left == 0
    assert time.monotonic() - began < 19, "it waited for the network to give up"
    assert truth() == ({KEY: CONTENT}, 0)


def test_a_read_that_stalls_in_the_middle_gets_through_whole_and_in_time(
    store: Store, between: Proxy, shard: Path
) -> None:
    upload_shard(store, RECORD, shard)
    between.spoil(READS, faults.stalls_in_the_answer, 2)
    began = time.monotonic()
    VerifiedShard([store], RECORD).verify()
    assert between.left == 0
    assert time.monotonic() - began < 19, "it waited for the network to give up"

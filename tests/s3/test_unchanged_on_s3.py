"""What an earlier checkpoint has is copied by the server, not sent again; and each checkpoint stands by itself."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

import dcpsvc
from dcpsvc.config import Limits
from dcpsvc.errors import CorruptShardError
from dcpsvc.format.keys import Attempt
from dcpsvc.stages.upload import Known, upload_shard
from dcpsvc.storage.open import open_store
from dcpsvc.storage.shards import VerifiedShard
from tests.s3 import spoiling as faults
from tests.unit.one_shard import make_shard

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dcpsvc.events import Event
    from dcpsvc.storage.base import Store
    from tests.s3.servers import Server
    from tests.s3.spoiling import Fault, Proxy

    Truth = Callable[[], tuple[dict[str, bytes], int]]

pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]

MIB = 2**20
PART = 5 * MIB
HALF = 20 * MIB
BEFORE, AFTER = Attempt(1, "cafe-0").shard(0), Attempt(2, "cafe-0").shard(0)
FROZEN, OLD, NEW = (random.Random(seed).randbytes(HALF) for seed in (1, 2, 3))
EARLIER, EARLIER_RECORD = make_shard(2 * HALF, BEFORE, OLD + FROZEN)
CONTENT, RECORD = make_shard(2 * HALF, AFTER, NEW + FROZEN)
KNOWN = Known(EARLIER_RECORD, [])
COPIES = "^PUT .*partNumber.* copy$"


@pytest.fixture
def store(run_root: str, options: dict[str, object]) -> Store:
    return open_store(run_root, options, limits=Limits(part_nbytes=PART, concurrency=2, patience_s=5.0))


@pytest.fixture
def shard(store: Store, tmp_path: Path) -> Path:
    """The new one, on this disk; the earlier one lies at the run root."""
    earlier, path = tmp_path / "earlier", tmp_path / "shard"
    earlier.write_bytes(EARLIER)
    path.write_bytes(CONTENT)
    upload_shard(store, EARLIER_RECORD, earlier)
    return path


@pytest.fixture
def earlier_key(s3_server: Server, run_root: str) -> str:
    """For a stranger."""
    return f"{run_root.removeprefix(f's3://{s3_server.bucket}/')}/{BEFORE}"


@pytest.fixture
def delete_earlier(s3_server: Server, earlier_key: str) -> Callable[[], object]:
    return lambda: s3_server.client().delete_object(Bucket=s3_server.bucket, Key=earlier_key)


def copies(seen: list[str]) -> list[str]:
    return [line for line in seen if line.endswith(" copy")]


def test_half_that_is_unchanged_is_copied_and_the_new_shard_outlives_the_earlier_one(
    store: Store, between: Proxy, shard: Path, truth: Truth
) -> None:
    before = between.body_nbytes["sent"]
    carried = upload_shard(store, RECORD, shard, KNOWN)
    assert carried.copied_nbytes >= HALF - PART
    assert between.body_nbytes["sent"] - before < HALF + PART + MIB
    assert truth() == ({BEFORE: EARLIER, AFTER: CONTENT}, 0)
    store.delete(BEFORE)
    VerifiedShard([store], RECORD).verify()


def test_without_an_earlier_shard_or_with_one_of_another_size_all_is_sent(
    store: Store, between: Proxy, shard: Path, truth: Truth
) -> None:
    _, other = make_shard(2 * HALF + 1, BEFORE)
    assert upload_shard(store, RECORD, shard, Known(other, [])).copied_nbytes == 0
    assert copies(between.seen) == []
    assert truth()[0][AFTER] == CONTENT


@pytest.mark.parametrize("at", ["before the first copy", "between two copies"])
def test_an_earlier_shard_that_is_deleted_meanwhile_costs_only_the_sending(
    store: Store, between: Proxy, shard: Path, truth: Truth, delete_earlier: Callable[[], object], *, at: str
) -> None:
    if at == "between two copies":
        between.spoil(COPIES, faults.passes)
    between.spoil(COPIES, faults.does_first(delete_earlier))
    carried = upload_shard(store, RECORD, shard, KNOWN)
    assert between.left == 0
    assert carried.proven
    assert carried.copied_nbytes < HALF - PART
    assert truth() == ({AFTER: CONTENT}, 0)


def test_an_earlier_shard_that_rotted_at_the_server_is_noticed_and_only_what_is_intact_is_copied(
    store: Store, shard: Path, truth: Truth, s3_server: Server, earlier_key: str
) -> None:
    at = len(CONTENT) - 8 * MIB
    rotted = EARLIER[:at] + bytes([EARLIER[at] ^ 1]) + EARLIER[at + 1 :]
    s3_server.client().put_object(Bucket=s3_server.bucket, Key=earlier_key, Body=rotted)
    carried = upload_shard(store, RECORD, shard, KNOWN)
    assert 0 < carried.copied_nbytes < HALF - PART
    assert truth() == ({BEFORE: rotted, AFTER: CONTENT}, 0)


@pytest.mark.parametrize(
    "fault",
    [
        faults.says(501, "NotImplemented"),
        faults.says(403, "AccessDenied"),
        faults.says(503, "SlowDown"),
        faults.resets_in_the_answer,
        faults.says_nothing,
    ],
    ids=["cannot copy", "may not read", "busy", "breaks off", "does not know"],
)
def test_a_server_that_copies_nothing_gets_all_of_it(
    store: Store, between: Proxy, shard: Path, truth: Truth, fault: Fault
) -> None:
    between.spoil(COPIES, fault, 1000)
    carried = upload_shard(store, RECORD, shard, KNOWN)
    assert (carried.proven, carried.copied_nbytes) == (True, 0)
    assert truth() == ({BEFORE: EARLIER, AFTER: CONTENT}, 0)


@pytest.mark.parametrize("tells", [True, False], ids=["a checksum", "nothing"])
def test_a_server_whose_etags_are_no_checksums_is_believed_only_if_it_tells_one(
    store: Store, between: Proxy, shard: Path, truth: Truth, *, tells: bool
) -> None:
    between.spoil(COPIES, faults.tells_another_etag, 1000)
    if not tells:
        between.spoil("^GET .*uploadId", faults.says(403, "AccessDenied"), 1000)
    carried = upload_shard(store, RECORD, shard, KNOWN)
    assert carried.proven
    assert (carried.copied_nbytes > 0) is tells
    assert truth() == ({BEFORE: EARLIER, AFTER: CONTENT}, 0)


def test_copies_that_the_server_makes_no_object_of_are_followed_by_a_plain_upload(
    store: Store, between: Proxy, shard: Path, truth: Truth
) -> None:
    between.spoil("^POST .*uploadId", faults.says(400, "InvalidRequest"))
    carried = upload_shard(store, RECORD, shard, KNOWN)
    assert (carried.proven, carried.copied_nbytes) == (True, 0)
    assert truth() == ({BEFORE: EARLIER, AFTER: CONTENT}, 0)


def test_a_local_file_that_rotted_is_not_hidden_by_a_copy(store: Store, shard: Path, truth: Truth) -> None:
    at = len(CONTENT) - 8 * MIB
    shard.write_bytes(CONTENT[:at] + bytes([CONTENT[at] ^ 1]) + CONTENT[at + 1 :])
    with pytest.raises(CorruptShardError):
        upload_shard(store, RECORD, shard, KNOWN)
    assert truth() == ({BEFORE: EARLIER}, 0)


class HalfFrozen:
    """32 MiB that stay, and 32 that change."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.state: dict[str, Any] = {
            name: torch.randint(0, 256, (32 * MIB,), dtype=torch.uint8, generator=generator) for name in ("a", "b")
        }

    def train(self) -> None:
        self.state["b"].add_(1)


def test_a_half_frozen_model_sends_half_of_each_later_checkpoint_also_after_a_restart_and_loads_bit_for_bit(
    run_root: str, options: dict[str, object], between: Proxy, tmp_path: Path
) -> None:
    model, sent, events = HalfFrozen(), list[int](), list["Event"]()

    def run(steps: range, *, resumed: int, local: str) -> None:
        with dcpsvc.Checkpointer(
            run_root, model.state, local=tmp_path / local, storage_options=options, save_last=False,
            keep=dcpsvc.Latest(1), on_event=events.append,
        ) as ckpt:  # fmt: skip
            assert ckpt.resume() == resumed
            for step in steps:
                model.train()
                before = between.body_nbytes["sent"]
                pending = ckpt.save(step)
                pending.wait(100)
                sent.append(between.body_nbytes["sent"] - before)
                assert (pending.timings.copied_nbytes > 0) is (step > 1)

    run(range(1, 4), resumed=0, local="here")
    run(range(4, 5), resumed=3, local="here")
    run(range(5, 6), resumed=4, local="elsewhere")  # its table is read from the run root
    assert sent[0] > 64 * MIB
    assert all(nbytes < 43 * MIB for nbytes in sent[1:])
    copied = [event.detail for event in events if event.name == "uploaded"]
    assert copied[0] == ""
    assert all(detail.startswith("copied=") for detail in copied[1:])
    back: dict[str, Any] = {name: torch.zeros_like(tensor) for name, tensor in model.state.items()}
    dcpsvc.load(run_root, back, storage_options=options)
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state.items())

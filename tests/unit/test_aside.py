"""Blocks that are set aside come back as they were, ask nobody for room twice, and leave no name on the disk."""

from __future__ import annotations

import errno
import gc
from pathlib import Path

import pytest

from dcpsvc.errors import CorruptShardError
from dcpsvc.format.digest import BLOCK_NBYTES
from dcpsvc.storage.aside import Aside
from dcpsvc.storage.scatter import Needs
from dcpsvc.storage.shards import VerifiedShard
from tests.unit.one_shard import BODY, INTACT, RECORD, CountingStore, flipped, stored

FIRST, LAST = (0, BLOCK_NBYTES), (2 * BLOCK_NBYTES, len(BODY))
SHM = "/dev/shm"  # noqa: S108 - where every Linux has one


def set_aside(folder: Path, shard: VerifiedShard) -> None:
    """The first block and the last two."""
    blocks = Aside(folder).reserve([FIRST, LAST])
    for piece in Needs(blocks.sinks(), RECORD.body_nbytes).pieces():
        piece.read(shard, direct=True)
    shard.prefer(blocks)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_what_was_set_aside_is_read_from_there_and_the_rest_from_the_store(tmp_path: Path) -> None:
    store = stored(kind=CountingStore)
    shard = VerifiedShard([store], RECORD)
    set_aside(tmp_path, shard)
    store.given_out = 0
    assert shard.read(*FIRST) == BODY[: FIRST[1]]
    assert shard.read(*LAST) == BODY[LAST[0] :]
    assert store.given_out == 0
    assert shard.read(0, len(BODY)) == BODY
    assert store.given_out


def test_several_shards_share_one_file_and_keep_apart(tmp_path: Path) -> None:
    aside = Aside(tmp_path)
    one, other = aside.reserve([FIRST, LAST]), aside.reserve([FIRST])
    one.write(LAST[0], memoryview(bytearray(BODY[LAST[0] :])))
    other.write(0, memoryview(bytearray(BLOCK_NBYTES)))
    one.write(0, memoryview(bytearray(BODY[:BLOCK_NBYTES])))
    assert one.read("x", *FIRST) == BODY[:BLOCK_NBYTES]
    assert one.read("x", *LAST) == BODY[LAST[0] :]
    assert other.read("x", *FIRST) == bytes(BLOCK_NBYTES)


def test_what_rots_meanwhile_comes_from_the_store_again(tmp_path: Path) -> None:
    shard = VerifiedShard([INTACT], RECORD)
    blocks = Aside(tmp_path).reserve([FIRST])
    blocks.write(0, memoryview(bytearray(flipped(77)[:BLOCK_NBYTES])))
    shard.prefer(blocks)
    assert shard.read(*FIRST) == BODY[:BLOCK_NBYTES]


def test_damage_in_the_store_is_not_set_aside(tmp_path: Path) -> None:
    with pytest.raises(CorruptShardError):
        set_aside(tmp_path, VerifiedShard([stored(flipped(77))], RECORD))


def test_it_has_no_name_and_the_room_is_given_back_with_the_last_who_may_use_it(tmp_path: Path) -> None:
    gc.collect()
    before = open_files()
    blocks = Aside(tmp_path).reserve([(0, 64 * BLOCK_NBYTES)])
    assert not list(tmp_path.iterdir())
    assert open_files() == before + 1
    del blocks
    gc.collect()
    assert open_files() == before


def test_a_disk_without_room_says_so_before_the_first_byte(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        Aside(tmp_path).reserve([(0, 1 << 43)])
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.skipif(f"{SHM} tmpfs" not in Path("/proc/mounts").read_text(), reason="there is no tmpfs here")
def test_a_disk_that_is_memory_is_refused() -> None:
    with pytest.raises(OSError, match="are memory"):
        Aside(Path(SHM))

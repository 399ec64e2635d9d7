"""A shard on its way to a store: from memory while that still holds it, else from the disk, and proven either way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from dcpsvc.errors import CorruptShardError
from dcpsvc.format.digest import BLOCK_NBYTES
from dcpsvc.storage.cargo import Cargo
from dcpsvc.storage.outgoing import outgoing
from dcpsvc.storage.parts import Span
from dcpsvc.storage.shards import LocalCheck
from tests.unit.one_shard import BODY, CONTENT, KEY, RECORD

if TYPE_CHECKING:
    from pathlib import Path

SPANS = [Span(1, 0, 2 * BLOCK_NBYTES), Span(2, 2 * BLOCK_NBYTES, RECORD.nbytes)]


def sent(path: Path, image: bytes | None) -> bytes:
    """What the parts hold, one after the other."""
    view = None if image is None else memoryview(bytearray(image))
    cargo = Cargo(path=path, check=LocalCheck(RECORD, path), image=view)
    with outgoing(KEY, cargo) as file:
        return b"".join(bytes(file.part(span, bytearray(RECORD.nbytes))) for span in SPANS)


@pytest.mark.parametrize("image", [None, BODY, bytes(len(BODY)), BODY[:-1], b"", BODY[: 2 * BLOCK_NBYTES]])
def test_whatever_is_in_memory_what_was_written_is_sent(tmp_path: Path, image: bytes | None) -> None:
    path = tmp_path / "shard"
    path.write_bytes(CONTENT)
    assert sent(path, image) == CONTENT


def test_what_is_still_in_memory_is_not_read_from_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    rotten = bytearray(CONTENT)
    rotten[BLOCK_NBYTES] ^= 1  # in the first part
    path.write_bytes(rotten)
    assert sent(path, BODY) == CONTENT
    with pytest.raises(CorruptShardError, match="block 1"):
        sent(path, None)


def test_what_is_neither_in_memory_nor_on_the_disk_as_it_was_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    rotten = bytearray(CONTENT)
    rotten[BLOCK_NBYTES] ^= 1
    path.write_bytes(rotten)
    with pytest.raises(CorruptShardError, match="block 1"):
        sent(path, bytes(len(BODY)))

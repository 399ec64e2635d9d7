"""A shard that a tool makes: through a temporary file, which may not have the room."""

from __future__ import annotations

import resource
import tempfile
from typing import TYPE_CHECKING

import pytest

from dcpsvc.errors import StoreError
from dcpsvc.format import shardfile
from dcpsvc.format.keys import Attempt
from dcpsvc.format.shardfile import Piece
from dcpsvc.tools.newshard import new_shard

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may be larger than 4 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_a_temporary_file_that_cannot_grow_is_named_and_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    placement = shardfile.place([Piece("a", "U8", (8192,), (0,), (8192,))])
    made = new_shard(placement, b"{}", Attempt(1, "1-abcdef12-0"), 0, lambda _: [bytes(8192)])
    with pytest.raises(StoreError, match=f"write {tmp_path}/dcpsvc-.*: the file would be larger"), made:
        pass
    assert not list(tmp_path.iterdir())

"""The contract, kept by every store that needs no server; tests/s3 runs it against a real S3."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import pytest
from store_contract import BrokenStoreContract, StoreContract

from dcpsvc.storage.memory import MemoryStore
from dcpsvc.storage.objectstore import ObjectStore
from dcpsvc.storage.open import open_store
from dcpsvc.storage.posix import PosixStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dcpsvc.storage.base import Store

    Reopen = Callable[[], Store]


@pytest.fixture
def store(reopen: Reopen) -> Store:
    return reopen()


class TestPosixStore(StoreContract, BrokenStoreContract):
    race_rounds = 25

    @pytest.fixture
    def reopen(self, tmp_path: Path) -> Reopen:
        return lambda: PosixStore(tmp_path / "runs" / "root")

    @pytest.fixture
    def broken(self, tmp_path: Path) -> Store:
        (tmp_path / "file").write_bytes(b"not a directory")
        return PosixStore(tmp_path / "file")


class TestPosixStoreAsOpened(StoreContract, BrokenStoreContract):
    """With the retries a user gets."""

    @pytest.fixture
    def reopen(self, tmp_path: Path) -> Reopen:
        return lambda: open_store(f"file://{tmp_path}/root")

    @pytest.fixture
    def broken(self, tmp_path: Path) -> Store:
        (tmp_path / "file").write_bytes(b"not a directory")
        return open_store(tmp_path / "file" / "below")


class TestMemoryStore(StoreContract):
    race_rounds = 25

    @pytest.fixture
    def reopen(self) -> Reopen:
        name = uuid.uuid4().hex
        return lambda: MemoryStore(name)


class TestObjectStoreOnFsspecsLocalFiles(StoreContract, BrokenStoreContract):
    @pytest.fixture
    def reopen(self, tmp_path: Path) -> Reopen:
        return lambda: ObjectStore(f"local://{tmp_path}/root")

    @pytest.fixture
    def broken(self, tmp_path: Path) -> Store:
        (tmp_path / "file").write_bytes(b"not a directory")
        return ObjectStore(f"local://{tmp_path}/file")


class TestObjectStoreOnFsspecsMemory(StoreContract):
    @pytest.fixture
    def reopen(self) -> Reopen:
        name = uuid.uuid4().hex
        return lambda: ObjectStore(f"memory://{name}/root")

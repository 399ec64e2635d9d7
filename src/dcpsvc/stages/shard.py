"""Shard: this rank's file on the local tier, planned and written through DCP's ``async_save``.

DCP runs without collectives here (``no_dist``): the ranks have agreed before the gate opens and each knows its
part, so there is nothing left to gather. Planner and writer are made anew for each save.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future as TorchFuture

from dcpsvc.format import digest
from dcpsvc.format.manifest import ShardRecord
from dcpsvc.state import dcp_quirks
from dcpsvc.state.dtypes import dtype_of
from dcpsvc.storage.oserror import from_os_error

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
    from pathlib import Path

    import torch.distributed as dist
    from torch.distributed.checkpoint.metadata import StorageMeta

    from dcpsvc.format.shardfile import Piece, Placement

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class ShardPlanner(SavePlanner):
    """Plans what the placement says: the pieces of this rank, at their offsets."""

    def __init__(self, placement: Placement) -> None:
        self._pieces = {piece.name: piece for piece in placement.pieces}
        self._staged: Mapping[str, torch.Tensor] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Receive the staged pieces."""
        del storage_meta, is_coordinator
        self._staged = state_dict

    def create_local_plan(self) -> SavePlan:
        """One item per piece."""
        return SavePlan([_write_item(piece) for piece in self._pieces.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """This rank's plan is all there is here; the global layout is ours."""
        described = {name: _tensor_metadata(piece) for name, piece in self._pieces.items()}
        return all_plans, Metadata(state_dict_metadata=dict(described))

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Nothing to change."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The staged piece."""
        return self._staged[write_item.index.fqn]


class Body(Protocol):
    """A shard up to its block table, and how to come by its bytes."""

    @property
    def nbytes(self) -> int:
        """Of all parts together."""
        ...

    def parts(self, resolve: Callable[[str], torch.Tensor]) -> Generator[memoryview]:
        """In file order, whole blocks each but for the last; ``resolve`` gives a piece by its name in the file."""
        ...


class ShardWriter(StorageWriter):
    """Writes one shard: its body, then the block table computed in the same pass. On any thread.

    Args:
        path: Where to; must not exist.
        body: What.
        rank: Global rank.
        key: Run-relative key of the shard.
    """

    def __init__(self, path: Path, body: Body, *, rank: int, key: str) -> None:
        self._path, self._body, self._rank, self._key = path, body, rank, key
        self._lock = threading.Lock()
        self._withdrawn = False
        self.record: ShardRecord | None = None
        self.seconds = 0.0

    def withdraw(self) -> None:
        """Nobody wants the file any more: stop at the next part and leave nothing. A file that is whole stays."""
        with self._lock:
            self._withdrawn = self.record is None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Part of DCP's protocol: a writer is never used twice."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the attempt's directory."""
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to change."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Nothing to change."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """Write, fsync, and make the record.

        Raises:
            StoreFullError: The disk is full; nothing of the file is left.
        """
        began = time.perf_counter()
        items = {item.index.fqn: item for item in plan.items}
        body = self._body.parts(lambda name: cast("torch.Tensor", planner.resolve_data(items[name])))
        with contextlib.closing(body) as parts, self._new_file() as descriptor:
            table = _write(descriptor, self._while_wanted(parts))
            _fsync_directory(self._path.parent)
            self._finish(table)
        self.seconds = time.perf_counter() - began
        results = [WriteResult(item.index, item.tensor_storage_size() or 0, self._key) for item in plan.items]
        done: TorchFuture[list[WriteResult]] = TorchFuture()
        done.set_result(results)
        return done

    @contextlib.contextmanager
    def _new_file(self) -> Generator[int]:
        """A descriptor to write to; what goes wrong takes the file along."""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                yield descriptor
            except BaseException:  # whatever it is, room on a disk that may be full is given back
                self._remove()
                raise
            finally:
                os.close(descriptor)
        except OSError as err:
            if err.errno in _FULL:
                raise from_os_error("write", str(self._path), err) from err
            raise

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
            if self._withdrawn:  # whoever tidied up before found the folder in use
                self._path.parent.rmdir()

    def _while_wanted(self, parts: Iterable[memoryview]) -> Iterator[memoryview]:
        for part in parts:
            self._check_wanted()
            yield part

    def _finish(self, table: bytes) -> None:
        body_nbytes = self._body.nbytes
        record = ShardRecord(
            rank=self._rank,
            path=self._key,
            nbytes=body_nbytes + len(table),
            body_nbytes=body_nbytes,
            digest=digest.digest(table),
        )
        with self._lock:
            self._check_wanted()
            self.record = record

    def _check_wanted(self) -> None:
        if self._withdrawn:
            raise InterruptedError("the save ended while its shard was being written")

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing is committed here: the manifest is, after every rank's acknowledgement."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """DCP never has to choose this writer by itself."""
        return False


class GatedStager(AsyncStager, Protocol):
    """A stager whose future resolves when all ranks agree."""

    def open(self) -> None:
        """Let DCP write."""
        ...

    def refuse(self, error: BaseException) -> None:
        """Nothing will be written."""
        ...


class DcpShard:
    """This rank's shard on its way to the local disk: DCP's thread waits at the gate, then writes."""

    def __init__(self, stager: GatedStager, writer: ShardWriter, written: Future[Any]) -> None:
        self._stager, self._writer, self._written = stager, writer, written

    @property
    def seconds(self) -> float:
        """Writing and syncing."""
        return self._writer.seconds

    @property
    def ended(self) -> bool:
        """Nobody reads what was staged any more."""
        return self._written.done()

    def open(self) -> None:
        """Every rank has arrived and agrees."""
        self._stager.open()

    def refuse(self, error: BaseException) -> None:
        """The save has ended: what is not whole on the disk never will be."""
        self._stager.refuse(error)
        self._writer.withdraw()

    def record(self, timeout_s: float) -> ShardRecord:
        """The shard is durable on the local tier when this returns; DCP's own errors come out as they are.

        Raises:
            TimeoutError: The disk did not take it in time.
        """
        if not wait([self._written], timeout_s).done:
            raise TimeoutError(f"the local disk did not take the shard within {timeout_s} s")
        self._written.result()
        assert self._writer.record is not None  # noqa: S101 - the future resolved
        return self._writer.record


def begin(
    tensors: Mapping[str, torch.Tensor],
    *,
    stager: GatedStager,
    placement: Placement,
    writer: ShardWriter,
    process_group: dist.ProcessGroup | None,
) -> DcpShard:
    """Stage now, on this thread; write on DCP's thread when the stager's future resolves."""
    dcp_quirks.quiet()
    response = async_save(
        dict(tensors),
        storage_writer=writer,
        planner=ShardPlanner(placement),
        process_group=process_group,
        async_stager=stager,
        no_dist=True,
    )
    written = response if isinstance(response, Future) else response.upload_completion
    return DcpShard(stager, writer, written)


def _write(descriptor: int, parts: Iterable[memoryview]) -> bytes:
    """Write the parts and their block table, durably; return the table."""
    tables: list[bytes] = []
    for part in parts:
        tables.append(digest.table(part))
        _write_all(descriptor, part)
    table = b"".join(tables)
    _write_all(descriptor, memoryview(table))
    os.fsync(descriptor)
    return table


def _write_all(descriptor: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(descriptor, data) :]


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_item(piece: Piece) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size((0,) * len(piece.sizes)), torch.Size(piece.sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype=dtype_of(piece.dtype)), torch.Size(piece.sizes))
    return WriteItem(MetadataIndex(piece.name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def _tensor_metadata(piece: Piece) -> TensorStorageMetadata:
    chunk = ChunkStorageMetadata(torch.Size((0,) * len(piece.sizes)), torch.Size(piece.sizes))
    return TensorStorageMetadata(TensorProperties(dtype=dtype_of(piece.dtype)), torch.Size(piece.sizes), [chunk])

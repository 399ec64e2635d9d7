"""Shard: this rank's file on the local tier, planned and written through DCP's ``async_save``.

DCP runs without collectives here (``no_dist``): the ranks have agreed before the gate opens and each knows its
part, so there is nothing left to gather. Planner and writer are made anew for each save.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future as TorchFuture

from dcpsvc.format import digest
from dcpsvc.format.manifest import ShardRecord
from dcpsvc.state import dcp_quirks
from dcpsvc.state.saveplan import ShardPlanner
from dcpsvc.storage.diskfile import DiskFile
from dcpsvc.storage.oserror import from_os_error

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Generator, Iterable, Iterator
    from pathlib import Path

    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

    from dcpsvc.state.saveplan import ShardPlan

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Staged(Protocol):
    """One rank's part of one step, as DCP is given it."""

    @property
    def given(self) -> dict[str, torch.Tensor]:
        """The state dict, with few entries."""
        ...

    def piece(self, name: str) -> torch.Tensor:
        """A piece by its name in the file."""
        ...


class Body(Protocol):
    """A shard up to its block table, and how to come by its bytes."""

    @property
    def nbytes(self) -> int:
        """Of all parts together."""
        ...

    @property
    def lasting(self) -> bool:
        """All parts stay as they are until the generator of them is closed; else each until the next is asked for."""
        ...

    def parts(self, resolve: Callable[[str], torch.Tensor]) -> Generator[memoryview]:
        """In file order, whole blocks each but for the last; ``resolve`` gives a piece by its name in the file."""
        ...


class ShardWriter(StorageWriter):
    """Writes one shard: its body, then the block table computed in the same pass. On any thread.

    Args:
        path: Where to; must not exist.
        body: What.
        plan: What DCP is told about it.
        rank: Global rank.
        key: Run-relative key of the shard.

    Attributes:
        record: What this rank says about the shard once it is durable.
        seconds: Writing and syncing.
        reserved_nbytes: Room on the disk that the file has, written or not.
    """

    def __init__(self, path: Path, body: Body, plan: ShardPlan, *, rank: int, key: str) -> None:
        self._path, self._body, self._plan, self._rank, self._key = path, body, plan, rank, key
        self._lock = threading.Lock()
        self._withdrawn = False
        self.record: ShardRecord | None = None
        self.seconds = 0.0
        self.reserved_nbytes = 0

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
        try:
            # Closed in this order: nobody writes or hashes what the parts were made in when that is given back.
            with contextlib.closing(self._body.parts(_Resolver(plan, planner))) as parts, self._new_file() as file:
                self._finish(write_durably(file, self._while_wanted(parts), lasting=self._body.lasting))
                file.keep()
        except OSError as err:
            if err.errno in _FULL:
                raise from_os_error("write", str(self._path), err) from err
            raise
        finally:
            self._tidy()
        self.seconds = time.perf_counter() - began
        done: TorchFuture[list[WriteResult]] = TorchFuture()
        done.set_result(self._plan.results)
        return done

    def _new_file(self) -> DiskFile:
        """It takes its room on the disk at once, so that a disk that is too full says so before the first byte."""
        file = DiskFile(self._path, self._body.nbytes + digest.table_nbytes(self._body.nbytes))
        self.reserved_nbytes = file.reserved_nbytes
        return file

    def _tidy(self) -> None:
        if self._withdrawn and self.record is None:  # whoever tidied up before found the folder in use
            with contextlib.suppress(OSError):
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

    @property
    def reserved_nbytes(self) -> int:
        """Room on the disk that it has taken already."""
        return self._writer.reserved_nbytes

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
    staged: Staged,
    *,
    stager: GatedStager,
    plan: ShardPlan,
    writer: ShardWriter,
    process_group: dist.ProcessGroup | None,
) -> DcpShard:
    """Stage now, on this thread; write on DCP's thread when the stager's future resolves."""
    dcp_quirks.quiet()
    response = async_save(
        staged.given,
        storage_writer=writer,
        planner=ShardPlanner(plan, staged.piece),
        process_group=process_group,
        async_stager=stager,
        no_dist=True,
    )
    written = response if isinstance(response, Future) else response.upload_completion
    return DcpShard(stager, writer, written)


class _Resolver:
    """Gives a piece by its name in the file, as the planner resolves its item."""

    def __init__(self, plan: SavePlan, planner: SavePlanner) -> None:
        self._plan, self._planner = plan, planner

    @functools.cached_property
    def _items(self) -> dict[str, WriteItem]:
        return {item.index.fqn: item for item in self._plan.items}

    def __call__(self, name: str) -> torch.Tensor:
        return cast("torch.Tensor", self._planner.resolve_data(self._items[name]))


def write_durably(file: DiskFile, parts: Iterable[memoryview], *, lasting: bool) -> bytes:
    """Write the parts and their block table, durably; return the table.

    A busy training thread keeps the one that computes checksums waiting: the disk does not wait for it.
    """
    tables: list[Future[bytes]] = []
    with ThreadPoolExecutor(1, thread_name_prefix="dcpsvc-digest") as digesting:
        for part in parts:
            tables.append(digesting.submit(digest.table, part))
            file.write(part, lasting=lasting)
            if not lasting:
                wait(tables[-1:])
        table_of_all = b"".join(table.result() for table in tables)
    file.write(memoryview(table_of_all))
    file.sync()
    return table_of_all

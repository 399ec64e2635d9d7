"""One committed checkpoint as DCP reads it: its own resharding says which part of which chunk goes where."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import os
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from dcpsvc import preflight
from dcpsvc.bands import await_streams, bands
from dcpsvc.errors import LayoutError, StateMismatchError
from dcpsvc.format.shardfile import of_components
from dcpsvc.progress import unseen
from dcpsvc.state import boxes, dcp_quirks, documents
from dcpsvc.state.loadplan import WantPlanner, tensor_metadata
from dcpsvc.state.saved import Saved, Want
from dcpsvc.storage.fetch import fetch
from dcpsvc.storage.scatter import Needs, Segment
from dcpsvc.storage.shards import VerifiedShard
from dcpsvc.storage.threads import at_once, each

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from dcpsvc.format.layout import Chunk, Layout
    from dcpsvc.format.layout import Tensor as Described
    from dcpsvc.format.manifest import Manifest
    from dcpsvc.progress import Watch
    from dcpsvc.storage.base import Store
    from dcpsvc.storage.scatter import Sink

_FEW_RUNS = 64
_SAID_BY = 64
"""Shards whose documents are kept: of thousands they would take too much memory."""

Deliver = Callable[[dict[int, Needs]], None]
Hold = Callable[[], "contextlib.AbstractContextManager[None]"]


class CheckpointReader(StorageReader):
    """A DCP StorageReader over one committed checkpoint: ``dcp.load(state, storage_reader=...)`` reads it.

    Every byte is verified against the manifest before it reaches a tensor. JSON values are handed to DCP in the
    form it expects, made in memory; nothing stored is ever unpickled.

    Args:
        manifest: The commit record.
        layout: Its layout.
        stores: Where the files are, nearest first.
        hold: Around the reading by DCP: whatever keeps the checkpoint from being deleted meanwhile.
        once: Nothing is to be read twice from the last store.
    """

    def __init__(
        self, manifest: Manifest, layout: Layout, stores: Sequence[Store], hold: Hold = contextlib.nullcontext,
        *, once: bool = False,
    ) -> None:  # fmt: skip
        self.manifest, self.layout, self._hold, self._stores = manifest, layout, hold, stores
        self.shards = {record.rank: VerifiedShard(stores, record, once=once) for record in manifest.shards}
        self._said: dict[int, dict[str, Any]] = {}
        self._documents: dict[str, Any] | None = None
        self._metadata: Metadata | None = None
        self._own_shard = -1
        self._chunks: dict[str, dict[tuple[int, ...], Chunk]] = {}
        self._deliver: Deliver = functools.partial(fetch, self.shards)
        self._check_places()

    def documents(self, *ranks: int) -> dict[str, Any]:
        """The JSON documents held by the shards of ``ranks``: read side by side, and each once.

        Raises:
            CorruptShardError: Of the first of them that is damaged; names its file.
            StoreError: A store did not answer.
        """
        asked = sorted(set(ranks))
        new = [rank for rank in asked if rank not in self._said]
        read = each(lambda rank: self.shards[rank].documents(), new, at_once(self._stores[-1]))
        self._said |= zip(new, read, strict=True)
        found = {name: document for rank in asked for name, document in self._said[rank].items()}
        for rank in list(self._said)[:-_SAID_BY]:
            del self._said[rank]
        return found

    def saved_for(self, rank: int) -> Saved:
        """The checkpoint as one rank's components see it."""
        self._own_shard = source = rank % self.manifest.world_size
        found = self.documents(0, source)
        return Saved(self.layout, found, rank, self.manifest.world_size, self.manifest.step)

    def for_known_boxes(self, deliver: Deliver) -> CheckpointReader:
        """A twin that describes nothing to DCP, so that nothing but the boxes asked for is planned.

        Args:
            deliver: Is given what is needed of each shard, by rank.
        """
        twin = copy.copy(self)
        twin._deliver, twin._hold = deliver, contextlib.nullcontext  # noqa: SLF001 - our own twin
        twin._metadata = Metadata(state_dict_metadata={})  # noqa: SLF001 - likewise
        return twin

    @property
    def nbytes_read(self) -> tuple[int, int]:
        """So far: from nearer stores, and from the run root."""
        near, far = zip(*(shard.nbytes_read for shard in self.shards.values()), strict=True)
        return sum(near), sum(far)

    def lacks(self, wants: Sequence[Want]) -> bool:
        """Whether a shard that they need is at no nearer store."""
        return any(not self.shards[rank].near for rank in self._needed(wants))

    def dear(self, ranks: Iterable[int]) -> set[int]:
        """Those whose shards cannot be read again for no more than a copy."""
        return {rank for rank in ranks if not self.shards[rank].cached}

    def needs(self, want: Want, ranks: Collection[int]) -> bool:
        """Whether the shard of any of these ranks has a part of it."""
        return not self._needed([want]).isdisjoint(ranks)

    def read_by_one(self, needs: Mapping[int, Needs]) -> bool:
        """Whether no other rank of this machine is likely to read the same bytes of files.

        It is so for a rank by itself, and for one that takes back, for the most part, what it wrote itself.
        """
        sizes = {rank: needed.nbytes() for rank, needed in needs.items()}
        return preflight.ranks_here(os.environ) == 1 or 2 * sizes.get(self._own_shard, 0) > sum(sizes.values())

    def _needed(self, wants: Sequence[Want]) -> set[int]:
        """Whose shards hold them."""
        found = ((want, self.layout.find(want.key)) for want in wants if want.out.numel())
        return {
            chunk.rank for want, tensor in found if tensor for chunk in tensor.overlapping(want.offsets, want.out.shape)
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Part of DCP's protocol: a reader is bound to its checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The layout in DCP's terms, and a bytes entry for each JSON value.

        Raises:
            CorruptShardError: The JSON values of some shard are damaged.
        """
        if self._metadata is None:
            self._metadata = self._describe()
        return self._metadata

    def _describe(self) -> Metadata:
        found: dict[str, Any] = {}
        for name in self.layout.names():
            tensor = self.layout.find(name)
            if tensor is not None:
                found[name] = tensor_metadata(tensor, tensor.chunks)
        for name, document in self._all_documents().items():
            found |= {path: BytesStorageMetadata() for path in documents.values(document, name) if path not in found}
        return Metadata(state_dict_metadata=found)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to change."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to change."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read every item: whole rows in the order of the files and in large pieces, a few at a time."""
        with self._hold():
            self._read(plan, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        tensors = [item for item in plan.items if item.type is LoadItemType.TENSOR]
        targets = [planner.resolve_tensor(item) for item in tensors]
        await_streams(targets)
        self._deliver(self._needs(tensors, targets))
        for item, target in zip(tensors, targets, strict=True):
            planner.commit_tensor(item, target)
        for item in plan.items:
            if item.type is LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._value(item.storage_index.fqn))

    def _needs(self, items: Sequence[ReadItem], targets: Sequence[torch.Tensor]) -> dict[int, Needs]:
        """What there is to read of each shard, and where it goes."""
        sinks: dict[int, list[Sink]] = defaultdict(list)
        for item, target in zip(items, targets, strict=True):
            place = self._place(item)
            first = boxes.whole_rows(place, item.storage_offsets, item.lengths)
            if first is None or (memory := boxes.memory(target, place.dtype)) is None:
                sinks[place.rank] += bands(place, item.storage_offsets, item.lengths, target)
            else:
                sinks[place.rank].append(Segment(first, memory))
        return {rank: Needs(found, self.shards[rank].record.body_nbytes) for rank, found in sinks.items()}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """DCP never has to choose this reader by itself."""
        return False

    def _all_documents(self) -> dict[str, Any]:
        if self._documents is None:
            self._documents = of_components(self.documents(*self.shards))
        return self._documents

    def _check_places(self) -> None:
        """Every chunk lies inside the body of a shard that the manifest names."""
        bodies = {record.rank: record.body_nbytes for record in self.manifest.shards}
        for rank, (end, key) in self.layout.ends().items():
            if end > bodies.get(rank, -1):
                raise LayoutError(self.manifest.layout.path, f"{key}: a chunk lies outside the shard of rank {rank}")

    def _chunk(self, key: str, tensor: Described, offsets: tuple[int, ...]) -> Chunk:
        if len(tensor.runs) <= _FEW_RUNS:  # of thousands of chunks, perhaps, of which few are wanted
            return next(tensor.overlapping(offsets, (1,) * len(offsets)))
        if key not in self._chunks:
            self._chunks[key] = {chunk.offsets: chunk for chunk in tensor.chunks if chunk.numel}
        return self._chunks[key][offsets]

    def _place(self, item: ReadItem) -> boxes.Place:
        tensor = self.layout.find(item.storage_index.fqn)
        offsets = item.storage_index.offset
        if tensor is None or offsets is None:
            raise StateMismatchError(item.storage_index.fqn, "the checkpoint holds no such tensor")
        chunk = self._chunk(item.storage_index.fqn, tensor, tuple(offsets))
        return boxes.Place(chunk.rank, chunk.begin, chunk.sizes, tensor.dtype)

    def _value(self, path: str) -> io.BytesIO:
        for name, document in self._all_documents().items():
            found = documents.values(document, name)
            if path in found:
                buffer = io.BytesIO()
                torch.save(documents.decode(found[path], path, self._whole_tensor), buffer)
                buffer.seek(0)
                return buffer
        raise StateMismatchError(path, "the checkpoint holds no such value")

    def _whole_tensor(self, key: str) -> torch.Tensor:
        saved = Saved(self.layout, {}, 0, self.manifest.world_size, self.manifest.step)
        want = saved.want_whole(key)
        read(self, [want])
        return want.out


def read(reader: CheckpointReader, wants: Sequence[Want], watch: Watch = unseen) -> None:
    """Fill the box of every want with verified bytes. Any world size; no collective.

    Raises:
        CorruptShardError: A needed block is missing or not what was written; names the file.
        StoreError: The store did not answer.
    """
    fill(reader, plan(reader, wants), watch)


def fill(reader: CheckpointReader, needs: Mapping[int, Needs], watch: Watch = unseen) -> None:
    """Likewise, what is planned already."""
    # Nobody looks at the boxes before all of it is proven, so bytes go straight there.
    fetch(reader.shards, needs, direct=True, once=reader.read_by_one(needs), watch=watch)


def prove(reader: CheckpointReader, needs: Mapping[int, Needs], watch: Watch = unseen) -> None:
    """Prove, and put nothing anywhere; what is dear to read again is left out. Raises what :func:`read` does."""
    fetch(reader.shards, needs, proving=True, watch=watch)


def read_again(reader: CheckpointReader, needs: Mapping[int, Needs]) -> None:
    """What :func:`prove` has proven, to where it goes. Raises what :func:`read` does."""
    fetch(reader.shards, needs, direct=True)


def plan(reader: CheckpointReader, wants: Sequence[Want]) -> dict[int, Needs]:
    """What there is to read of each shard, by the rank that wrote it. Raises what :func:`load` does."""
    found: dict[int, Needs] = {}
    load(reader, wants, found.update)
    return found


def load(reader: CheckpointReader, wants: Sequence[Want], deliver: Deliver) -> None:
    """Have DCP plan which part of which shard goes where, and hand that to ``deliver``. Raises what it raises."""
    if not wants:
        return
    dcp_quirks.quiet()
    try:
        dcp_load(
            {want.key: want.out for want in wants},
            storage_reader=reader.for_known_boxes(deliver),
            planner=WantPlanner(reader.layout, wants),
            no_dist=True,
        )
    except BaseException as err:  # DCP wraps what happened in one of its own
        cause = dcp_quirks.cause(err)
        if cause is err:
            raise
        raise cause from None

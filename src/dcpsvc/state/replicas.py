"""Hashes of the tensors that several ranks hold alike: what a rank writes itself is hashed where it was copied to.

Only what other ranks write must be read from the tensors before they change. The hash of a tensor is made of those of
its blocks, so it does not matter where each of them was read.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import xxhash

from dcpsvc.errors import TornSnapshotError
from dcpsvc.format.digest import BLOCK_NBYTES, DIGEST_NBYTES, digest, digests_of
from dcpsvc.format.parse import compact
from dcpsvc.state.claims import GROUP, Claims, component_of
from dcpsvc.state.collected import Sharing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from dcpsvc.state.collected import Collected, Item

LARGE_NBYTES = 64 << 10
"""From here on reading a tensor takes longer than saying so."""

UNHURRIED = -1
"""Owner of what nobody waits for before it changes something: no ``id`` is this."""

_COPIED_NBYTES = 16 << 20
_AT_ONCE = 32
"""Blocks hashed by one task, so that an optimizer that waits for them can help."""
_PATIENCE_S, _LOOK_S = 120.0, 0.0005


class Copied(NamedTuple):
    """Where bytes of a tensor are once they are copied.

    Attributes:
        begin: The first of them, in the tensor.
        end: The first behind them.
        at: Where they begin in the image of the file.
    """

    begin: int
    end: int
    at: int


class Replicas:
    """Hashes of all tensors that several ranks hold alike; each is read once.

    Args:
        collected: This rank's part.
        copied: By key, what of large tensors of the host is going to be copied: it is hashed there.
        later: Whether large tensors may wait; small ones are hashed now.
        guarded: Whether the optimizers wait for that.

    Attributes:
        tasks: What waits.
        held: Copies of what is to be compared byte by byte, and is not hashed, by key.
        said: The hashes, for comparison, once all are there.
        ended: What was copied is not read here any more.
    """

    def __init__(
        self, collected: Collected, copied: Mapping[str, Sequence[Copied]], *, later: bool, guarded: bool
    ) -> None:
        replicated = {key: item for key, item in collected.items.items() if _is_compared(item)}
        self.held = {k: Held(i) for k, i in replicated.items() if i.validate == "full" and not i.compared}
        self._items = {k: item for k, item in replicated.items() if k not in self.held}
        self.tasks: list[Hashing | DeviceHashing] = []
        self.said: Claims = {}
        self.ended = False
        self._tables: dict[str, Table] = {}
        by_device: dict[torch.device, dict[str, torch.Tensor]] = defaultdict(dict)
        for key, item in self._items.items():
            if item.tensor.is_cpu:
                waits = later and item.tensor.nbytes >= LARGE_NBYTES
                table = self._tables[key] = Table(item.tensor.nbytes, copied.get(key, ()) if waits else ())
                self._add(_hashing(key, item, table, item.owner if guarded else None), later=waits)
            elif item.tensor.numel():
                by_device[item.tensor.device][key] = item.tensor
        self._there = [DeviceHashing(tensors) for tensors in by_device.values()]
        self._add(self._there, later=later)

    def complete(self, image: memoryview | None) -> None:
        """Hash what was copied; every task is done. Any thread.

        Args:
            image: Of the file, as far as it was copied; None if nothing was.
        """
        for table in self._tables.values():
            table.fill(image)
        hashes = {key: table.hash for key, table in self._tables.items()}
        for each in self._there:
            hashes |= each.hashes
        said: Claims = defaultdict(dict)
        for key, value in hashes.items():
            item = self._items[key]
            component, name = _place(key, item)
            said[component][name] = f"{'part' if item.compared else item.claim} {value:016x}"
        self.said, self.ended = said, True
        self.tasks.clear()
        self._items.clear()  # nothing of the state is needed any more

    def _add(self, tasks: Sequence[Hashing | DeviceHashing], *, later: bool) -> None:
        if later:
            self.tasks += tasks
            return
        for each in tasks:
            each.run()


class Table:
    """Digests of the blocks of one tensor, one behind the other.

    Args:
        nbytes: Of the tensor.
        copied: What of it is hashed where it was copied to.

    Attributes:
        digests: Of all blocks; zeros where one is not hashed yet.
        live: Blocks to be hashed from the tensor: those that were not copied whole.
    """

    def __init__(self, nbytes: int, copied: Sequence[Copied]) -> None:
        count = -(-nbytes // BLOCK_NBYTES)
        self._nbytes, self.digests = nbytes, bytearray(count * DIGEST_NBYTES)
        self._copied: list[tuple[range, int]] = []
        self.live: list[range] = []
        done = 0
        for begin, end, at in sorted(copied):
            first, last = -(-begin // BLOCK_NBYTES), count if end == nbytes else end // BLOCK_NBYTES
            if first < last:
                self._copied.append((range(first, last), at + first * BLOCK_NBYTES - begin))
                self.live += [range(done, first)] if done < first else []
                done = last
        self.live += [range(done, count)] if done < count else []

    @property
    def hash(self) -> int:
        """Of the whole tensor."""
        return xxhash.xxh3_64_intdigest(self.digests)

    def put(self, blocks: range, views: Iterable[memoryview]) -> None:
        """Hash these blocks, which the views together are."""
        self.digests[blocks.start * DIGEST_NBYTES : blocks.stop * DIGEST_NBYTES] = b"".join(digests_of(views))

    def fill(self, image: memoryview | None) -> None:
        """Hash what was copied."""
        for blocks, at in self._copied:
            assert image is not None  # noqa: S101 - or nothing would have been copied
            nbytes = min(blocks.stop * BLOCK_NBYTES, self._nbytes) - blocks.start * BLOCK_NBYTES
            self.put(blocks, [image[at : at + nbytes]])


class Held:
    """The bytes of a tensor as they were, to be compared with other ranks'.

    Attributes:
        dtype: Of the elements.
        flat: Their bytes, on the host.
    """

    def __init__(self, item: Item) -> None:
        self.dtype = item.tensor.dtype
        host = item.tensor.detach().resolve_conj().resolve_neg().to("cpu", copy=True).contiguous()
        self.flat = host.view(-1).view(torch.uint8)

    def difference(self, byte: int, theirs: torch.Tensor, begin: int) -> tuple[int, str, str]:
        """The number of the element a byte is in, what it is here, and in another's bytes from ``begin`` on."""
        number = byte // self.dtype.itemsize
        there = theirs.view(self.dtype)[number - begin // self.dtype.itemsize]
        return number, str(self.flat.view(self.dtype)[number].item()), str(there.item())


class Hashing:
    """Some blocks of one tensor are hashed before they may change.

    Attributes:
        owner: Who waits for it.
        begin: None: it writes nothing.
    """

    begin = None

    def __init__(self, key: str, item: Item, table: Table, blocks: range, owner: int | None) -> None:
        self.owner, self._key, self._item, self._table, self._blocks = owner, key, item, table, blocks
        self._version = item.origin._version  # noqa: SLF001 - torch's only counter

    def run(self) -> None:
        """Any thread."""
        self._table.put(self._blocks, _views(self._item.tensor, self._blocks))

    def check(self) -> None:
        """Raises TornSnapshotError if torch has seen the tensor written to."""
        if self._item.origin._version != self._version:  # noqa: SLF001
            raise TornSnapshotError(self._key, "it was changed while it was being hashed")


class DeviceHashing:
    """Tensors of one device are hashed there, behind what training has given it by now: the host does not wait.

    What is brought back are 8 bytes per tensor, in one transfer.

    Args:
        tensors: By key.

    Attributes:
        owner: Nobody: what changes them comes later on the same stream.
        begin: None: it writes nothing.
        hashes: The result, by key.
    """

    begin = None
    owner = UNHURRIED

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._keys, self.hashes = list(tensors), dict[str, int]()
        sums = torch.stack([torch.hash_tensor(tensor) for tensor in tensors.values()])
        self._sums = sums.to("cpu", non_blocking=True)
        self._done = None if sums.is_cpu else torch.accelerator.current_stream(sums.device).record_event()

    def run(self) -> None:
        """Any thread."""
        if self._done is not None:
            await_event(self._done)
        self.hashes = {key: value % 2**64 for key, value in zip(self._keys, self._sums.tolist(), strict=True)}

    def check(self) -> None:
        """Nothing: a change is behind it."""


def await_event(event: Any) -> None:
    """Until a device has come to an event; the host sleeps.

    Raises:
        TimeoutError: It does not get there.
    """
    ends = time.monotonic() + _PATIENCE_S
    while not event.query():
        if time.monotonic() > ends:
            raise TimeoutError(f"the device has not come to what was asked of it within {_PATIENCE_S} s")
        time.sleep(_LOOK_S)


def _is_compared(item: Item) -> bool:
    return item.validate != "off" and (item.sharing is Sharing.REPLICATED or bool(item.compared))


def _place(key: str, item: Item) -> tuple[str, str]:
    """Under which component and name the hash of a tensor is said: that of all ranks, or of those that hold a part."""
    if not item.compared:
        return component_of(key), key
    box = "" if item.shape == tuple(item.tensor.shape) else f"[{','.join(map(str, item.offsets))}...]"
    return f"{GROUP}{_group(item.compared)}", key + box


@functools.lru_cache(maxsize=64)
def _group(ranks: tuple[int, ...]) -> str:
    return digest(compact(list(ranks)))[:16]


def _hashing(key: str, item: Item, table: Table, owner: int | None) -> list[Hashing]:
    """What of a tensor must be read where it is, some of it at a time if it lies in one piece."""
    at_once = _AT_ONCE if _lies_in_one_piece(item.tensor) else max(1, len(table.digests))
    return [
        Hashing(key, item, table, live[first : first + at_once], owner)
        for live in table.live
        for first in range(0, len(live), at_once)
    ]


def _lies_in_one_piece(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _views(tensor: torch.Tensor, blocks: range) -> Iterator[memoryview]:
    """The bytes of these blocks; of a tensor that is not in one piece, these are all."""
    if _lies_in_one_piece(tensor):
        yield _flat(tensor)[blocks.start * BLOCK_NBYTES : blocks.stop * BLOCK_NBYTES].numpy().data
        return
    for part in _parts(tensor):
        yield _flat(part.resolve_conj().resolve_neg().contiguous()).numpy().data


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Some rows at a time of what has to be copied for that."""
    if tensor.dim() == 0:
        return iter([tensor])
    return iter(tensor.split(max(1, _COPIED_NBYTES * tensor.shape[0] // max(1, tensor.nbytes))))

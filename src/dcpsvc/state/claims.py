"""What each rank says it would save, in a form that ranks can compare: before a byte is written.

One digest per component travels with every save, and one for each group of ranks that hold the same parts. Only when
digests differ are the details exchanged, key by key, so the error can name what differs and on which ranks.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from dcpsvc.errors import TornSnapshotError
from dcpsvc.format.digest import digest
from dcpsvc.format.parse import compact
from dcpsvc.state import documents
from dcpsvc.state.collected import Sharing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dcpsvc.state.collected import Collected, Item

Claims = dict[str, dict[str, str]]
"""Component -> key -> what this rank says about it. A group of ranks is a component of them alone."""

_GROUP = "="
"""Begins the names of such: no component is called so."""
_MAX_TEXT = 64
_COPIED_NBYTES = 16 << 20
UNHURRIED = -1
"""Owner of what nobody waits for before it changes something: no ``id`` is this."""

_PATIENCE_S, _LOOK_S = 120.0, 0.0005

LARGE_NBYTES = 64 << 10
"""From here on reading a tensor takes longer than saying so."""


def claims(collected: Collected) -> Claims:
    """Everything the ranks must agree on, but for the values of replicated tensors: see :class:`Replicas`."""
    said: Claims = defaultdict(dict)
    for key, item in collected.items.items():
        if item.sharing is not Sharing.PER_RANK:
            said[component_of(key)][key] = item.claim
    for key, of in collected.aliases.items():
        said[component_of(key)][key] = f"is {of}"
    for name, document in collected.documents.items():
        for path, leaf in documents.leaves(document, name).items():
            said[component_of(name)].setdefault(path, _text(leaf))  # a tensor has said more than its place already
    for name in collected.own_documents:
        said[component_of(name)][component_of(name)] = "per rank"
    return said


class Replicas:
    """Hashes of all tensors that several ranks hold alike; each is read once.

    Args:
        collected: This rank's part.
        later: Whether large tensors may wait; small ones are hashed now.
        guarded: Whether the optimizers wait for that.

    Attributes:
        tasks: What waits.
        held: Copies of what is to be compared byte by byte, and is not hashed, by key.
    """

    def __init__(self, collected: Collected, *, later: bool, guarded: bool) -> None:
        items = collected.items.items()
        replicated = {
            k: item
            for k, item in items
            if item.validate != "off" and (item.sharing is Sharing.REPLICATED or item.compared)
        }
        self.held = {k: Held(i) for k, i in replicated.items() if i.validate == "full" and not i.compared}
        replicated = {k: item for k, item in replicated.items() if k not in self.held}
        self._places = {k: _place(k, item) for k, item in replicated.items()}
        on_host = {k: item for k, item in replicated.items() if item.tensor.device.type == "cpu"}
        large = {k: item for k, item in on_host.items() if later and item.tensor.nbytes >= LARGE_NBYTES}
        self.tasks: list[Hashing | DeviceHashing] = [
            Hashing(k, item, item.owner if guarded else None) for k, item in large.items()
        ]
        self._hashes = {k: _hash_host(item.tensor) for k, item in on_host.items() if k not in large}
        by_device: dict[torch.device, dict[str, torch.Tensor]] = defaultdict(dict)
        for k, item in replicated.items():
            if k not in on_host and item.tensor.numel():
                by_device[item.tensor.device][k] = item.tensor
        there = [DeviceHashing(tensors) for tensors in by_device.values()]
        if later:
            self.tasks += there
        for each in () if later else there:
            each.run()
            self._hashes |= each.hashes

    def complete(self, said: Claims) -> None:
        """Add all of them to what this rank says; every task is done."""
        for task in self.tasks:
            self._hashes |= task.hashes
        for key, value in self._hashes.items():
            component, name = self._places[key]
            said[component][name] = f"{said[component].get(name, 'part')} {value:016x}"
        self.tasks.clear()


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
    """One large tensor is hashed before it may change.

    Attributes:
        key: The tensor's.
        owner: Who waits for it.
        begin: None: it writes nothing.
        hashes: The result, by key.
    """

    begin = None

    def __init__(self, key: str, item: Item, owner: int | None) -> None:
        self.key, self.owner, self._tensor, self._origin = key, owner, item.tensor, item.origin
        self._version = item.origin._version  # noqa: SLF001 - torch's only counter
        self.hashes: dict[str, int] = {}

    def run(self) -> None:
        """Any thread."""
        self.hashes = {self.key: _hash_host(self._tensor)}

    def check(self) -> None:
        """Raises TornSnapshotError if torch has seen it written to."""
        if self._origin._version != self._version:  # noqa: SLF001
            raise TornSnapshotError(self.key, "it was changed while it was being hashed")


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


def component_of(key: str) -> str:
    """The name in the user's mapping that a key belongs to."""
    return key.split(".", 1)[0].split("@", 1)[0]


def digests(said: Claims) -> dict[str, str]:
    """One digest per component."""
    return {component: digest(compact(sorted(keys.items()))) for component, keys in said.items()}


def differing(by_rank: Sequence[Mapping[str, str]]) -> list[str]:
    """Components whose digests are not the same everywhere, or that not every rank has; a group's, in the group."""
    names = sorted({name for rank in by_rank for name in rank})
    return [name for name in names if len({rank.get(name) for rank in by_rank if _has(rank, name)}) > 1]


def disagreements(by_rank: Sequence[Claims]) -> list[tuple[str, dict[str, list[int]]]]:
    """Keys on which the ranks differ: for each, what is said and by whom. ``absent`` where a rank lacks it."""
    keys = sorted({(key, name) for said in by_rank for name, component in said.items() for key in component})
    found: list[tuple[str, dict[str, list[int]]]] = []
    for key, name in keys:
        answers: dict[str, list[int]] = defaultdict(list)
        for rank, said in enumerate(by_rank):
            if _has(said, name):
                answers[said.get(name, {}).get(key, "absent")].append(rank)
        if len(answers) > 1:
            found.append((key, dict(answers)))
    return found


def _has(said: Mapping[str, Any], component: str) -> bool:
    return component in said or not component.startswith(_GROUP)


def _place(key: str, item: Item) -> tuple[str, str]:
    """Under which component and name the hash of a tensor is said: that of all ranks, or of those that hold a part."""
    if not item.compared:
        return component_of(key), key
    box = "" if item.shape == tuple(item.tensor.shape) else f"[{','.join(map(str, item.offsets))}...]"
    return f"{_GROUP}{_group(item.compared)}", key + box


@functools.lru_cache(maxsize=64)
def _group(ranks: tuple[int, ...]) -> str:
    return digest(compact(list(ranks)))[:16]


def _text(leaf: Any) -> str:
    data = compact(leaf)
    return data.decode() if len(data) <= _MAX_TEXT else f"{data[:24].decode()}... ({digest(data)[:12]})"


def _hash_host(tensor: torch.Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    hasher = xxhash.xxh3_64()
    for part in _parts(tensor):
        flat = part.resolve_conj().contiguous().view(-1).view(torch.uint8)
        hasher.update(flat.numpy().data)
    return hasher.intdigest()


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """What is hashed at once: all of it, or some rows of what has to be copied for that."""
    if tensor.dim() == 0 or (tensor.is_contiguous() and not tensor.is_conj()):
        return iter([tensor])
    rows = max(1, _COPIED_NBYTES * tensor.shape[0] // max(1, tensor.nbytes))
    return iter(tensor.split(rows))

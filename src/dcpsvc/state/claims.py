"""What each rank says it would save, in a form that ranks can compare: before a byte is written.

One digest per component travels with every save, and one for each group of ranks that hold the same parts. Only when
digests differ are the details exchanged, key by key, so the error can name what differs and on which ranks.
"""

from __future__ import annotations

import functools
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
            if item.validate != "off" and (item.sharing is Sharing.REPLICATED or item.alike)
        }
        self.held = {k: Held(i) for k, i in replicated.items() if i.validate == "full" and not i.alike}
        replicated = {k: item for k, item in replicated.items() if k not in self.held}
        self._places = {k: _place(k, item) for k, item in replicated.items()}
        on_host = {k: item for k, item in replicated.items() if item.tensor.device.type == "cpu"}
        large = {k: item for k, item in on_host.items() if later and item.tensor.nbytes >= LARGE_NBYTES}
        self.tasks: list[Hashing] = [Hashing(k, item, item.owner if guarded else None) for k, item in large.items()]
        self._hashes = {k: _hash_host(item.tensor) for k, item in on_host.items() if k not in large}
        elsewhere = {k: i.tensor for k, i in replicated.items() if k not in on_host and i.tensor.numel()}
        self._hashes |= _hash_on_device(elsewhere)

    def complete(self, said: Claims) -> None:
        """Add all of them to what this rank says; every task is done."""
        for key, value in (self._hashes | {task.key: task.hash for task in self.tasks}).items():
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
        hash: The result.
    """

    begin = None

    def __init__(self, key: str, item: Item, owner: int | None) -> None:
        self.key, self.owner, self._tensor, self._origin = key, owner, item.tensor, item.origin
        self._version = item.origin._version  # noqa: SLF001 - torch's only counter
        self.hash = 0

    def run(self) -> None:
        """Any thread."""
        self.hash = _hash_host(self._tensor)

    def check(self) -> None:
        """Raises TornSnapshotError if torch has seen it written to."""
        if self._origin._version != self._version:  # noqa: SLF001
            raise TornSnapshotError(self.key, "it was changed while it was being hashed")


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
    if not item.alike:
        return component_of(key), key
    box = "" if item.shape == tuple(item.tensor.shape) else f"[{','.join(map(str, item.offsets))}...]"
    return f"{_GROUP}{_group(item.alike)}", key + box


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


def _hash_on_device(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Hash where the data is and bring back 8 bytes per tensor, all in one transfer per device."""
    if not tensors:
        return {}
    sums = torch.stack([torch.hash_tensor(tensor).cpu() for tensor in tensors.values()])
    return {key: value % 2**64 for key, value in zip(tensors, sums.tolist(), strict=True)}

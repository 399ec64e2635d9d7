"""A fingerprint of tensors that adds up over the parts of them that ranks hold, however they are sharded.

Every element counts with a weight that its place in the whole tensor gives, modulo 2**64, so that what changes, or
changes places, changes the sum.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

import torch
import xxhash
from torch.distributed.tensor import DTensor

from dcpsvc.errors import UnsupportedStateError
from dcpsvc.state import inner, ragged
from dcpsvc.state.collected import Collected, Item, Sharing
from dcpsvc.state.drift import Drift

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

BASE = "__base__"
"""Stands for all that is not saved of a module, in a table of differences and in ``skip``."""

_VERSION = "base."
"""Begins what a manifest says about it among its versions."""

_AS_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE = 1 << 20
"""Elements; 8 bytes of each are in memory at a time, twice."""
_MODULUS = 1 << 64


class Sums(NamedTuple):
    """What one rank says about tensors.

    Attributes:
        counted: Over its part of them; what several ranks hold is counted by one of them.
        whole: Over those that every rank holds, which must be the same on all.
    """

    counted: int
    whole: int

    def plus(self, counted: int) -> Sums:
        """With more that only this rank counts."""
        return Sums((self.counted + counted) % _MODULUS, self.whole)


class Said(NamedTuple):
    """What one rank tells the others about a module's base.

    Attributes:
        name: What the checkpoint calls the module; of one that is being saved, what the base is called.
        counted: See :class:`Sums`; None: not all of it is in memory.
        whole: Likewise; None: it is no other rank's.
        here: Of one that is being loaded, what the base is called in memory.
    """

    name: str
    counted: int | None
    whole: int | None
    here: str = ""


def sums(tensors: Iterable[tuple[str, torch.Tensor]], rank: int, holder: int | None) -> Sums | None:
    """Reads each tensor once, in pieces, where it is. None if some have no values yet.

    Args:
        tensors: By their names in the whole.
        rank: This one.
        holder: Of a part that only some ranks hold: which of them counts it.
    """
    counted = whole = 0
    for name, tensor in (part for pair in tensors for part in _parts(*pair, rank)):
        if tensor.is_meta:
            return None
        if inner.is_wrapper(tensor):
            continue  # how what is inside is sharded is not known: its shape has to do
        collected = Collected(rank)
        with contextlib.suppress(UnsupportedStateError):  # its shape has to do
            if holder is None:
                collected.add(name, tensor, Sharing.REPLICATED)
            else:
                collected.add_part(name, tensor, holder)
        for item in collected.items.values():
            replicated = item.sharing is Sharing.REPLICATED
            if not replicated and not (item.writes and item.alike[:1] in {(), (rank,)}):
                continue  # of those that hold it alike the first counts it
            found = _sum(name, item)
            whole += found if replicated else 0
            counted += found if not replicated or rank == 0 else 0
    return Sums(counted % _MODULUS, whole % _MODULUS)


def of(name: str, tensor: torch.Tensor) -> int | None:
    """Of one tensor, of which this rank has all. None if it has no values yet."""
    found = sums([(name, tensor)], 0, 0)
    return None if found is None else found.counted


def versions(by_rank: Sequence[Mapping[str, Sequence[object]]]) -> dict[str, str]:
    """What the manifest says about the bases of all modules: the name and the fingerprint of each."""
    found: dict[str, str] = {}
    for component, said in _by_component(by_rank).items():
        total = _total(said)
        found[_VERSION + component] = f"{said[0].name or 'unnamed'} {'-' if total is None else f'{total:016x}'}"
    return found


def check(step: int, saved: Mapping[str, str], by_rank: Sequence[Mapping[str, Sequence[object]]]) -> None:
    """Compare the bases in memory with what the manifest says.

    Raises:
        StructureMismatchError: Another base, or not the same one on all ranks; names the component.
    """
    drift = Drift(step)
    for component, said in _by_component(by_rank).items():
        theirs, total = saved.get(_VERSION + said[0].name, ""), _total(said)
        there = theirs.rpartition(" ")[2]
        wholes = [one.whole for one in said]
        if not there or there == "-" or total is None:
            continue
        odd = [rank for rank, one in enumerate(wholes) if one != wholes[0]]
        if odd or there != f"{total:016x}":
            mine = f"{said[0].here or 'unnamed'} {total:016x}"
            here = f"on ranks {tuple(odd)} another than on rank 0" if odd else mine
            drift.add(f"{component}.{BASE}", "base", theirs, here)
    drift.check()


def _by_component(by_rank: Sequence[Mapping[str, Sequence[object]]]) -> dict[str, list[Said]]:
    names = sorted({name for one in by_rank for name in one})
    return {name: [Said(*one[name]) for one in by_rank if name in one] for name in names}  # type: ignore[arg-type]


def _total(said: Iterable[Said]) -> int | None:
    total = 0
    for one in said:
        if one.counted is None:
            return None
        total += one.counted
    return total % _MODULUS


def _parts(name: str, tensor: torch.Tensor, rank: int) -> Iterable[tuple[str, torch.Tensor]]:
    """The tensor, or those that a wrapper (a quantized weight) is made of."""
    if isinstance(tensor, DTensor) or not inner.is_wrapper(tensor):
        return [(name, tensor)]
    return inner.parts(name, tensor, rank).items()


def _sum(name: str, item: Item) -> int:
    bits = _bits(item.tensor)
    extra = (0,) * (bits.dim() - item.tensor.dim())
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    if item.is_ragged:
        for after, offsets, sizes in ragged.boxes(item.shape, item.offsets[0], item.tensor.numel()):
            box = bits.narrow(0, after, torch.Size(sizes).numel()).view(*sizes, *bits.shape[1:])
            total += _weighted(box, (*offsets, *extra), 0)
    elif bits.numel():
        total += _weighted(bits.reshape(1) if bits.dim() == 0 else bits, (*item.offsets, *extra) or (0,), 0)
    return int(total.item()) * (xxhash.xxh3_64_intdigest(name.encode()) | 1)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as integers of their size; two of each where they have 16 bytes."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    kind = _AS_INTEGER.get(tensor.element_size())
    return tensor.view(kind) if kind is not None else torch.view_as_real(tensor).view(torch.int64)


def _weighted(bits: torch.Tensor, offsets: Sequence[int], dim: int) -> torch.Tensor:
    """The sum over a box; the weight of an element is the product of those of its index along each dimension."""
    count = bits.shape[0]
    if bits.numel() <= _AT_ONCE:
        total = bits.to(torch.int64)
        for axis in reversed(range(bits.dim())):
            total = (total * _weights(offsets[axis], bits.shape[axis], dim + axis, bits.device)).sum(-1)
        return total
    if count == 1:
        return _weights(offsets[0], 1, dim, bits.device)[0] * _weighted(bits[0], offsets[1:], dim + 1)
    rows = max(1, count * _AT_ONCE // bits.numel())
    pieces = zip(range(0, count, rows), bits.split(rows), strict=True)
    summed = [_weighted(piece, (offsets[0] + begin, *offsets[1:]), dim) for begin, piece in pieces]
    return torch.stack(summed).sum()


def _weights(begin: int, count: int, dim: int, device: torch.device) -> torch.Tensor:
    """Odd numbers that look like chance, one for each index. Source: splitmix64."""
    mixed = torch.arange(begin, begin + count, device=device) + (dim << 56)
    mixed = mixed * -0x61C8864680B583EB
    mixed = (mixed ^ _shifted(mixed, 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ _shifted(mixed, 27)) * -0x6B2FB644ECCEEE15
    return (mixed ^ _shifted(mixed, 31)) | 1


def _shifted(values: torch.Tensor, by: int) -> torch.Tensor:
    """To the right, with zeros."""
    return (values >> by) & ((1 << (64 - by)) - 1)

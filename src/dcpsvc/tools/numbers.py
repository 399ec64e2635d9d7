"""The numbers in two saved tensors, compared piece by piece; the tensors may be cut in different ways."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcpsvc.format.layout import ITEM_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dcpsvc.format.layout import Chunk, Tensor
    from dcpsvc.storage.shards import VerifiedShard

_NUMPY = {
    "BOOL": "u1", "U8": "u1", "I8": "i1", "F8_E5M2": "u1", "F8_E4M3": "u1", "I16": "i2", "U16": "u2", "F16": "f2",
    "BF16": "u2", "I32": "i4", "U32": "u4", "F32": "f4", "I64": "i8", "U64": "u8", "F64": "f8", "C64": "c8",
}  # fmt: skip
_NO_DISTANCE = frozenset({"BOOL", "F8_E5M2", "F8_E4M3"})
"""Of these only whether they differ is told: NumPy does not know the eight-bit floats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """How far two tensors of one name are from each other.

    Attributes:
        name: Of the tensor.
        elements: All of them.
        differing: Those whose bits differ.
        largest: Largest absolute difference; None where the dtype has none, NaN if either holds one there.
        relative: Euclidean length of the difference over that of A; infinite if A is zero.
    """

    name: str
    elements: int
    differing: int
    largest: float | None
    relative: float | None


@dataclass(slots=True)
class _Sums:
    differing: int = 0
    largest: float = 0.0
    squares: float = 0.0
    of_a: float = 0.0

    def add(self, a: Any, b: Any, bits_a: Any, bits_b: Any, *, distance: bool) -> None:
        import numpy as np

        self.differing += int(np.count_nonzero(bits_a != bits_b))
        if distance and a.size:
            with np.errstate(invalid="ignore", over="ignore"):
                gap = np.where(bits_a == bits_b, 0.0, np.abs(b - a))  # infinity is not far from itself
            self.largest = float(np.maximum(self.largest, gap.max()))  # NaN stays
            self.squares += float(np.square(gap).sum())
            self.of_a += float(np.square(np.abs(a)).sum())


def compare(
    name: str,
    a: tuple[Tensor, Sequence[VerifiedShard]],
    b: tuple[Tensor, Sequence[VerifiedShard]],
    progress: Callable[[int], None],
) -> Gap:
    """Compare two tensors of one dtype and shape. Holds one chunk of each in memory, and A's a second time.

    Args:
        name: Of the tensor.
        a: Its description in A, and A's shards by rank.
        b: The same of B.
        progress: Called with the number of bytes of A just compared.

    Raises:
        CorruptShardError: Bytes do not match their checksum.
    """
    tensor, sums = a[0], _Sums()
    distance = tensor.dtype not in _NO_DISTANCE
    for chunk in tensor.chunks:
        if not chunk.numel:
            continue
        bits_a = _read(tensor.dtype, chunk, a[1])
        bits_b = _read_box(chunk, *b)
        sums.add(_wide(tensor.dtype, bits_a), _wide(tensor.dtype, bits_b), bits_a, bits_b, distance=distance)
        progress(chunk.numel * ITEM_NBYTES[tensor.dtype])
    relative = math.sqrt(sums.squares / sums.of_a) if sums.of_a else math.inf if sums.squares else 0.0
    return Gap(
        name=name,
        elements=math.prod(tensor.shape),
        differing=sums.differing,
        largest=sums.largest if distance else None,
        relative=relative if distance else None,
    )


def _read(dtype: str, chunk: Chunk, shards: Sequence[VerifiedShard]) -> Any:
    """A chunk's bits, in its own shape."""
    import numpy as np

    nbytes = chunk.numel * ITEM_NBYTES[dtype]
    data = shards[chunk.rank].read(chunk.begin, chunk.begin + nbytes)
    return np.frombuffer(data, dtype=f"<u{ITEM_NBYTES[dtype]}").reshape(chunk.sizes)


def _read_box(box: Chunk, tensor: Tensor, shards: Sequence[VerifiedShard]) -> Any:
    """The bits of a box of a tensor, whose chunks are cut in whatever way."""
    import numpy as np

    found = np.zeros(box.sizes, dtype=f"<u{ITEM_NBYTES[tensor.dtype]}")
    for chunk in tensor.overlapping(box.offsets, box.sizes):
        low = [max(x, y) for x, y in zip(box.offsets, chunk.offsets, strict=True)]
        high = [
            min(x + m, y + n) for x, m, y, n in zip(box.offsets, box.sizes, chunk.offsets, chunk.sizes, strict=True)
        ]
        found[_within(box, low, high)] = _read(tensor.dtype, chunk, shards)[_within(chunk, low, high)]
    return found


def _within(box: Chunk, low: Sequence[int], high: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(x - o, y - o) for x, y, o in zip(low, high, box.offsets, strict=True))


def _wide(dtype: str, bits: Any) -> Any:
    """The numbers those bits are, in a type that their difference fits."""
    import numpy as np

    if dtype == "BF16":
        return (bits.astype("<u4") << 16).view("<f4").astype("f8")
    numbers = bits.view(f"<{_NUMPY[dtype]}") if _NUMPY[dtype] != "u1" else bits
    return numbers.astype("c16" if np.iscomplexobj(numbers) else "f8")

"""R34: tensors of which ranks have parts are put together out of rounds of a bounded size, or refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcpsvc.errors import CorruptShardError
from dcpsvc.format import rounds
from dcpsvc.format.layout import Chunk, Tensor
from dcpsvc.format.safetensors import Entry


def cut(shape: tuple[int, ...], world: int, dim: int) -> list[tuple[slice, ...]]:
    """A tensor along one dimension, as evenly as may be."""
    edges = [shape[dim] * rank // world for rank in range(world + 1)]
    return [
        tuple(slice(edges[r], edges[r + 1]) if d == dim else slice(0, n) for d, n in enumerate(shape))
        for r in range(world)
    ]


def divided(
    shapes: list[tuple[int, ...]], world: int, dims: list[int]
) -> tuple[list[Entry], list[np.ndarray], list[bytes]]:
    """Tensors, their values, and the files of the ranks."""
    files = [b""] * world
    entries, values = [], []
    for number, (shape, dim) in enumerate(zip(shapes, dims, strict=True)):
        value = np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape) + number
        chunks = []
        boxes = cut(shape, world, dim % len(shape)) if shape else [()]
        for rank, box in enumerate(boxes):
            part = value[box]
            if part.size:
                sizes, offsets = part.shape, tuple(one.start for one in box)
                chunks.append(Chunk(rank, offsets, sizes, len(files[rank])))
                files[rank] += part.tobytes()
        entries.append(Entry(str(number), f"model.{number}", Tensor.of("I32", shape, chunks), "I32"))
        values.append(value)
    return entries, values, files


def sent(pieces: list[rounds.Piece], files: list[bytes]) -> list[bytearray]:
    """What the ranks give in a round, of the sizes that all of them know."""
    mine: list[list[bytes]] = [[] for _ in files]
    for piece in pieces:
        rank, begin = piece.chunk.rank, piece.chunk.begin
        mine[rank].append(files[rank][begin : begin + piece.nbytes])
    said = [rounds.sealed(parts) if parts else bytearray() for parts in mine]
    assert rounds.sizes(pieces, len(files)) == [len(data) for data in said]
    return said


shapes = st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=4)


@settings(deadline=None)
@given(shapes, st.integers(1, 4), st.lists(st.integers(0, 2), min_size=4, max_size=4), st.integers(8, 200))
def test_whoever_has_which_part_each_tensor_arrives_whole_and_in_order(
    given_shapes: list[tuple[int, ...]], world: int, dims: list[int], limit: int
) -> None:
    entries, values, files = divided(given_shapes, world, dims[: len(given_shapes)])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rounds, "ROUND_NBYTES", limit)
        patched.setattr(rounds, "PIECE_NBYTES", limit // 4)
        found = list(rounds.rounds(entries))
        arriving = (one for pieces in found for one in rounds.opened(pieces, sent(pieces, files)))
        assert [bytes(data) for data in rounds.assembled(arriving)] == [value.tobytes() for value in values]
        assert all(len(pieces) == 1 or sum(piece.nbytes for piece in pieces) <= limit for pieces in found)


@pytest.mark.parametrize("how", ["flipped", "short", "nothing", "zeros"])
def test_what_a_rank_did_not_send_as_it_has_it_is_refused_with_its_number(how: str) -> None:
    entries, _, files = divided([(4, 4)], 2, [0])
    (pieces,) = rounds.rounds(entries)
    said = sent(pieces, files)
    damaged = {
        "flipped": said[1][:-1] + b"x", "short": said[1][:-1], "nothing": b"", "zeros": bytes(len(said[1])),
    }  # fmt: skip
    with pytest.raises(CorruptShardError, match="rank 1 did not send"):
        rounds.opened(pieces, [said[0], bytearray(damaged[how])])

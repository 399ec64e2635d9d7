"""Hashes of replicas: the same wherever the bytes are read; what this rank writes is read where it was copied."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch

from dcpsvc.arena import Arena
from dcpsvc.format import shardfile
from dcpsvc.format.digest import BLOCK_NBYTES
from dcpsvc.format.shardfile import Piece
from dcpsvc.outline import Outline
from dcpsvc.stages.stage import Snapshot
from dcpsvc.state.collected import Collected, Sharing
from dcpsvc.state.replicas import Copied, Replicas

if TYPE_CHECKING:
    from collections.abc import Sequence

NBYTES = 3 * BLOCK_NBYTES + 1000


def big() -> torch.Tensor:
    return torch.randint(0, 256, (NBYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def replicas(tensor: torch.Tensor, copied: Sequence[Copied]) -> Replicas:
    collected = Collected(0)
    collected.add("w", tensor, Sharing.REPLICATED)
    return Replicas(collected, {"w": copied}, later=True, guarded=False)


def hashed(tensor: torch.Tensor, image: torch.Tensor, copied: Sequence[Copied]) -> dict[str, dict[str, str]]:
    found = replicas(tensor, copied)
    for task in found.tasks:
        task.run()
    tensor.zero_()  # training has gone on
    found.complete(image.numpy().data)
    return found.said


@pytest.mark.parametrize(
    ("begin", "end"),
    [(0, NBYTES), (0, BLOCK_NBYTES), (1, 2 * BLOCK_NBYTES + 1), (BLOCK_NBYTES, NBYTES), (5, 7), (NBYTES - 9, NBYTES)],
)
def test_a_tensor_has_the_same_hash_whatever_part_of_it_was_copied(begin: int, end: int) -> None:
    nothing = torch.empty(0, dtype=torch.uint8)
    image = torch.cat([torch.zeros(17, dtype=torch.uint8), big()[begin:end]])
    assert hashed(big(), image, [Copied(begin, end, 17)]) == hashed(big(), nothing, [])


def test_another_byte_in_what_was_copied_is_another_hash() -> None:
    image = big()
    image[BLOCK_NBYTES + 3] ^= 1
    assert hashed(big(), image, [Copied(0, NBYTES, 0)]) != hashed(big(), big(), [Copied(0, NBYTES, 0)])


def test_of_what_this_rank_writes_whole_nothing_is_hashed_before_it_may_change() -> None:
    assert replicas(big(), [Copied(0, NBYTES, 0)]).tasks == []


def test_an_arena_is_not_free_before_what_is_in_it_is_hashed_or_nobody_wants_it() -> None:
    ends = []
    for way in ("hashed", "given up"):
        with ThreadPoolExecutor(1) as threads:
            placement = shardfile.place([Piece("v", "F32", (4,), (0,), (4,))])
            snapshot = Snapshot(Outline(placement, [torch.ones(4)], {}, {}), Arena(), threads)
            snapshot.hasher = found = replicas(big(), [Copied(0, NBYTES, 0)])
            snapshot.stage()
            snapshot.copying.wait()
            ends.append(snapshot.ended)
            if way == "hashed":
                found.complete(big().numpy().data)
            else:
                snapshot.forget()
            ends.append(snapshot.ended)
    assert ends == [False, True, False, True]

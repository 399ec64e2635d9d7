"""What is worked out once for a structure is used for that structure and for no other."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dcpsvc import Checkpointer
from dcpsvc.blueprint import Blueprint, Blueprints
from dcpsvc.state.collected import Collected, Sharing
from tests.unit.one_process import bits, resume

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = 30


def collected(**tensors: torch.Tensor) -> Collected:
    found = Collected(0)
    for key, tensor in tensors.items():
        found.add(key, tensor, Sharing.REPLICATED)
    return found


BASE = {"a": torch.ones(2, 3), "b": torch.zeros(5)}


def test_the_same_structure_is_worked_out_once_whatever_the_values_and_their_order() -> None:
    blueprints = Blueprints(0, 1)
    first = blueprints.of(collected(**BASE))
    assert blueprints.of(collected(a=torch.zeros(2, 3), b=torch.ones(5))) is first
    assert blueprints.of(collected(b=torch.ones(5), a=torch.zeros(2, 3))) is first
    assert blueprints.made == 1


def change(found: Collected, **changes: Any) -> Collected:
    found.items["a"] = found.items["a"]._replace(**changes)
    return found


def alias(found: Collected) -> Collected:
    found.aliases["c"] = "a"
    return found


OTHERS = {
    "dtype": collected(a=torch.ones(2, 3).bfloat16(), b=BASE["b"]),
    "shape": collected(a=torch.ones(3, 2), b=BASE["b"]),
    "name": collected(x=BASE["a"], b=BASE["b"]),
    "more": collected(**BASE, c=torch.ones(1)),
    "fewer": collected(a=BASE["a"]),
    "sharing": change(collected(**BASE), sharing=Sharing.FIRST),
    "who writes": change(collected(**BASE), writes=False),
    "how replicas are compared": change(collected(**BASE), validate="full"),
    "who holds the same": change(collected(**BASE), alike=(0, 1)),
    "whole shape": change(collected(**BASE), shape=(4, 3)),
    "offsets": change(collected(**BASE), offsets=(1, 0)),
    "local shape": change(collected(**BASE), tensor=torch.ones(1, 3)),
    "alias": alias(collected(**BASE)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_structure_is_worked_out_anew(what: str) -> None:
    blueprints = Blueprints(0, 1)
    first = blueprints.of(collected(**BASE))
    assert blueprints.of(OTHERS[what]) is not first
    assert blueprints.of(collected(**BASE)) is first
    blueprints.of(collected(third=torch.ones(3)))
    blueprints.of(collected(fourth=torch.ones(3)))
    assert blueprints.of(collected(**BASE)) is not first
    assert blueprints.made == 5


STATES = st.dictionaries(
    st.sampled_from("abc"), st.tuples(st.sampled_from([torch.float32, torch.int8]), st.integers(0, 4)), max_size=3
)


@given(st.lists(STATES, max_size=6), st.integers(1, 3))
def test_whatever_came_before_it_is_what_a_new_one_would_be(
    states: list[dict[str, tuple[torch.dtype, int]]], world_size: int
) -> None:
    blueprints = Blueprints(0, world_size)
    for state in states:
        found = collected(**{key: torch.ones(numel, dtype=dtype) for key, (dtype, numel) in state.items()})
        used, new = blueprints.of(found), Blueprint(found, 0, world_size)
        assert (used.placement, used.part, used.said) == (new.placement, new.part, new.said)
        assert [tensor.shape for tensor in used.sources(found)] == [piece.sizes for piece in used.placement.pieces]
        assert all(
            source.data_ptr() == found.items[piece.key].tensor.data_ptr()
            for source, piece in zip(used.sources(found), used.placement.pieces, strict=True)
        )


def test_a_parameter_that_changes_its_dtype_or_size_between_saves_is_saved_as_it_is_and_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(5, 3, bias=False)
    changes = [
        lambda: None,
        model.bfloat16,
        lambda: setattr(model, "weight", nn.Parameter(torch.randn(3, 9))),
        model.float,
    ]
    weights: dict[int, torch.Tensor] = {}
    with (
        caplog.at_level(logging.INFO, "dcpsvc"),
        Checkpointer(tmp_path / "root", {"model": model}, local=tmp_path / "local", save_last=False) as ckpt,
    ):
        for step, make in enumerate(changes, 1):
            make()
            ckpt.save(step).wait(SECONDS)
            weights[step] = model.weight.detach().clone()
    assert len([record for record in caplog.records if "planned anew" in record.getMessage()]) == 1

    for step, weight in weights.items():
        other = nn.Linear(weight.shape[1], 3, bias=False, dtype=weight.dtype)
        assert resume(tmp_path, {"model": other}, step=step) == step
        assert (other.weight.dtype, bits(other.weight)) == (weight.dtype, bits(weight))

"""What ranks say they would save: equal state, equal digests; what differs is named with the ranks."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from dcpsvc import PerRank, Rng
from dcpsvc.state import claims
from dcpsvc.state.app import AppState
from dcpsvc.state.replicas import Replicas

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.state.claims import Claims


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def said(state: dict[str, Any], rank: int = 0, *, verify_replicas: bool = True) -> Claims:
    collected = AppState(state).collect(rank)
    found = claims.claims(collected)
    if verify_replicas:
        replicas = Replicas(collected, {}, later=False, guarded=False)
        replicas.complete(None)
        for component, values in replicas.said.items():
            found.setdefault(component, {}).update(values)
    return found


def differing(*states: dict[str, Any], **options: bool) -> list[str]:
    return claims.differing([claims.digests(said(state, rank, **options)) for rank, state in enumerate(states)])


def disagreements(*states: dict[str, Any]) -> dict[str, dict[str, list[int]]]:
    return dict(claims.disagreements([said(state, rank) for rank, state in enumerate(states)]))


def state(**changes: Any) -> dict[str, Any]:
    return {"model": model(), "sched": {"lr": 0.5, "milestones": [1, 2]}, "ema": torch.ones(5)} | changes


def test_equal_state_has_equal_digests_on_every_rank() -> None:
    assert differing(state(), state(), state()) == []
    assert disagreements(state(), state(), state()) == {}


def test_one_changed_weight_is_named_with_the_ranks() -> None:
    other = model()
    with torch.no_grad():
        other[0].weight[2, 3] += 1e-6
    states = (state(), state(model=other), state())
    assert differing(*states) == ["model"]
    ((key, answers),) = disagreements(*states).items()
    assert key == "model.0.weight"
    assert sorted(answers.values()) == [[0, 2], [1]]
    assert all(said.startswith("F32[3, 4] replicated ") for said in answers)


def test_a_changed_weight_is_not_looked_for_when_not_asked() -> None:
    assert differing(state(), state(model=model(seed=1)), verify_replicas=False) == []


def test_a_missing_key_is_named_as_absent() -> None:
    other = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))
    other.load_state_dict(model().state_dict(), strict=False)
    answers = disagreements(state(), state(model=other))["model.0.bias"]
    assert answers["absent"] == [1]


@pytest.mark.parametrize(
    ("change", "word"),
    [(lambda weight: weight.double(), "F64[3, 4] replicated"), (lambda weight: weight[:, :2], "F32[3, 2] replicated")],
    ids=["dtype", "shape"],
)
def test_another_dtype_or_shape_is_named(change: Callable[[torch.Tensor], torch.Tensor], word: str) -> None:
    other = model()
    other[0].weight = nn.Parameter(change(other[0].weight.detach()))
    states = (state(), state(), state(model=other))
    assert differing(*states) == ["model"]
    answers = disagreements(*states)["model.0.weight"]
    assert [ranks for text, ranks in answers.items() if text.startswith(word)] == [[2]]


def test_a_different_json_leaf_is_named_with_what_each_rank_says() -> None:
    states = (state(), state(sched={"lr": 0.25, "milestones": [1, 2]}))
    assert differing(*states) == ["sched"]
    assert disagreements(*states) == {"sched.lr": {"0.5": [0], "0.25": [1]}}


def test_a_long_json_leaf_is_told_by_its_beginning() -> None:
    one, other = (state(sched={"seen": [*range(1000), last]}) for last in (1, 2))
    (answers,) = disagreements(one, other).values()
    assert len(answers) == 2
    assert all(len(text) < 64 for text in answers)


def test_a_component_that_one_rank_lacks_is_named() -> None:
    lacking = state()
    del lacking["ema"]
    assert differing(state(), state(), lacking) == ["ema"]
    answers = disagreements(state(), state(), lacking)["ema"]
    assert answers["absent"] == [2]


def test_a_tie_that_only_one_rank_has_is_named() -> None:
    tied = model()
    tied.twin = tied[0]
    answers = disagreements(state(model=tied), state())["model.twin.weight"]
    assert answers == {"is model.0.weight": [0], "absent": [1]}


def test_buffers_need_not_be_equal_because_rank_0s_count() -> None:
    other = model()
    other[1].running_mean += 1
    assert differing(state(), state(model=other)) == []


def test_values_declared_per_rank_need_not_be_equal() -> None:
    one, other = (state(loader=PerRank({"seen": seen}), rng=Rng(), own=PerRank(torch.ones(seen))) for seen in (1, 2))
    assert differing(one, other) == []


def test_a_value_that_is_per_rank_on_one_rank_only_is_named() -> None:
    assert differing(state(loader={"seen": 1}), state(loader=PerRank({"seen": 1}))) == ["loader"]


@pytest.mark.parametrize(
    "tensor",
    [torch.arange(24).view(4, 6).T, torch.empty(0, 3), torch.tensor(2.5), torch.tensor([True, False]),
     torch.ones(3, dtype=torch.bfloat16), torch.ones(2, dtype=torch.complex64), torch.ones(1).expand(7)],
    ids=lambda tensor: f"{tensor.dtype}{list(tensor.shape)}",
)  # fmt: skip
def test_a_tensor_is_compared_by_value_whatever_its_strides(tensor: torch.Tensor) -> None:
    assert differing({"w": tensor}, {"w": tensor.clone(memory_format=torch.contiguous_format)}) == []


def test_making_claims_changes_nothing_and_uses_no_random_numbers() -> None:
    random.seed(1)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    given = state(rng=Rng())
    torch.set_rng_state(before[0])
    said(given)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # noqa: NPY002


@pytest.mark.parametrize(
    ("key", "component"), [("model", "model"), ("model.0.weight", "model"), ("rng@3", "rng"), ("rng@3.torch", "rng")]
)
def test_a_key_belongs_to_its_component(key: str, component: str) -> None:
    assert claims.component_of(key) == component


def test_digests_of_one_save_after_the_other_are_those_of_each() -> None:
    known = claims.Digests()
    for each in (state(), state(), state(sched={"lr": 0.1}), state(sched={"lr": 0.1}), {"ema": torch.ones(5)}, state()):
        found = said(each, verify_replicas=False)
        assert known.of(found) == claims.digests(found)

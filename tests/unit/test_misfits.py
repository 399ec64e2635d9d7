"""A checkpoint that does not fit: told by key, with nothing in memory changed, unless it is skipped by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from dcpsvc.errors import ConfigError, RestoreFailedError
from tests.unit.models import assert_same, model
from tests.unit.one_process import bits, resume, save

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize(
    ("other", "key", "reason"),
    [
        (lambda: model(1, width=5), "model.0.weight", r"shape +float32\[3, 4\] +float32\[5, 4\]"),
        (lambda: model(1).double(), "model.0.weight", r"dtype +float32\[3, 4\] +float64\[3, 4\]"),
        (lambda: model(1).append(nn.Linear(2, 2)), "model.4.bias", r"missing +- +float32\[2\]"),
        (lambda: model(1)[:3], "model.3.bias", r"unexpected +float32\[2\] +-"),
    ],
    ids=["shape", "dtype", "missing", "unexpected"],
)  # fmt: skip
def test_a_model_that_does_not_fit_is_named_by_key_and_left_untouched(
    tmp_path: Path, other: Callable[[], nn.Module], key: str, reason: str
) -> None:
    save(tmp_path, {"model": model(0), "seen": {"n": 5}})
    fresh, seen = other(), {"n": 0}
    before = [bits(tensor) for tensor in fresh.state_dict().values()]
    with pytest.raises(RestoreFailedError, match=rf"{key} +{reason}"):
        resume(tmp_path, {"seen": seen, "model": fresh})
    assert [bits(tensor) for tensor in fresh.state_dict().values()] == before
    assert seen == {"n": 0}


def test_a_component_the_checkpoint_lacks_is_named_and_the_rest_is_left_untouched(tmp_path: Path) -> None:
    save(tmp_path, {"model": model(0)})
    fresh, untouched = model(1), model(1)
    with pytest.raises(RestoreFailedError, match=r"ema +missing +- +a component; skip=\['ema'\]"):
        resume(tmp_path, {"model": fresh, "ema": model(2)})
    assert_same(fresh, untouched)


def test_a_skipped_component_is_left_as_it_is_and_the_rest_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, {"model": model(0), "head": model(1)})
    state = {"model": model(2), "head": model(3), "new": {"a": 1}}
    assert resume(tmp_path, state, skip=["head", "new"]) == 1
    assert_same(state["model"], model(0))
    assert_same(state["head"], model(3))
    assert state["new"] == {"a": 1}


def test_skipping_what_is_not_there_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {"model": model(0)})
    with pytest.raises((ConfigError, RestoreFailedError), match="skip='optim' is not in the state"):
        resume(tmp_path, {"model": model(0)}, skip=["optim"])


def test_a_checkpoint_may_hold_more_than_the_state_asks_for(tmp_path: Path) -> None:
    save(tmp_path, {"model": model(0), "loader": {"seen": 5}})
    fresh = model(1)
    resume(tmp_path, {"model": fresh})
    assert_same(fresh, model(0))


# --- all differences at once, and what the user lets pass --------------------------------------------


def trained(module: nn.Module) -> dict[str, Any]:
    """The module and its optimizer after a step in which every parameter has another gradient."""
    optimizer = torch.optim.Adam(module.parameters(), lr=0.5)
    for number, parameter in enumerate(module.parameters()):
        parameter.grad = torch.full_like(parameter, float(number + 1))
    optimizer.step()
    return {"model": module, "optim": optimizer}


def two(first: str = "first", second: str = "second", width: int = 2) -> nn.Module:
    return nn.ModuleDict({first: nn.Linear(2, 2), second: nn.Linear(2, width)})


def test_every_difference_is_in_the_table_before_anything_is_touched(tmp_path: Path) -> None:
    save(tmp_path, trained(two()) | {"sched": {"n": 1}})
    fresh = nn.ModuleDict({"first": nn.Linear(2, 2).double(), "second": nn.Linear(2, 3), "third": nn.Linear(1, 1)})
    state = {"model": fresh, "sched": torch.zeros(1), "ema": {}}
    before = [bits(tensor) for tensor in fresh.state_dict().values()]
    with pytest.raises(RestoreFailedError) as caught:
        resume(tmp_path, state)
    rows = [line.split()[:2] for line in caught.value.failures[0].text.splitlines()]
    assert [row for row in rows if row[-1] in {"missing", "unexpected", "shape", "dtype", "kind"}] == [
        ["ema", "missing"],
        ["model.first.bias", "dtype"], ["model.first.weight", "dtype"],
        ["model.second.bias", "shape"], ["model.second.weight", "shape"],
        ["model.third.bias", "missing"], ["model.third.weight", "missing"],
        ["sched", "kind"],
    ]  # fmt: skip
    assert [bits(tensor) for tensor in fresh.state_dict().values()] == before


def test_a_long_table_says_how_many_rows_it_leaves_out(tmp_path: Path) -> None:
    save(tmp_path, {"model": nn.ModuleList(nn.Linear(1, 1) for _ in range(40))})
    with pytest.raises(RestoreFailedError, match=r"78 differences(.|\n)*and 48 more"):
        resume(tmp_path, {"model": nn.ModuleList([nn.Linear(1, 1)])})


def moments(state: dict[str, Any], name: str) -> bytes:
    return bits(state["optim"].state[state["model"].get_parameter(name)]["exp_avg"])


def test_renamed_keys_bring_their_optimizer_state_along(tmp_path: Path) -> None:
    saved, fresh = trained(two()), trained(two("begin", "second"))
    save(tmp_path, saved)
    resume(tmp_path, fresh, rename={"model.first": "model.begin"})
    for theirs, mine in (("first.weight", "begin.weight"), ("second.bias", "second.bias")):
        assert torch.equal(fresh["model"].get_parameter(mine), saved["model"].get_parameter(theirs))
        assert moments(fresh, mine) == moments(saved, theirs)


def test_a_renamed_component_is_loaded_under_its_new_name(tmp_path: Path) -> None:
    saved, fresh = trained(two()), trained(two())
    save(tmp_path, saved | {"count": {"n": 5}})
    state = {"net": fresh["model"], "adam": fresh["optim"], "seen": {}}
    resume(tmp_path, state, rename={"model": "net", "optim": "adam", "count": "seen"})
    assert_same(state["net"], saved["model"])
    assert moments(fresh, "second.weight") == moments(saved, "second.weight")
    assert state["seen"] == {"n": 5}


def test_a_skipped_key_stays_as_it_is_with_its_optimizer_state_and_the_rest_is_loaded(tmp_path: Path) -> None:
    saved, fresh = trained(two()), trained(two(width=3))
    save(tmp_path, saved)
    before, known = bits(fresh["model"]["second"].weight), moments(fresh, "second.weight")
    resume(tmp_path, fresh, skip=["model.second"])
    assert (bits(fresh["model"]["second"].weight), moments(fresh, "second.weight")) == (before, known)
    assert torch.equal(fresh["model"]["first"].weight, saved["model"]["first"].weight)
    assert moments(fresh, "first.weight") == moments(saved, "first.weight")


def test_what_is_not_strict_loads_what_both_sides_have(tmp_path: Path) -> None:
    saved, fresh = trained(two()), trained(two("first", "other"))
    save(tmp_path, saved | {"gone": {"n": 1}})
    before = bits(fresh["model"]["other"].weight)
    resume(tmp_path, fresh | {"new": {"n": 2}}, strict=False)
    assert torch.equal(fresh["model"]["first"].weight, saved["model"]["first"].weight)
    assert bits(fresh["model"]["other"].weight) == before
    assert moments(fresh, "first.weight") == moments(saved, "first.weight")


def test_a_shape_that_differs_is_refused_also_where_nothing_is_strict(tmp_path: Path) -> None:
    save(tmp_path, trained(two()))
    with pytest.raises(RestoreFailedError, match=r"model\.second\.bias +shape"):
        resume(tmp_path, trained(two(width=3)), strict=False)


@pytest.mark.parametrize(
    ("terms", "reason"),
    [
        ({"skip": ["other.weight"]}, r"skip='other\.weight' is not in the state"),
        ({"skip": ["seen.n"]}, "seen is loaded whole or not at all"),
        ({"rename": {"model": "other"}}, "rename to 'other': not in the state"),
    ],
)
def test_terms_that_make_no_sense_are_refused(tmp_path: Path, terms: dict[str, Any], reason: str) -> None:
    save(tmp_path, {"model": model(0), "seen": {"n": 1}})
    with pytest.raises((ConfigError, RestoreFailedError), match=reason):
        resume(tmp_path, {"model": model(0), "seen": {"n": 1}}, **terms)

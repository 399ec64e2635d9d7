"""A checkpoint that does not fit: told by key, with nothing in memory changed, unless it is skipped by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
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
    with pytest.raises(
        RestoreFailedError, match=r"ema +missing +- +a component; skip=\['ema'\]"
    ):
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

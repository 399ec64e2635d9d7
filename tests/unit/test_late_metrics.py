"""R16: numbers that come after step() and before any save of it are in that save, or whoever gave them hears of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import dcpsvc
from dcpsvc.errors import CheckpointGoneError

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

BOUND_S = 30


class Evaluated:
    """Whoever saves it has somebody record a number of that step meanwhile."""

    ckpt: dcpsvc.Checkpointer | None = None
    promise: Future[None] | None = None

    def state_dict(self) -> dict[str, int]:
        if self.ckpt is not None:
            self.promise = self.ckpt.record_metrics(10, {"eval": 0.5})
        return {"n": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def opened(folder: Path, *, save_last: bool = False, **state: Any) -> dcpsvc.Checkpointer:
    state["model"] = torch.nn.Linear(2, 2)
    return dcpsvc.Checkpointer(folder / "root", state, local=folder / "local", save_last=save_last)


def metrics(folder: Path) -> dict[int, dict[str, float]]:
    return {each.step: dict(each.metrics) for each in dcpsvc.list_checkpoints(folder / "root")}


def test_a_save_of_the_last_step_has_what_was_recorded_before_it_and_its_own_number_counts(tmp_path: Path) -> None:
    with opened(tmp_path) as ckpt:
        ckpt.step(10, metrics={"loss": 1.0})
        promise = ckpt.record_metrics(10, {"eval": 0.5, "seen": 1.0})
        assert not promise.done()
        ckpt.save(10, metrics={"seen": 2.0})
        promise.result(BOUND_S)
    assert metrics(tmp_path) == {10: {"loss": 1.0, "eval": 0.5, "seen": 2.0}}


def test_the_save_at_the_end_has_it(tmp_path: Path) -> None:
    with opened(tmp_path, save_last=True) as ckpt:
        ckpt.step(10, metrics={"loss": 1.0})
        promise = ckpt.record_metrics(10, {"eval": 0.5})
    promise.result(0)
    assert metrics(tmp_path) == {10: {"loss": 1.0, "eval": 0.5}}


@pytest.mark.parametrize("next_step", [True, False], ids=["the next step", "the end"])
def test_without_a_save_of_it_the_promise_is_broken_at(tmp_path: Path, *, next_step: bool) -> None:
    with opened(tmp_path) as ckpt:
        ckpt.step(10)
        promise = ckpt.record_metrics(10, {"eval": 0.5})
        if next_step:
            ckpt.step(11)
            assert promise.done()
    with pytest.raises(CheckpointGoneError, match="step 10"):
        promise.result(0)


def test_what_comes_while_the_step_is_being_saved_is_written_beside_it(tmp_path: Path) -> None:
    evaluated = Evaluated()
    with opened(tmp_path, evaluated=evaluated) as ckpt:
        ckpt.step(10)
        evaluated.ckpt = ckpt
        ckpt.save(10)
        assert evaluated.promise is not None
        evaluated.promise.result(BOUND_S)
    assert metrics(tmp_path) == {10: {"eval": 0.5}}

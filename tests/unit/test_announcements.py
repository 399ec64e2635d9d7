"""What a job says about its schedule at the start, and about itself at the end (R38, R40)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch

import dcpsvc
from dcpsvc import Checkpointer, Every

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    """The lines of INFO and above, all or those that hold some text."""
    caplog.set_level(logging.INFO, "dcpsvc")
    return lambda text="": [record.getMessage() for record in caplog.records if text in record.getMessage()]


def run(tmp_path: Path, steps: int, *, start: int = 0, **options: Any) -> None:
    state = {"model": torch.nn.Linear(512, 512, bias=False), "step": torch.zeros(1)}
    with Checkpointer(tmp_path / "run", state, local=tmp_path / "local", **options) as ckpt:
        assert ckpt.resume() == start
        for step in range(start + 1, start + steps + 1):
            state["step"].fill_(step)
            ckpt.step(step)


def test_the_start_names_destination_interval_size_and_next_save(tmp_path: Path, said: Any) -> None:
    run(tmp_path, 3, every=Every(steps=5))
    (opened,) = said("event=opened")
    assert f"root={tmp_path / 'run'}" in opened
    assert "Every(steps=5" in opened
    assert "size_per_rank=1.0 MiB" in opened
    (resumed,) = said("event=resumed")
    assert "next save at step 5" in resumed


def test_a_resumed_job_counts_from_where_it_is(tmp_path: Path, said: Any) -> None:
    run(tmp_path, 3, every=Every(steps=5))
    run(tmp_path, 3, start=3, every=Every(steps=5))
    assert "next save at step 5" in said("event=resumed")[1]


@pytest.mark.parametrize(
    ("total_steps", "warned"), [(37, True), (499, True), (500, False), (5000, False), (None, False)]
)
def test_a_run_that_is_too_short_to_save_is_told_at_once(
    tmp_path: Path,
    said: Any,
    total_steps: int | None,
    warned: bool,  # noqa: FBT001
) -> None:
    run(tmp_path, 1, every=Every(steps=500), total_steps=total_steps)
    found = said("no save is due before the end")
    assert bool(found) is warned
    assert all("only the last step is saved" in line and f"{total_steps} steps" in line for line in found)


def test_the_summary_says_what_there_is_what_it_cost_and_how_to_go_on(tmp_path: Path, said: Any) -> None:
    run(tmp_path, 7, every=Every(steps=3))
    (closed,) = said("event=closed")
    assert "3 committed, 0 failed, 0 skipped" in closed
    assert "step=7" in closed
    assert "blocked 0." in closed
    assert "resume from step 7" in closed
    assert f"dcpsvc show {tmp_path / 'run'} 7" in closed


class Unreadable:
    """Its state cannot be had once."""

    def __init__(self) -> None:
        self.broken = False

    def state_dict(self) -> dict[str, int]:
        if self.broken:
            raise OSError("the sensor is gone")
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def test_the_summary_has_the_best_with_their_values_and_why_a_save_failed(tmp_path: Path, said: Any) -> None:
    losses = {1: 0.5, 2: 0.2, 3: 0.1, 4: 0.4, 5: 0.9}
    sensor = Unreadable()
    with Checkpointer(
        tmp_path / "run", {"sensor": sensor}, local=tmp_path / "local", keep=dcpsvc.Best(2, "loss", "min")
    ) as ckpt:
        for step, loss in losses.items():
            sensor.broken = step == 3
            try:
                ckpt.save(step, metrics={"loss": loss}).wait()
            except dcpsvc.DcpsvcError:
                assert step == 3
            ckpt.wait()
        ckpt.record_metrics(5, {"loss": 0.3}).result()
    (closed,) = said("event=closed")
    assert "4 committed, 1 failed, 0 skipped" in closed
    assert "; step 2 is best 1 of 2 by loss (0.2); step 5 is best 2 of 2 by loss (0.3); " in closed
    assert "failed: step 3 (attempt" in closed
    assert "the sensor is gone; step 2 is" in closed
    assert "resume from step 5" in closed


def test_the_summary_of_a_run_without_a_scheduled_save_says_so(tmp_path: Path, said: Any) -> None:
    run(tmp_path, 37, every=Every(steps=500))
    (closed,) = said("event=closed")
    assert "no scheduled save was due" in closed
    assert "step 37" in closed
    assert [found.step for found in dcpsvc.list_checkpoints(tmp_path / "run")] == [37]


def test_a_job_that_was_stopped_says_by_whom(tmp_path: Path, said: Any) -> None:
    with Checkpointer(tmp_path / "run", {"x": torch.ones(2)}, local=tmp_path / "local") as ckpt:
        ckpt.request_stop()
        steps = [step for step in range(1, 2000) if not ckpt.step(step).should_stop]
        assert ckpt.exit_code == 75
    assert len(steps) < 1998
    (closed,) = said("event=closed")
    assert "stopped by" in closed
    assert "request_stop()" in closed

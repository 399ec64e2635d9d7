"""R21: NaN, infinity and a slow rise are divergence, one-step spikes are not; the detector survives a resume."""

from __future__ import annotations

import itertools
import math
import random
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcpsvc import Checkpointer, Divergence, list_checkpoints
from dcpsvc.config import Options
from dcpsvc.divergence import Detector
from dcpsvc.errors import ConfigError, NoValidCheckpointError
from dcpsvc.format import numbers
from dcpsvc.stages import discover
from dcpsvc.storage.posix import PosixStore
from tests.unit.turns import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def falls(steps: int, *, noise: float = 0.1, seed: int = 0, to: float = 2.0) -> list[float]:
    """A loss as they are: it falls, and scatters."""
    source = random.Random(seed)
    return [to + 8.0 * math.exp(-step / 50) + source.gauss(0, noise) for step in range(steps)]


def first_alarm(values: Iterable[float], policy: Divergence | None = None) -> int | None:
    """The step, counted from 1, at which the training begins to count as diverged."""
    detector = Detector(policy or Divergence())
    alarms = [step for step, value in enumerate(values, 1) if detector.observe(step, value)]
    return alarms[0] if alarms else None


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.4])
def test_a_loss_that_falls_and_scatters_is_no_divergence(seed: int, noise: float) -> None:
    assert first_alarm(falls(3000, noise=noise, seed=seed)) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [1, 2, 300])
def test_nan_and_infinity_are_divergence_at_once(step: int, value: float) -> None:
    values = falls(400)
    values[step - 1] = value
    assert first_alarm(values) == step


@given(st.lists(st.tuples(st.integers(5, 20), st.floats(3.0, 1e30)), min_size=1, max_size=20))
def test_one_step_spikes_of_any_height_are_no_divergence(spikes: list[tuple[int, float]]) -> None:
    values = falls(500)
    for place, (_, height) in zip(itertools.accumulate(gap for gap, _ in spikes), spikes, strict=True):
        values[20 + place] = height
    assert first_alarm(values) is None


@pytest.mark.parametrize("per_step", [0.02, 0.1, 1.0])
def test_a_slow_rise_is_divergence_within_a_hundred_steps(per_step: float) -> None:
    values = falls(500)
    values[300:] = [value + per_step * (place + 1) for place, value in enumerate(values[300:])]
    alarm = first_alarm(values)
    assert alarm is not None
    assert 300 < alarm < 400


def test_a_jump_that_stays_is_divergence_after_the_patience() -> None:
    values = [*falls(300), *[8.0] * 100]
    alarm = first_alarm(values)
    assert alarm is not None
    assert 300 + 10 < alarm < 300 + 30


def test_a_fall_is_divergence_where_more_is_better_and_a_rise_is_not() -> None:
    accuracy = [*[0.8] * 200, *[0.2] * 100]
    assert first_alarm(accuracy, Divergence(mode="max")) is not None
    assert first_alarm([*[0.2] * 200, *[0.8] * 100], Divergence(mode="max")) is None


@pytest.mark.parametrize("level", [0.0, -5.0])
def test_a_loss_at_or_below_zero_that_scatters_is_no_divergence_and_one_that_rises_is(level: float) -> None:
    source = random.Random(1)
    values = [level + source.gauss(0, 0.05) for _ in range(1000)]
    assert first_alarm(values) is None
    assert first_alarm([*values, *[level + 0.1 * step for step in range(100)]]) is not None


def test_the_step_before_the_first_bad_value_is_named_because_its_weights_gave_it() -> None:
    detector = Detector(Divergence())
    for step in (10, 20, 30):
        detector.observe(step, 1.0)
    assert detector.observe(40, math.nan)
    assert (detector.since, detector.why) == (30, "loss is nan")
    assert not detector.observe(50, math.nan), "it is told once"
    assert detector.since == 30
    assert not detector.observe(60, 1.0)
    assert (detector.since, detector.why) == (None, "")


def test_a_step_that_is_told_twice_counts_once() -> None:
    one, other = Detector(Divergence()), Detector(Divergence())
    for step, value in enumerate(falls(50), 1):
        one.observe(step, value)
        other.observe(step, value)
        other.observe(step, 1e9)
    assert one == other


@given(st.integers(0, 60), st.lists(st.floats(0.1, 100) | st.just(math.nan), min_size=60, max_size=60))
def test_a_detector_that_was_resumed_goes_on_as_if_nothing_had_happened(cut: int, values: list[float]) -> None:
    policy = Divergence(fast=2, slow=5, patience=2)
    whole, resumed = Detector(policy), Detector(policy)
    alarms: list[tuple[int, bool]] = []
    for step, value in enumerate(values, 1):
        if step == cut + 1:
            travelled = {n: float(v) for n, v in numbers.dump(whole.state()).items()}
            resumed.restore(travelled | {"loss": 3.0})
            resumed.why = whole.why  # of a bad end nothing is remembered: it would be told anew
        alarm = whole.observe(step, value)
        if step > cut:
            alarms.append((step, alarm == resumed.observe(step, value)))
            assert resumed == whole
    assert all(same for _, same in alarms)


def test_values_of_any_size_and_damaged_numbers_never_make_it_blind() -> None:
    detector = Detector(Divergence())
    for step, value in enumerate([1.7e308, -1.7e308] * 50, 1):
        detector.observe(step, value)
    assert all(math.isfinite(value) for value in detector.state().values())
    spoiled = dict.fromkeys(detector.state(), math.inf) | {"dcpsvc.divergence.loss.step": math.nan}
    detector.restore(spoiled)
    assert detector == Detector(Divergence())
    assert detector.observe(1, math.nan)


def test_what_another_metric_has_left_is_not_taken_for_ones_own() -> None:
    detector = Detector(Divergence(metric="loss"))
    detector.observe(1, 5.0)
    other = Detector(Divergence(metric="eval"))
    other.restore(detector.state())
    assert other == Detector(Divergence(metric="eval"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": ""}, "must be named"),
        ({"mode": "up"}, "mode must be 'min' or 'max'"),
        ({"rise": 0}, "rise must be a number above 0"),
        ({"fast": 0}, "fast must be an int of at least 1"),
        ({"patience": 1.5}, "patience must be an int of at least 1"),
        ({"fast": 100, "slow": 100}, "fast must be below slow"),
    ],
)
def test_a_detector_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Divergence(**options)


def test_the_option_must_be_a_divergence() -> None:
    with pytest.raises(ConfigError, match=r"divergence=True must be a Divergence\(\.\.\.\), or None"):
        Options(divergence=True)  # type: ignore[arg-type]


# --- in a job -------------------------------------------------------------------------------------


def checkpointer(folder: Path, state: dict[str, Any], **options: Any) -> Checkpointer:
    return Checkpointer(folder / "root", state, local=folder / "local", save_last=False, **options)


def train(ckpt: Checkpointer, losses: dict[int, Any], every: int = 1) -> None:
    for step, loss in losses.items():
        ckpt.step(step, metrics={"loss": loss})
        if step % every == 0:
            ckpt.save(step, metrics={"loss": loss})
        ckpt.wait(PATIENCE_S)


def test_what_is_saved_while_diverged_is_tagged_and_so_is_the_step_before_and_resume_takes_neither(tmp_path) -> None:
    with checkpointer(tmp_path, {"n": [0]}, divergence=Divergence()) as ckpt:
        train(ckpt, {1: 2.0, 2: 1.9, 3: 1.8, 4: math.nan})
        ckpt.record_metrics(1, {"eval": 0.5}).result(PATIENCE_S)  # so that what was asked before is written
    listed = list_checkpoints(tmp_path / "root")
    assert [(c.step, c.diverged) for c in listed] == [(1, False), (2, False), (3, True), (4, True)]
    assert {name for c in listed for name in c.metrics} == {"loss", "eval", "diverged"}, "its own numbers are not shown"
    with checkpointer(tmp_path, {"n": [0]}) as ckpt:
        assert ckpt.resume() == 2
    with checkpointer(tmp_path, {"n": [0]}) as ckpt:
        assert ckpt.resume(even_diverged=True) == 4
    with checkpointer(tmp_path, {"n": [0]}) as ckpt:
        assert ckpt.resume(4) == 4


def test_steps_behind_which_resume_fell_back_can_be_saved_again(tmp_path) -> None:
    with checkpointer(tmp_path, {"n": [0]}, divergence=Divergence()) as ckpt:
        train(ckpt, {1: 2.0, 2: 1.9, 3: math.nan})
    with checkpointer(tmp_path, {"n": [0]}, divergence=Divergence()) as ckpt:
        assert ckpt.resume() == 1
        train(ckpt, {2: 1.8, 3: 1.7})
    with checkpointer(tmp_path, {"n": [0]}) as ckpt:
        assert ckpt.resume() == 3
    newest = list_checkpoints(tmp_path / "root")[-1]
    assert (newest.step, newest.diverged, newest.metrics["loss"]) == (3, False, 1.7)


def test_where_everything_is_tagged_resume_says_so_and_never_starts_afresh(tmp_path) -> None:
    with checkpointer(tmp_path, {"n": [0]}, divergence=Divergence()) as ckpt:
        train(ckpt, {1: math.nan})
    with (
        checkpointer(tmp_path, {"n": [0]}) as ckpt,
        pytest.raises(NoValidCheckpointError, match="step 1: tagged as diverged"),
    ):
        ckpt.resume()


def test_the_detector_of_a_resumed_job_knows_what_the_one_before_knew(tmp_path) -> None:
    slow = Divergence(patience=5, fast=2, slow=100)
    with checkpointer(tmp_path, {"n": [0]}, divergence=slow) as ckpt:
        train(ckpt, dict.fromkeys(range(1, 30), 1.0) | {30: 9.0, 31: 9.0, 32: 9.0, 33: 9.0}, every=33)
    with checkpointer(tmp_path, {"n": [0]}, divergence=slow) as ckpt:
        assert ckpt.resume() == 33
        train(ckpt, {34: 9.0, 35: 9.0, 36: 9.0, 37: 9.0}, every=37)
    assert list_checkpoints(tmp_path / "root")[-1].diverged, "without its past, 9.0 would be normal"


def paced(steps: Iterable[int]) -> Iterable[int]:
    """Steps that take their time, so that the watcher can have its say."""
    for step in steps:
        time.sleep(0.01)
        yield step


def test_a_training_that_diverges_is_stopped_if_asked_and_goes_on_if_not(tmp_path) -> None:
    for folder, stop in ((tmp_path / "a", True), (tmp_path / "b", False)):
        with checkpointer(folder, {"n": [0]}, divergence=Divergence(stop=stop)) as ckpt:
            ckpt.step(1, metrics={"loss": 1.0})
            outcomes = (ckpt.step(step, metrics={"loss": math.nan}) for step in paced(range(2, 400 if stop else 40)))
            assert any(outcome.should_stop for outcome in outcomes) is stop
        assert [c.diverged for c in list_checkpoints(folder / "root")] == ([True] if stop else [])


def test_a_metric_that_is_no_number_costs_nothing_and_is_told_once(tmp_path, caplog) -> None:
    with checkpointer(tmp_path, {"n": [0]}, divergence=Divergence()) as ckpt:
        for step in range(1, 4):
            ckpt.step(step, metrics={"loss": "high"})
        ckpt.step(4)
    assert sum("divergence is not noticed" in record.getMessage() for record in caplog.records) == 1


def test_the_detectors_numbers_travel_in_the_manifest(tmp_path) -> None:
    with checkpointer(tmp_path, {"n": [0]}, divergence=Divergence()) as ckpt:
        train(ckpt, {1: 2.0})
    store = PosixStore(tmp_path / "root")
    (attempt,) = discover.committed(store)
    assert discover.read_manifest(store, attempt).metrics["dcpsvc.divergence.loss.fast"] == 2.0

"""Options: what makes no sense is refused when it is written down, with the option's name."""

from __future__ import annotations

import math
import re
from dataclasses import FrozenInstanceError
from typing import TYPE_CHECKING, Any

import pytest

from dcpsvc import Checkpointer, load
from dcpsvc.config import LOCAL_VARIABLE, Options
from dcpsvc.errors import ConfigError
from dcpsvc.policies import Every, Everything, Latest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", ["sync_timeout_s", "upload_timeout_s"])
@pytest.mark.parametrize("value", [0, -1, 0.0, math.nan, True, -math.inf])
def test_a_timeout_that_is_no_positive_number_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{name}={value} must be a number of seconds above 0$"):
        Options(**{name: value})


@pytest.mark.parametrize("value", [0, -1, True])
def test_a_failure_budget_below_one_is_refused(value: int) -> None:
    with pytest.raises(ConfigError, match=f"^max_consecutive_failures={value} must be an int of at least 1$"):
        Options(max_consecutive_failures=value)


@pytest.mark.parametrize("value", ["", "stop", None, "RAISE"])
def test_an_unknown_way_to_fail_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^on_failure={value!r} must be 'continue' or 'raise'$"):
        Options(on_failure=value)


@pytest.mark.parametrize("value", [1, 0, "True", "never", 2.5])
def test_reading_together_is_yes_no_or_left_open_and_anything_else_is_refused(tmp_path: Path, value: Any) -> None:
    refused = f"^read_together={value!r} must be True, False or None$"
    with pytest.raises(ConfigError, match=refused):
        Options(read_together=value)
    with pytest.raises(ConfigError, match=refused):
        load(tmp_path, {"x": 1}, read_together=value)
    assert [Options(read_together=each).read_together for each in (True, False, None)] == [True, False, None]
    assert Options().read_together is None


@pytest.mark.parametrize("value", [500, "500", Latest(3), Every])
def test_a_schedule_must_be_an_every(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^every=.* must be an Every\(\.\.\.\), or None$"):
        Options(every=value)


@pytest.mark.parametrize("value", [3, None, "all", Every(steps=5), Latest])
def test_retention_must_be_a_policy(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^keep=.* must be a policy such as Latest\(3\)$"):
        Options(keep=value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evry": Every(steps=5)}, "evry"),
        ({"max_consecutive_failures": 0}, "max_consecutive_failures=0"),
        ({"sync_timeout_s": -1}, "sync_timeout_s=-1"),
    ],
)
def test_a_checkpointer_refuses_an_option_before_it_touches_the_run_root(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Checkpointer(tmp_path / "root", {"x": 1}, local=tmp_path / "local", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "the state is empty"), ({"a.b": 1}, "state name 'a.b'"), ({"": 1}, "state name ''"),
        ({1: 1}, "state name 1"),
        ({"rng@0": 1}, "state name 'rng@0'"), ({"../x": 1}, "state name '../x'"), ({"a\n": 1}, "state name"),
    ],
)  # fmt: skip
def test_a_state_whose_names_make_no_sense_is_refused(tmp_path: Path, state: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Checkpointer(tmp_path / "root", state, local=tmp_path / "local")


def test_options_are_all_there_without_being_given() -> None:
    options = Options()
    assert isinstance(options.keep, Everything), "nothing is deleted unasked"
    assert options.every is None
    assert options.failure_budget == options.max_consecutive_failures == 3


def test_raising_on_failure_is_a_budget_of_one() -> None:
    assert Options(on_failure="raise", max_consecutive_failures=9).failure_budget == 1
    assert Options(max_consecutive_failures=9).failure_budget == 9


def test_options_never_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Options().sync_timeout_s = 1.0


def test_the_local_tier_is_where_the_option_says_then_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(LOCAL_VARIABLE, str(tmp_path / "environment"))
    assert Options(local=tmp_path / "option").local_dir == tmp_path / "option"
    assert Options().local_dir == tmp_path / "environment"
    monkeypatch.delenv(LOCAL_VARIABLE)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert Options().local_dir.parent == tmp_path


def test_a_relative_local_tier_stays_where_it_was_when_the_job_changes_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Options(local="nvme").local_dir == tmp_path / "nvme"


def test_two_schedules_join() -> None:
    assert Options(every=Every(steps=500, seconds=60)).every == Every(steps=500, seconds=60)


def test_the_local_variable_is_the_documented_one() -> None:
    assert LOCAL_VARIABLE == "DCPSVC_LOCAL"


@pytest.mark.parametrize(
    ("ranks", "asked", "allowed"),
    [
        (1, None, (8, None)), (2, None, (8, None)), (4, None, (8, None)), (8, None, (8, 32)), (64, None, (8, 32)),
        (1, 64, (64, None)), (8, 64, (8, None)), (8, 16, (8, 16)), (8, 128, (16, None)), (2, 1, (1, 1)),
        (1, 1, (1, None)),
    ],
)  # fmt: skip
def test_the_ranks_of_a_node_share_what_it_may_transfer_at_once_and_one_never_takes_much_more_than_its_share(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, ranks: int, asked: int | None, allowed: tuple[int, int | None]
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    limits = Options(local=tmp_path, transfer_concurrency=asked).limits
    assert (limits.concurrency, limits.node_concurrency) == allowed
    assert limits.node_folder == (tmp_path / "turns" if allowed[1] else None)


def test_the_ranks_of_a_node_divide_the_bytes_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Options(transfer_nbytes_per_s=1e9).limits.nbytes_per_s == 1e9
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Options(transfer_nbytes_per_s=1e9).limits.nbytes_per_s == 2.5e8


@pytest.mark.parametrize("ranks", ["1", "64"])
def test_how_long_a_request_is_tried_again_is_an_option(monkeypatch: pytest.MonkeyPatch, ranks: str) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert (Options().limits.patience_s, Options(retry_s=600.0).limits.patience_s) == (60.0, 600.0)


@pytest.mark.parametrize("options", [{"transfer_concurrency": 0}, {"transfer_nbytes_per_s": 0.0}, {"retry_s": 0.0}])
def test_a_limit_on_transfers_that_allows_none_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(options))}=0"):
        Options(**options)


@pytest.mark.parametrize(
    ("name", "hint"), [("keep_locals", "did you mean keep_local?"), ("zzz", "there are local, every, keep, ")]
)
def test_an_option_that_does_not_exist_is_named_with_what_was_meant(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"Checkpointer has no option '{name}': {hint}")):
        Options.of({name: 1})

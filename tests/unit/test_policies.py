"""When to save and what to keep: pure values that can be reasoned about."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcpsvc.errors import ConfigError
from dcpsvc.policies import AnyOf, Every, Everything, Keep, Latest, decide


@dataclass(frozen=True)
class Commit:
    step: int
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[int, str]:
        return (self.step, "cafe-0")


def commits(*steps: int) -> list[Commit]:
    return [Commit(step) for step in steps]


def kept(rule: Keep, *steps: int, protected: dict[Any, str] | None = None) -> list[int]:
    found = commits(*steps)
    decision = decide(rule, found, protected=protected or {})
    return [commit.step for commit in found if commit.key in decision.keep]


class Nothing(Keep):
    """A rule that would let everything go."""

    def reasons(self, commits):
        return {}


histories = st.lists(st.integers(0, 1000), unique=True, max_size=20).map(lambda steps: commits(*sorted(steps)))
rules = st.recursive(
    st.builds(Latest, st.integers(1, 8)) | st.builds(Everything) | st.builds(Nothing),
    lambda inner: st.builds(lambda a, b: a | b, inner, inner),
    max_leaves=4,
)


@given(rules, histories, st.sets(st.integers(0, 1000)))
def test_everything_is_either_kept_or_removed_in_order(rule: Keep, found: list[Commit], used: set[int]) -> None:
    decision = decide(rule, found, protected={(step, "cafe-0"): "in use" for step in used})
    assert [c.key for c in found if c.key not in decision.keep] == list(decision.remove)
    assert decision.keep.keys() | set(decision.remove) == {commit.key for commit in found}
    assert all(decision.keep.values()), "everything kept has its reason"


@given(rules, histories.filter(bool))
def test_the_newest_commit_is_never_removed(rule: Keep, found: list[Commit]) -> None:
    assert found[-1].key in decide(rule, found, protected={}).keep


@given(rules, histories, st.data())
def test_a_checkpoint_in_use_is_never_removed(rule: Keep, found: list[Commit], data: st.DataObject) -> None:
    used = data.draw(st.lists(st.sampled_from(found))) if found else []
    decision = decide(rule, found, protected={commit.key: "resumed from" for commit in used})
    assert not {commit.key for commit in used} & set(decision.remove)


@given(st.integers(1, 30), histories)
def test_latest_keeps_exactly_the_newest(n: int, found: list[Commit]) -> None:
    decision = decide(Latest(n), found, protected={})
    assert [commit.key for commit in found if commit.key in decision.keep] == [commit.key for commit in found[-n:]]


@given(rules, rules, histories)
def test_joined_rules_keep_what_either_keeps(one: Keep, other: Keep, found: list[Commit]) -> None:
    def keep(rule: Keep) -> set[Any]:
        return set(decide(rule, found, protected={}).keep)

    assert keep(one | other) == keep(one) | keep(other) == keep(other | one)


@given(histories)
def test_by_default_nothing_is_removed(found: list[Commit]) -> None:
    assert decide(Everything(), found, protected={}).remove == ()


def test_a_decision_says_why() -> None:
    decision = decide(Latest(2), commits(10, 20, 30, 40), protected={(10, "cafe-0"): "resumed from", (5, "x"): "gone"})
    assert decision.keep == {
        (40, "cafe-0"): "latest 1 of 2",
        (30, "cafe-0"): "latest 2 of 2",
        (10, "cafe-0"): "resumed from",
    }
    assert decision.remove == ((20, "cafe-0"),)


def test_a_checkpoint_that_two_rules_keep_has_both_reasons() -> None:
    decision = decide(Latest(1) | Everything(), commits(10, 20), protected={})
    assert decision.keep[20, "cafe-0"] == "latest 1 of 1, everything is kept"


def test_a_rule_that_keeps_nothing_still_leaves_the_newest() -> None:
    assert kept(Nothing(), 10, 20, 30) == [30]
    assert decide(Nothing(), commits(10), protected={}).keep == {(10, "cafe-0"): "newest commit"}


def test_what_is_in_use_does_not_count_for_latest() -> None:
    assert kept(Latest(2), 10, 20, 30, 40, protected={(10, "cafe-0"): "in use"}) == [10, 30, 40]


def test_nothing_is_decided_about_an_empty_run() -> None:
    assert decide(Latest(3), [], protected={(1, "x"): "in use"}).keep == {}


def test_rules_are_values_that_read_as_sentences() -> None:
    assert Latest(3) | Everything() == AnyOf((Latest(3), Everything()))
    assert repr(Latest(3)) == "Latest(n=3)"
    assert repr(Every(steps=500)) == "Every(steps=500, seconds=None)"
    assert hash(Latest(3) | Latest(1)) == hash(Latest(3) | Latest(1))


@pytest.mark.parametrize("n", [0, -1, True, False])
def test_keeping_less_than_one_checkpoint_is_refused(n: int) -> None:
    with pytest.raises(ConfigError, match=rf"Latest\({n}\): at least 1"):
        Latest(n)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"Every\(\) needs steps= or seconds="),
        ({"steps": 0}, r"Every\(steps=0\): steps must be an int of at least 1"),
        ({"steps": -5}, "steps must be an int of at least 1"),
        ({"steps": True}, "steps must be an int of at least 1"),
        ({"seconds": 0}, r"Every\(seconds=0\): seconds must be a number above 0"),
        ({"seconds": -1.0}, "seconds must be a number above 0"),
        ({"seconds": math.nan}, "seconds must be a number above 0"),
        ({"steps": 0, "seconds": 60}, "steps must be an int of at least 1"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Every(**options)


@given(st.integers(1, 50), st.integers(0, 1000))
def test_a_schedule_by_steps_is_due_at_its_multiples(every: int, step: int) -> None:
    assert Every(steps=every).due(step) == (step in range(0, step + 1, every))


def test_a_schedule_by_time_is_never_due_by_the_step_alone() -> None:
    assert not any(Every(seconds=0.001).due(step) for step in range(100))

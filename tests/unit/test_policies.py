"""When to save and what to keep: pure values that can be reasoned about."""

from __future__ import annotations

import contextlib
import math
import string
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcpsvc.commits import Commit
from dcpsvc.config import Options
from dcpsvc.decision import Decision, decide
from dcpsvc.errors import ConfigError, FormatError
from dcpsvc.format import policy
from dcpsvc.format.keys import Epoch
from dcpsvc.policies import (
    AnyOf,
    Best,
    Every,
    EveryHours,
    EveryNSteps,
    Everything,
    Keep,
    Latest,
    Pinned,
)

BEGIN = datetime(2026, 1, 31, 23, tzinfo=UTC)


def commit(step: int, *, at_h: float | None = None, pins: tuple[str, ...] = (), **metrics: float) -> Commit:
    created = BEGIN + timedelta(hours=step if at_h is None else at_h)
    return Commit(step=step, key=(step, "cafe-0"), created=created, metrics=metrics, pins=pins)


def commits(*steps: int) -> list[Commit]:
    return [commit(step) for step in steps]


def kept(rule: Keep, *steps: int, protected: dict[Any, str] | None = None) -> list[int]:
    return left(rule, commits(*steps), protected)


def left(rule: Keep, found: list[Commit], protected: dict[Any, str] | None = None) -> list[int]:
    """Steps that stay."""
    decision = decide(rule, found, protected=protected or {})
    return [commit.step for commit in found if commit.key in decision.keep]


def chosen(rule: Keep, found: list[Commit]) -> list[int]:
    """Steps that the rule itself asks for."""
    return [commit.step for commit in found if commit.key in rule.reasons(found)]


class Nothing(Keep):
    """A rule that would let everything go."""

    def reasons(self, commits):
        return {}


values = st.sampled_from([0.0, -0.0, -1.5, 2.0, 2.0, 1e300]) | st.floats(allow_nan=True, allow_infinity=True)


@st.composite
def histories(draw: st.DrawFn) -> list[Commit]:
    """Commits with and without metrics, some of them pinned or diverged, saved at any hour."""
    found: list[Commit] = []
    for step in sorted(draw(st.sets(st.integers(0, 300), max_size=20))):
        metrics = draw(st.dictionaries(st.sampled_from(["loss", "acc", "diverged"]), values, max_size=3))
        pins = draw(st.sampled_from([(), (), (), ("pinned",), ("pinned: figure 3", "pinned")]))
        found.append(commit(step, at_h=draw(st.floats(-100, 100)), pins=pins, **metrics))
    return found


rules = st.recursive(
    st.builds(Latest, st.integers(1, 8))
    | st.builds(Everything)
    | st.builds(Nothing)
    | st.builds(Best, st.integers(1, 5), st.sampled_from(["loss", "acc"]), st.sampled_from(["min", "max"]))
    | st.builds(EveryNSteps, st.integers(1, 100))
    | st.builds(EveryHours, st.floats(0.1, 48))
    | st.builds(Pinned),
    lambda inner: st.builds(lambda a, b: a | b, inner, inner),
    max_leaves=5,
)


@given(rules, histories(), st.sets(st.integers(0, 1000)))
def test_everything_is_either_kept_or_removed_in_order(rule: Keep, found: list[Commit], used: set[int]) -> None:
    decision = decide(rule, found, protected={(step, "cafe-0"): "in use" for step in used})
    assert [c.key for c in found if c.key not in decision.keep] == list(decision.remove)
    assert decision.keep.keys() | set(decision.remove) == {commit.key for commit in found}
    assert all(decision.keep.values()), "everything kept has its reason"
    assert all(decision.remove.values()), "everything removed has its reason"


@given(rules, histories().filter(bool))
def test_the_newest_commit_is_never_removed(rule: Keep, found: list[Commit]) -> None:
    assert found[-1].key in decide(rule, found, protected={}).keep


@given(rules, histories(), st.data())
def test_a_checkpoint_in_use_is_never_removed(rule: Keep, found: list[Commit], data: st.DataObject) -> None:
    used = data.draw(st.lists(st.sampled_from(found))) if found else []
    decision = decide(rule, found, protected={commit.key: "resumed from" for commit in used})
    assert not {commit.key for commit in used} & set(decision.remove)


@given(st.integers(1, 30), histories())
def test_latest_keeps_exactly_the_newest(n: int, found: list[Commit]) -> None:
    sound = [commit.step for commit in found if not commit.metrics.get("diverged")]
    assert chosen(Latest(n), found) == sound[-n:]


@given(rules, rules, histories())
def test_joined_rules_keep_what_either_keeps(one: Keep, other: Keep, found: list[Commit]) -> None:
    def keep(rule: Keep) -> set[Any]:
        return set(decide(rule, found, protected={}).keep)

    assert keep(one | other) == keep(one) | keep(other) == keep(other | one)


@given(histories())
def test_by_default_nothing_is_removed(found: list[Commit]) -> None:
    assert decide(Everything(), found, protected={}).remove == {}


def test_a_decision_says_why() -> None:
    decision = decide(Latest(2), commits(10, 20, 30, 40), protected={(10, "cafe-0"): "resumed from", (5, "x"): "gone"})
    assert decision.keep == {
        (40, "cafe-0"): "latest 1 of 2",
        (30, "cafe-0"): "latest 2 of 2",
        (10, "cafe-0"): "resumed from",
    }
    assert decision.remove == {(20, "cafe-0"): "not among the latest 2"}


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


# --- the best -------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.sampled_from(["min", "max"]), histories())
def test_the_best_are_exactly_those_that_sorting_all_values_puts_first(k: int, mode: str, found: list[Commit]) -> None:
    able = [c for c in found if not c.metrics.get("diverged") and math.isfinite(c.metrics.get("loss", math.nan))]
    sign = 1 if mode == "min" else -1
    best = sorted(able, key=lambda c: sign * c.metrics["loss"])  # stable: of equal ones the older
    assert chosen(Best(k, "loss", mode), found) == sorted(c.step for c in best[:k])


@given(st.integers(1, 5), st.integers(1, 5), histories())
def test_no_more_is_kept_than_the_rules_and_those_in_use_add_up_to(n: int, k: int, found: list[Commit]) -> None:
    rule = Latest(n) | Best(k, "loss", "min") | Pinned()
    pinned = sum(bool(c.pins) for c in found)
    assert len(left(rule, found, {(5, "cafe-0"): "resumed from"})) <= n + k + pinned + 1 + 2  # newest, newest sound


@pytest.mark.parametrize(
    ("mode", "losses", "best"),
    [
        ("min", [3.0, 2.0, 2.5, 2.4], [2, 4]),
        ("max", [3.0, 2.0, 2.5, 2.4], [1, 3]),
        ("min", [0.0, 1.0, 2.0], [1, 2]),
        ("max", [-3.0, -1.0, -2.0], [2, 3]),
        ("min", [-3.0, -1.0, -2.0], [1, 3]),
        ("min", [math.nan, 5.0, math.nan, 4.0, 3.0], [4, 5]),
        ("max", [math.nan, 5.0, math.inf, 4.0], [2, 4]),
        ("min", [-math.inf, 5.0, 6.0], [2, 3]),
        ("min", [1.0, 1.0, 1.0], [1, 2]),
        ("max", [0.0, -0.0, 0.0], [1, 2]),
        ("min", [math.nan, math.nan], []),
        ("min", [2.0], [1]),
    ],
)
def test_the_best_two_in_histories_that_others_get_wrong(mode: str, losses: list[float], best: list[int]) -> None:
    found = [commit(step, loss=loss) for step, loss in enumerate(losses, 1)]
    assert chosen(Best(2, "loss", mode), found) == best


def test_a_metric_that_comes_late_protects_its_checkpoint_from_then_on() -> None:
    rule = Latest(2) | Best(1, "eval", "max")
    found = [commit(10, eval=0.5), commit(20), commit(30)]
    assert left(rule, found) == [10, 20, 30]
    found[1] = commit(20, eval=0.9)
    assert left(rule, [*found, commit(40)]) == [20, 30, 40]


def test_the_best_list_changes_only_when_a_better_one_is_committed() -> None:
    rule = Best(2, "loss", "min")
    found = [commit(step, loss=loss) for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5))]
    assert chosen(rule, found) == chosen(rule, [*found, commit(4)]) == chosen(rule, [*found, commit(4, loss=2.5)])


def test_a_missing_metric_is_remarked_on_by_rule_and_the_newest_commit_may_still_get_its_own() -> None:
    rule = Latest(1) | Best(1, "eval_los", "min")
    assert rule.remarks([commit(1, loss=1.0)]) == {}
    (text,) = rule.remarks([commit(1, loss=1.0), commit(2, loss=1.0)]).values()
    assert "no checkpoint has 'eval_los'" in text
    assert "they have loss" in text
    (text,) = Best(1, "acc", "max").remarks([commit(1, acc=1.0), commit(2), commit(3)]).values()
    assert "step 2 has no 'acc'" in text


# --- by step, by time, by hand --------------------------------------------------------------------


@given(st.integers(1, 100), histories())
def test_multiples_are_kept_for_ever(n: int, found: list[Commit]) -> None:
    sound = [c.step for c in found if not c.metrics.get("diverged")]
    assert chosen(EveryNSteps(n), found) == [step for step in sound if step in range(0, 301, n)]


@given(st.floats(0.1, 48), histories())
def test_what_a_rule_by_time_keeps_does_not_depend_on_what_is_deleted(h: float, found: list[Commit]) -> None:
    stays = set(chosen(EveryHours(h), found))
    assert chosen(EveryHours(h), [c for c in found if c.step in stays]) == sorted(stays)
    assert stays.issubset(chosen(EveryHours(h), [*found, commit(1000, at_h=200)]))


def test_of_each_window_of_time_the_first_is_kept() -> None:
    found = [commit(step, at_h=at_h) for step, at_h in enumerate([0.0, 0.5, 0.9, 1.1, 1.5, 3.2, 3.3, 2.9], 1)]
    assert chosen(EveryHours(1), found) == [1, 4, 6, 8]


def test_one_of_which_nothing_tells_when_it_was_made_is_not_kept_by_time() -> None:
    assert EveryHours(1).reasons([Commit(step=1, key="x")]) == {}


def test_what_is_pinned_stays_under_every_policy_with_its_note() -> None:
    found = [commit(10, pins=("pinned: figure 3",)), commit(20), commit(30)]
    assert decide(Latest(1), found, protected={}).keep[10, "cafe-0"] == "pinned: figure 3"
    assert decide(Latest(1) | Pinned(), found, protected={}).keep[10, "cafe-0"] == "pinned: figure 3"


@given(rules, histories())
def test_pinned_ones_are_never_removed(rule: Keep, found: list[Commit]) -> None:
    assert {c.step for c in found if c.pins} <= set(left(rule, found))


# --- diverged, and shared files -------------------------------------------------------------------


def test_a_diverged_checkpoint_neither_counts_nor_stays_once_a_newer_one_is_there() -> None:
    rule = Latest(2) | Best(1, "loss", "min")
    found = [commit(10, loss=3.0), commit(20, loss=2.0), commit(30, loss=0.1, diverged=1.0)]
    assert left(rule, found) == [10, 20, 30]  # 30 is the newest commit
    decision = decide(rule, [*found, commit(40, loss=math.nan, diverged=1.0)], protected={})
    assert decision.remove == {(30, "cafe-0"): "diverged"}


@given(rules, histories())
def test_the_newest_that_did_not_diverge_is_never_removed(rule: Keep, found: list[Commit]) -> None:
    sound = [c.step for c in found if not c.metrics.get("diverged")]
    assert set(sound[-1:]) <= set(left(rule, found))


def test_a_checkpoint_whose_files_another_one_uses_stays_and_so_on() -> None:
    first, second, third = (commit(step) for step in (1, 2, 3))
    found = [
        first,
        Commit(step=2, key=second.key, needs=frozenset({first.key})),
        Commit(step=3, key=third.key, needs=frozenset({second.key, "gone"})),
    ]
    decision = decide(Latest(1), found, protected={})
    assert decision == Decision(
        {third.key: "latest 1 of 1", second.key: "step 3 uses its files", first.key: "step 2 uses its files"}, {}
    )


def test_a_step_that_was_committed_again_takes_one_place_and_its_attempts_stay_and_go_together() -> None:
    one, two, three = (commit(step, loss=loss) for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)))
    edited = Commit(step=2, key=(2, "2-edit"), created=two.created, metrics=two.metrics)
    decision = decide(Latest(2) | Best(1, "loss", "min"), [one, two, edited, three], protected={})
    assert decision.keep[two.key] == "another attempt of step 2 stays"
    assert decision.keep[edited.key] == "latest 2 of 2, best 1 of 1 by loss (1)"
    assert decision.remove == {one.key: "not among the latest 2, not among the best 1 by loss"}
    assert list(decide(Latest(1), [one, two, edited, three], protected={}).keep) == [three.key]
    for held in (two.key, edited.key):
        assert decide(Latest(1), [one, two, edited, three], protected={held: "resumed"}).remove.keys() == {one.key}
    pinned = Commit(step=2, key=two.key, created=two.created, pins=("pinned",))
    decision = decide(Latest(1), [one, pinned, edited, three], protected={})
    assert decision.keep == {
        three.key: "latest 1 of 1", two.key: "pinned", edited.key: "another attempt of step 2 stays"
    }  # fmt: skip
    user = Commit(step=3, key=three.key, needs=frozenset({two.key}))
    assert decide(Latest(1), [two, edited, user], protected={}).remove == {}


# --- what makes no sense --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Best(2, "loss"), r"Best\(2, 'loss', mode=''\): mode must be 'min' or 'max'"),
        (lambda: Best(2, "loss", mode="lowest"), "mode must be 'min' or 'max'"),
        (lambda: Best(0, "loss", "min"), "at least 1"),
        (lambda: Best(1, "", "min"), "must be named"),
        (lambda: EveryNSteps(0), "at least 1"),
        (lambda: EveryHours(0), "above 0"),
        (lambda: EveryHours(math.nan), "above 0"),
        (lambda: EveryHours("2"), "above 0"),
        (lambda: AnyOf(()), "keeps nothing"),
        (lambda: Options(keep=Pinned()), r"keep=Pinned\(\): it keeps nothing until something is pinned"),
        (lambda: Options(keep=Pinned() | Pinned()), "keeps nothing"),
        (lambda: Options(deletes_per_s=0), "deletes_per_s=0 must be a number above 0"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_when_it_is_written_down(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# --- as a file ------------------------------------------------------------------------------------

OURS = Epoch(3, "cafecafe")
OWN = Latest(3) | Best(2, "eval", mode="max") | EveryNSteps(1000) | EveryHours(1.5) | Pinned()


def test_a_policy_reads_back_as_it_was_recorded() -> None:
    assert policy.loads(OURS.policy, policy.dumps(OURS, OWN)) == (str(OWN), OWN)
    assert str(OWN) == "Latest(3) | Best(2, 'eval', mode='max') | EveryNSteps(1000) | EveryHours(1.5) | Pinned()"
    assert policy.loads(OURS.policy, policy.dumps(OURS, Everything()))[1] == AnyOf((Everything(),))


def test_a_rule_of_the_users_own_is_told_by_name_and_not_read_back() -> None:
    text, rule = policy.loads(OURS.policy, policy.dumps(OURS, Nothing() | Latest(1)))
    assert rule is None
    assert "Nothing" in text


@given(st.data())
def test_a_damaged_policy_is_never_taken_for_one(data: st.DataObject) -> None:
    whole = policy.dumps(OURS, OWN)
    place = data.draw(st.integers(0, len(whole) - 2))
    letter = data.draw(st.sampled_from(string.printable).filter(lambda one: ord(one) != whole[place]))
    with contextlib.suppress(FormatError):  # only a change that means nothing, such as of a space, may be taken
        assert policy.loads(OURS.policy, whole[:place] + letter.encode() + whole[place + 1 :]) == (str(OWN), OWN)


def test_a_policy_of_another_epoch_or_with_a_rule_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(FormatError, match="another epoch"):
        policy.loads(Epoch(4, "cafecafe").policy, policy.dumps(OURS, OWN))
    object.__setattr__(wrong := Latest(1), "n", 0)
    with pytest.raises(FormatError, match="makes no sense"):
        policy.loads(OURS.policy, policy.dumps(OURS, wrong))


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

"""Meetings: one decision for all, a deadline for everything, and whoever is missing is named. A thread is a rank."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dcpsvc.errors import RankFailure
from dcpsvc.ranks.c10d import SoloStore
from dcpsvc.ranks.rendezvous import Meeting, RefusalError, Rendezvous
from tests.unit.meetings import MEETING, TIMEOUT_S, Clock, Ranks, assert_all_heard

FAILURE = RankFailure(2, "stage", "MemoryError", "no room")


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_all_ranks_get_the_one_decision_made_on_all_messages_in_rank_order(world_size: int) -> None:
    heard = Ranks(world_size).meet({rank: {"step": rank} for rank in range(world_size)})
    assert heard == {key: [{"step": rank} for rank in range(world_size)] for key in range(world_size)}


def test_only_the_coordinator_decides() -> None:
    decided: list[str] = []
    Ranks(4).meet(dict.fromkeys(range(4)), lambda _: decided.append(threading.current_thread().name))
    assert len(decided) == 1


def test_a_late_rank_is_waited_for() -> None:
    ranks = Ranks(3)
    assert ranks.meet(dict.fromkeys(range(3), 7), late={2: TIMEOUT_S - 1}) == {key: [7, 7, 7] for key in range(3)}
    assert min(ranks.heard_at.values()) >= TIMEOUT_S - 1


def test_a_failed_rank_is_heard_by_all_at_once() -> None:
    ranks = Ranks(4)
    assert_all_heard(ranks.meet({0: 0, 1: 1, 2: FAILURE, 3: 3}), failures=(FAILURE,))
    assert max(ranks.heard_at.values()) < 1.0


def test_a_failed_rank_is_heard_though_another_never_comes() -> None:
    ranks = Ranks(4)
    assert_all_heard(ranks.meet({0: 0, 2: FAILURE, 3: 3}), failures=(FAILURE,))
    assert max(ranks.heard_at.values()) < 1.0


def test_a_failed_coordinator_is_heard_by_all_at_once() -> None:
    ranks, failure = Ranks(3), RankFailure(0, "stage", "OSError", "gone")
    assert_all_heard(ranks.meet({0: failure, 1: 1, 2: 2}), failures=(failure,))
    assert max(ranks.heard_at.values()) < 1.0


@pytest.mark.parametrize("absent", [(1,), (3,), (1, 2), (1, 2, 3)])
def test_missing_ranks_are_named_on_every_present_rank_after_the_deadline(absent: tuple[int, ...]) -> None:
    ranks = Ranks(4)
    heard = ranks.meet({rank: rank for rank in range(4) if rank not in absent})
    assert_all_heard(heard, missing=absent)
    for rank, answer in heard.items():
        assert answer.phase == "plan"
        assert answer.present == tuple(rank for rank in range(4) if rank not in absent)
        assert TIMEOUT_S <= answer.waited_s <= TIMEOUT_S + 1
        assert ranks.heard_at[rank] >= TIMEOUT_S, "not before the deadline"


def test_a_missing_coordinator_is_named_on_every_present_rank() -> None:
    ranks = Ranks(3)
    assert_all_heard(ranks.meet({1: 1, 2: 2}), missing=(0,))
    assert min(ranks.heard_at.values()) >= TIMEOUT_S


def test_a_coordinator_that_arrived_and_never_decides_is_named_on_every_other_rank() -> None:
    store = SoloStore()
    store.set("run/save/plan/0", '{"ok": "here, and then killed"}')
    assert_all_heard(Ranks(3, store).meet({1: 1, 2: 2}), missing=(0,))


@pytest.mark.parametrize("late", [{0: 0.3}, {0: 6.0}, {1: 0.3, 2: 0.6}])
def test_ranks_whose_deadlines_differ_hear_the_same(late: dict[int, float]) -> None:
    heard = Ranks(4).meet({0: 0, 1: 1, 2: 2}, late=late)
    assert_all_heard(heard, missing=heard[0].missing)
    assert 3 in heard[0].missing


def test_a_coordinator_that_comes_after_the_others_gave_up_hears_their_verdict() -> None:
    heard = Ranks(3).meet({0: 0, 1: 1, 2: 2}, late={0: TIMEOUT_S + 1})
    assert_all_heard(heard, missing=(0,))


def test_a_rank_that_comes_after_the_verdict_hears_that_it_was_missed() -> None:
    heard = Ranks(3).meet({0: 0, 1: 1, 2: 2}, late={2: TIMEOUT_S + 1})
    assert_all_heard(heard, missing=(2,))


def test_the_first_verdict_counts_though_the_coordinator_decides_at_the_same_moment() -> None:
    store = SoloStore()

    def too_late(messages: list[Any]) -> str:
        given_up = '{"failures": [], "missing": [0]}'
        assert store.compare_set("run/save/plan/verdict", given_up) == given_up
        return f"decided on {messages}"

    assert_all_heard(Ranks(3, store).meet({0: 0, 1: 1, 2: 2}, too_late), missing=(0,))


def test_a_rank_that_gives_up_after_the_decision_takes_the_decision() -> None:
    store = SoloStore()
    store.compare_set("run/save/plan/verdict", '{"agreed": 5}')
    assert Ranks(2, store).meet({1: 1}) == {1: 5}


def test_a_decision_that_breaks_is_heard_by_all() -> None:
    heard = Ranks(3).meet(dict.fromkeys(range(3)), lambda said: said[99])
    assert_all_heard(heard, failures=(RankFailure(0, "decide", "IndexError", "list index out of range"),))


def test_a_decision_that_is_no_json_is_heard_as_a_failure_by_all() -> None:
    heard = Ranks(2).meet(dict.fromkeys(range(2)), lambda _: object())
    assert [answer.failures[0].error for answer in heard.values()] == ["TypeError", "TypeError"]


def test_a_refusal_reaches_all_with_its_failures() -> None:
    def refuse(_: list[Any]) -> None:
        raise RefusalError([FAILURE, FAILURE])

    assert_all_heard(Ranks(3).meet(dict.fromkeys(range(3)), refuse), failures=(FAILURE, FAILURE))


@pytest.mark.parametrize(
    "key", ["old-run/save/plan/1", "run/save-before/plan/1", "run/save/local/1", "run/save/plan/11"]
)
def test_what_another_run_attempt_or_phase_left_does_not_count(key: str) -> None:
    store = SoloStore()
    store.set(key, '{"ok": "stale"}')
    store.set(
        f"{key.rpartition('/')[0]}/verdict" if "/plan/11" not in key else "run/save/plan11/verdict",
        '{"agreed": "stale"}',
    )
    assert_all_heard(Ranks(2, store).meet({0: 0}), missing=(1,))


def test_a_silent_rank_is_missed_before_the_deadline() -> None:
    ranks = Ranks(3)
    heard = ranks.meet({0: 0, 1: 1}, meeting=Meeting(100 * TIMEOUT_S, silence_s=TIMEOUT_S))
    assert_all_heard(heard, missing=(2,))
    assert TIMEOUT_S <= max(ranks.heard_at.values()) < 2 * TIMEOUT_S


def test_a_silent_coordinator_is_missed_before_the_deadline() -> None:
    ranks = Ranks(3)
    heard = ranks.meet({1: 1, 2: 2}, meeting=Meeting(100 * TIMEOUT_S, silence_s=TIMEOUT_S))
    assert_all_heard(heard, missing=(0,))
    assert TIMEOUT_S <= max(ranks.heard_at.values()) < 2 * TIMEOUT_S


def test_a_rank_that_gives_signs_of_life_is_waited_for_until_they_end() -> None:
    ranks = Ranks(2)
    assert_all_heard(
        ranks.meet({0: 0}, meeting=Meeting(100 * TIMEOUT_S, silence_s=TIMEOUT_S), beating=(1,)), missing=(1,)
    )
    assert 39 * TIMEOUT_S / 20 + TIMEOUT_S <= ranks.heard_at[0] < 4 * TIMEOUT_S


def test_a_busy_rank_that_gives_signs_of_life_arrives_in_time() -> None:
    silence = Meeting(100 * TIMEOUT_S, silence_s=TIMEOUT_S)
    late = {1: 1.9 * TIMEOUT_S}
    assert Ranks(2).meet({0: 0, 1: 1}, meeting=silence, late=late, beating=(1,)) == {0: [0, 1], 1: [0, 1]}


def test_signs_of_life_do_not_extend_the_deadline() -> None:
    ranks = Ranks(2)
    ranks.meet({0: 0}, meeting=Meeting(TIMEOUT_S, silence_s=TIMEOUT_S), beating=(1,))
    assert TIMEOUT_S <= ranks.heard_at[0] < TIMEOUT_S + 1


def test_who_lost_a_peer_blames_nobody_and_the_rank_that_never_comes_is_named() -> None:
    lost = [RankFailure(rank, "ack", "LostPeerError", "timed out waiting for recv") for rank in range(4)]
    heard = Ranks(4).meet({0: lost[0], 1: 1, 3: lost[3]}, meeting=Meeting(100 * TIMEOUT_S, silence_s=TIMEOUT_S))
    assert_all_heard(heard, missing=(2,), failures=(lost[0], lost[3]))


def test_a_coordinator_that_never_comes_is_named_by_those_who_lost_it() -> None:
    lost = [RankFailure(rank, "ack", "LostPeerError", "connection closed") for rank in range(3)]
    heard = Ranks(3).meet({1: lost[1], 2: lost[2]}, meeting=Meeting(100 * TIMEOUT_S, silence_s=TIMEOUT_S))
    assert_all_heard(heard, missing=(0,), failures=(lost[1], lost[2]))


def test_who_lost_a_peer_does_not_wait_for_one_that_is_alive_and_does_not_come() -> None:
    ranks, lost = Ranks(2), RankFailure(0, "ack", "LostPeerError", "timed out")
    meeting = Meeting(100 * TIMEOUT_S, silence_s=TIMEOUT_S)
    assert_all_heard(ranks.meet({0: lost}, meeting=meeting, beating=(1,)), missing=(1,), failures=(lost,))
    assert ranks.heard_at[0] < 2 * TIMEOUT_S


def test_when_all_lost_a_peer_and_all_come_their_reasons_are_told() -> None:
    ranks, lost = Ranks(2), [RankFailure(rank, "ack", "LostPeerError", "timed out") for rank in range(2)]
    assert_all_heard(ranks.meet(dict(enumerate(lost))), failures=tuple(lost))
    assert max(ranks.heard_at.values()) < 1.0


def test_a_cause_is_told_without_its_consequences() -> None:
    lost, cause = RankFailure(0, "ack", "LostPeerError", "connection closed"), RankFailure(1, "ack", "OSError", "full")
    assert_all_heard(Ranks(3).meet({0: lost, 1: cause, 2: 2}), failures=(cause,))


@pytest.mark.parametrize("late_s", [0.0, 3.0, 5 * TIMEOUT_S])
def test_who_follows_the_coordinator_waits_for_it_while_it_gives_signs_of_life_and_no_longer(late_s: float) -> None:
    clock, store = Clock(2), SoloStore()
    first, second = (Rendezvous(rank, 2, store, clock, "run") for rank in range(2))

    def coordinate() -> None:
        for count in range(int(late_s)):
            first.beat(count)
            clock.sleep(1.0)
        first.follow("save/tidy", MEETING)
        clock.leave()

    def follow() -> float:
        second.follow("save/tidy", Meeting(100 * TIMEOUT_S, silence_s=TIMEOUT_S))
        clock.leave()
        return clock.now()

    with ThreadPoolExecutor(2) as pool:
        pool.submit(coordinate)
        assert pool.submit(follow).result() == pytest.approx(int(late_s), abs=0.5)


def test_who_follows_a_coordinator_that_is_dead_goes_on() -> None:
    clock = Clock(1)
    Rendezvous(1, 2, SoloStore(), clock, "run").follow("save/tidy", Meeting(100 * TIMEOUT_S, silence_s=TIMEOUT_S))
    assert clock.now() == pytest.approx(TIMEOUT_S, abs=1.0)


def test_a_forgotten_meeting_can_be_held_anew() -> None:
    ranks = Ranks(3)
    ranks.meet(dict.fromkeys(range(3), "first"))
    Rendezvous(0, 3, ranks.store, namespace="run").forget("save/plan")
    assert [ranks.store.get(f"run/save/plan/{name}") for name in (0, 1, 2, "verdict")] == [None] * 4
    assert_all_heard(ranks.meet({0: "second", 1: "second"}), missing=(2,))


def test_a_failure_arrives_with_every_field() -> None:
    (answer,) = Ranks(1).meet({0: FAILURE}).values()
    assert answer.failures == (FAILURE,)
    assert str(answer.failures[0]) == "rank 2 failed in stage: MemoryError: no room"

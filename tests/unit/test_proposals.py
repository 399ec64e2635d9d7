"""Saves that no schedule names: every rank does the same at the same step, and no rank waits for another in a step."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from dcpsvc.ranks.c10d import SoloStore
from dcpsvc.ranks.proposals import QUIT, SAVE, STOP, Proposals, together
from dcpsvc.ranks.rendezvous import Rendezvous
from tests.unit.watchers import BOUND_S, WORLD, Clock, Job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STEPS = range(2, 60)


def once(what: object = True) -> Callable[[], object]:  # noqa: FBT002
    """Says it at the first poll, and never again."""
    answers: Iterator[object] = iter([what])
    return lambda: next(answers, None)


# --- on threads of their own ------------------------------------------------------------------------


def test_without_a_proposal_nothing_is_done_at_any_step() -> None:
    with Job() as job:
        assert all(job.at(step) == [None] * WORLD for step in range(1, 50))


def test_a_due_save_is_made_by_every_rank_at_one_step() -> None:
    with Job(once()) as job:
        assert job.at(5) == [None] * WORLD
        assert job.verdict(0) == "go"
        told = {step: job.at(step) for step in range(6, 40)}
    assert [words for words in told.values() if any(words)] == [[SAVE] * WORLD]


@pytest.mark.parametrize("kind", [SAVE, STOP, QUIT])
@pytest.mark.parametrize("asking", range(WORLD))
def test_any_rank_can_ask_and_all_do_it_once_at_one_step(asking: int, kind: str) -> None:
    with Job() as job:
        job.at(1)
        job.ranks[asking].ask(kind)
        assert job.verdict(0) == "go"
        told = {step: job.at(step) for step in STEPS}
    assert [words for words in told.values() if any(words)] == [[kind] * WORLD]


@pytest.mark.parametrize("wanting", range(WORLD))
def test_what_a_rank_wants_is_asked_at_every_look_and_all_hear_why(wanting: int) -> None:
    job = Job()
    job.ranks[wanting].wanted = lambda: STOP
    job.ranks[wanting].because = lambda: f"SIGTERM on rank {wanting}"
    with job:
        job.at(1)
        assert job.verdict(0) == "go"
        assert [words for step in STEPS if any(words := job.at(step))] == [[STOP] * WORLD]
    assert [str(rank.agreed) for rank in job.ranks] == [f"stop at step 2: SIGTERM on rank {wanting}"] * WORLD


def test_the_job_is_stopped_once() -> None:
    with Job(lambda: True) as job:
        job.ranks[2].ask(STOP)
        job.store.until("run/proposals/ask/0")
        job.at(1)
        job.verdict(0)
        told = [words for step in range(2, 40) if any(words := job.at(step))]
        job.ranks[1].ask(STOP)
        job.ranks[2].ask(STOP)
        job.store.looked(4 * WORLD)
        assert not any(job.at(40))
    assert told == [[STOP] * WORLD]
    assert not job.is_proposed(1)


def test_a_rank_that_is_past_the_proposed_step_voids_it_for_all() -> None:
    with Job(once()) as job:
        job.ranks[2].at(1000)
        job.ranks[1].at(5)
        job.ranks[0].at(5)
        assert job.noted(0) == ["noted", "noted", "late"]
        assert job.verdict(0) == "void"
        told = [rank.at(step) for step in range(6, 20) for rank in job.ranks[:2]]
    assert not any(told)


def test_a_rank_that_reaches_the_step_before_all_have_noted_voids_it_for_all() -> None:
    job = Job(once())
    fast, slow = job.ranks[0], job.ranks[2]
    try:
        for rank in (fast, job.ranks[1]):
            rank.start()
        fast.at(5)
        job.store.until("run/proposals/seen/0", "0 ")
        job.store.until("run/proposals/seen/1", "0 ")
        step = job.proposed(0)
        assert fast.at(step) is None
        slow.start()
        assert [rank.at(at) for at in (step - 1, step, step + 1) for rank in job.ranks[1:]] == [None] * 6
        assert job.verdict(0) == "void"
    finally:
        job.__exit__()


class Failing(SoloStore):
    """Out of reach until it is mended."""

    def __init__(self, *, mended: bool = False) -> None:
        super().__init__()
        self.failures, self.mended = threading.Semaphore(0), mended

    def get(self, key: str) -> str | None:
        self._reach()
        return super().get(key)

    def set(self, key: str, value: str) -> None:
        self._reach()
        super().set(key, value)

    def compare_set(self, key: str, desired: str) -> str:
        self._reach()
        return super().compare_set(key, desired)

    def _reach(self) -> None:
        if not self.mended:
            self.failures.release()
            raise RuntimeError("connection reset by peer")


def test_a_stop_asked_for_while_the_store_is_out_of_reach_is_agreed_when_it_is_back() -> None:
    store = Failing()
    watcher = Proposals(Rendezvous(0, 1, store, namespace="run"), lambda: False)
    watcher.start()
    try:
        watcher.ask(STOP)
        assert all(store.failures.acquire(timeout=BOUND_S) for _ in range(3))
        store.mended = True
        told = next(told for step in range(1, 10**9) if (told := watcher.at(step)))  # the test's own timeout bounds it
    finally:
        watcher.stop()
    assert told == STOP
    assert not watcher._thread.is_alive()


def test_asking_does_not_wait_for_a_store_that_hangs() -> None:
    entered, let_go = threading.Event(), threading.Event()

    class Hanging(SoloStore):
        def get(self, key: str) -> str | None:
            entered.set()
            let_go.wait(BOUND_S)
            return super().get(key)

    watcher = Proposals(Rendezvous(0, 1, Hanging(), namespace="run"), lambda: False)
    watcher.start()
    assert entered.wait(BOUND_S)
    for _ in range(3):
        watcher.ask(SAVE)
    assert not let_go.is_set()
    assert watcher.at(1) is None
    let_go.set()
    watcher.stop()


# --- looking when they are told to ------------------------------------------------------------------


def test_the_schedule_is_not_asked_before_the_first_step() -> None:
    asked: list[bool] = []
    job = Job(lambda: bool(asked.append(True)))
    job.look(3)
    assert not asked
    job.at(0)
    job.look()
    assert asked


@pytest.mark.parametrize("first", [0, 1, 100_001, 10**11])
def test_a_stop_asked_for_before_the_first_step_is_done_at_the_first_step(first: int) -> None:
    job = Job()
    job.ranks[1].ask(STOP)
    job.agree()
    assert job.at(first) == [STOP] * WORLD


def test_with_steps_longer_than_the_lead_it_is_done_at_the_next_step() -> None:
    job = Job(step_s=10.0)
    job.done(range(1, 20))
    job.ranks[2].ask(STOP)
    job.agree()
    assert job.at(20) == [STOP] * WORLD


def test_with_short_steps_it_lies_far_enough_ahead_for_all_to_hear() -> None:
    job = Job(step_s=0.01)
    job.done(range(1, 20))
    job.ranks[0].ask(STOP)
    job.look()
    assert 19 + 0.2 / 0.01 <= job.proposed(0) <= 19 + 0.4 / 0.01


def test_one_slow_step_among_short_ones_does_not_bring_it_nearer() -> None:
    job = Job(step_s=0.01)
    job.done(range(1, 20))
    for rank in job.ranks:
        rank.rendezvous.clock = Clock(1000.0)
    job.done([20])
    job.ranks[0].ask(STOP)
    job.look()
    assert job.proposed(0) >= 20 + 0.2 / 0.01


@pytest.mark.parametrize("step_s", [0.0, 0.001, 10.0])
def test_one_rank_alone_does_it_at_its_next_step(step_s: float) -> None:
    job = Job(world=1, step_s=step_s)
    job.done(range(1, 20))
    job.ranks[0].ask(STOP)
    job.look()
    assert job.at(20) == [STOP]


def test_several_asks_before_the_agreement_are_one_save_and_each_later_one_is_one_more() -> None:
    job = Job()
    for rank in (*job.ranks, *job.ranks):
        rank.ask(SAVE)
    assert [kind for _, kind in job.done(range(20))] == [SAVE]
    for more in range(1, 4):
        job.ranks[more % WORLD].ask(SAVE)
        assert [kind for _, kind in job.done(range(20 * more, 20 * more + 20))] == [SAVE]


def test_a_save_asked_for_when_one_is_agreed_is_a_further_one() -> None:
    job = Job()
    job.at(1)
    job.ranks[1].ask(SAVE)
    job.agree()
    assert str(job.ranks[2].agreed) == "save at step 2"
    job.ranks[2].ask(SAVE)
    job.agree()
    (first, second) = job.done(range(2, 40))
    assert first == (2, SAVE)
    assert second[1] == SAVE


def test_a_stop_asked_for_when_a_save_is_agreed_is_done_at_that_very_step() -> None:
    job = Job()
    job.at(1)
    job.ranks[1].ask(SAVE)
    job.agree()
    job.ranks[2].ask(STOP)
    job.agree()
    assert job.at(2) == [STOP] * WORLD
    assert not job.done(range(3, 30))


@pytest.mark.parametrize("first", [SAVE, QUIT])
def test_whoever_wants_a_save_gets_one_before_the_others_quit(first: str) -> None:
    job = Job()
    job.at(1)
    job.ranks[0].ask(first)
    job.ranks[1].ask(SAVE if first == QUIT else QUIT)
    assert [kind for _, kind in job.done(STEPS)] == [STOP]


def test_an_agreed_save_is_made_although_the_job_is_told_to_quit_at_once() -> None:
    job = Job(step_s=0.01)
    job.done(range(1, 20))
    job.ranks[1].ask(SAVE)
    job.agree()
    for rank in job.ranks:
        rank.ask(QUIT)
        rank._pace._per_s = ()  # as after a few very slow steps: the quit could come sooner than the save
    job.agree()
    assert [kind for _, kind in job.done(range(20, 100))] in ([STOP], [SAVE, QUIT])


def test_quitting_alone_saves_nothing() -> None:
    job = Job()
    job.at(1)
    job.ranks[1].ask(QUIT)
    assert [kind for _, kind in job.done(STEPS)] == [QUIT]


@pytest.mark.parametrize("kind", [SAVE, STOP, QUIT])
def test_what_was_voided_is_proposed_again_and_done(kind: str) -> None:
    job = Job()
    job.at(1)
    job.ranks[1].ask(kind)
    job.ranks[1].look()
    job.ranks[0].look()  # proposes step 2, which all reach before the others have noted it
    assert job.at(2) == [None] * WORLD
    assert job.verdict(0) == "void"
    assert [told for _, told in job.done(range(3, 40))] == [kind]


def test_every_void_but_the_first_leads_further_ahead() -> None:
    job = Job(step_s=10.0)
    job.ranks[0].ask(STOP)
    ahead, step = [], 0
    for number in range(5):  # nobody but the coordinator looks
        assert job.at(step) == [None] * WORLD
        job.ranks[0].look()
        ahead.append(job.proposed(number) - step)
        step = job.proposed(number)
    assert ahead == [1, 1, 2, 4, 8]


def test_a_rank_far_ahead_is_waited_for_by_going_beyond_it() -> None:
    job = Job()
    job.ranks[2].at(1000)
    for rank in job.ranks[:2]:
        rank.at(5)
    job.ranks[1].ask(STOP)
    job.agree()
    job.agree()
    assert job.proposed(1) > 1000
    assert [rank.at(step) for step in range(6, 1001) for rank in job.ranks[:2]] == [None] * 2 * 995
    assert job.at(job.proposed(1)) == [STOP] * WORLD


def test_a_step_whose_verdict_is_known_costs_no_call_to_the_store() -> None:
    job = Job()
    job.at(1)
    job.ranks[1].ask(STOP)
    job.agree()
    job.store.get = job.store.compare_set = None  # type: ignore[method-assign, assignment]
    assert job.at(2) == [STOP] * WORLD


def agreed_but_unheard(kind: str) -> tuple[Job, Proposals]:
    """A job in which rank 2 has noted a proposal for step 2, which all agreed on, and has not heard that."""
    job = Job()
    job.at(1)
    job.ranks[0].ask(kind)
    job.ranks[0].look()
    for rank in (*job.ranks[1:], job.ranks[0]):
        rank.look()
    assert job.verdict(0) == "go"
    assert job.ranks[2].agreed is None
    return job, job.ranks[2]


@pytest.mark.parametrize(("kind", "next_step"), [(SAVE, None), (STOP, STOP), (QUIT, QUIT)])
def test_a_stop_whose_verdict_cannot_be_read_in_its_step_is_asked_for_again_in_the_next(
    kind: str, next_step: str | None
) -> None:
    job, cut_off = agreed_but_unheard(kind)
    away = Failing()
    cut_off.rendezvous.store = away
    assert cut_off.at(2) is None
    cut_off.rendezvous.store = job.store
    assert cut_off.at(3) == next_step
    assert [rank.at(2) for rank in job.ranks[:2]] == [kind] * 2


def test_a_save_asked_for_after_one_whose_verdict_could_not_be_read_is_not_lost() -> None:
    job, cut_off = agreed_but_unheard(SAVE)
    cut_off.rendezvous.store = Failing()
    assert cut_off.at(2) is None
    cut_off.rendezvous.store = job.store
    assert [rank.at(2) for rank in job.ranks[:2]] == [SAVE] * 2
    cut_off.ask(SAVE)
    assert [kind for _, kind in job.done(range(3, 20))] == [SAVE]


def test_a_proposal_whose_answer_was_lost_is_not_replaced_by_another() -> None:
    job = Job()

    class Forgetful(Failing):
        def compare_set(self, key: str, desired: str) -> str:
            job.store.compare_set(key, desired)
            raise RuntimeError("the answer is lost")

        def set(self, key: str, value: str) -> None:
            job.store.set(key, value)
            raise RuntimeError("the answer is lost")

        def get(self, key: str) -> str | None:
            return job.store.get(key)

    job.at(1)
    job.ranks[0].ask(SAVE)
    job.ranks[0]._send()
    store, job.ranks[0].rendezvous.store = job.ranks[0].rendezvous.store, Forgetful()
    with pytest.raises(RuntimeError):
        job.ranks[0].look()
    job.ranks[0].rendezvous.store = store
    job.ranks[1].look()  # notes the first one
    job.ranks[1].ask(STOP)
    job.agree()
    assert job.at(2) in ([SAVE] * WORLD, [STOP] * WORLD)
    job.done(STEPS[1:])
    assert [rank.agreed.kind for rank in job.ranks] == [STOP] * WORLD


@pytest.mark.parametrize("first", [False, True])
def test_that_somebody_is_preempted_is_heard_by_all_though_others_asked_at_leisure(first: bool) -> None:  # noqa: FBT001
    job = Job()
    job.at(1)
    for urgent in (first, not first):
        job.ranks[2].ask(STOP, urgent=urgent)
        job.ranks[2].look()
    job.agree()
    assert [rank.agreed.urgent for rank in job.ranks] == [True] * WORLD


def test_a_stop_asked_for_at_leisure_is_not_urgent() -> None:
    job = Job()
    job.at(1)
    job.ranks[2].ask(STOP, "a command")
    job.agree()
    assert [rank.agreed.urgent for rank in job.ranks] == [False] * WORLD


def test_an_ask_that_the_store_refused_is_sent_again() -> None:
    job, refused = Job(), []

    class Refusing(Failing):
        def compare_set(self, key: str, desired: str) -> str:
            refused.append(key)
            raise RuntimeError("connection reset by peer")

    job.at(1)
    job.ranks[2].ask(SAVE)
    job.ranks[2].rendezvous.store = Refusing(mended=True)
    with pytest.raises(RuntimeError):
        job.ranks[2].look()
    assert refused == ["run/proposals/ask/0"]
    job.ranks[2].rendezvous.store = job.store
    assert [kind for _, kind in job.done(STEPS)] == [SAVE]


def test_a_watcher_that_hears_of_a_save_when_it_is_passed_does_not_announce_it() -> None:
    job, late = agreed_but_unheard(SAVE)
    told = []

    class Slow(Failing):
        def get(self, key: str) -> str | None:
            word = job.store.get(key)
            if key.endswith("/verdict"):
                late.rendezvous.store = job.store
                told.append(late.at(2))
            return word

    late.rendezvous.store = Slow(mended=True)
    late.look()
    assert told == [SAVE]
    assert late.agreed is None


def test_agreed_tells_what_is_to_come_and_the_stop_for_good() -> None:
    job = Job()
    job.at(1)
    assert job.ranks[1].agreed is None
    job.ranks[0].ask(SAVE, "a command")
    job.agree()
    assert [str(rank.agreed) for rank in job.ranks] == ["save at step 2: a command"] * WORLD
    job.at(2)
    assert [rank.agreed for rank in job.ranks] == [None] * WORLD
    job.ranks[0].ask(STOP, "SIGTERM on rank 0")
    job.ranks[1].ask(STOP, "SIGTERM on rank 1")
    job.agree()
    job.at(3)
    (agreed,) = {rank.agreed for rank in job.ranks}
    assert (agreed.kind, agreed.step) == (STOP, 3)
    assert "SIGTERM on rank" in agreed.why


@pytest.mark.parametrize(
    ("kinds", "does"),
    [
        ((), None), ((SAVE,), SAVE), ((STOP,), STOP), ((QUIT,), QUIT),
        ((SAVE, STOP), STOP), ((SAVE, QUIT), STOP), ((STOP, QUIT), STOP), ((SAVE, STOP, QUIT), STOP),
    ],
)  # fmt: skip
def test_one_thing_serves_all_that_is_wanted_at_a_step(kinds: tuple[str, ...], does: str | None) -> None:
    assert together(kinds) == does


def test_a_clock_that_does_not_move_between_two_steps_is_no_speed() -> None:
    job = Job(step_s=0.0)
    job.done(range(1, 10))
    assert isinstance(job.ranks[0].rendezvous.clock, Clock)
    job.ranks[0].ask(STOP)
    job.agree()
    assert job.at(10) == [STOP] * WORLD

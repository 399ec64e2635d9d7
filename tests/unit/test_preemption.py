"""R18: what a process does when it is told to end, and that it can always be ended."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dcpsvc.deadline import SystemClock
from dcpsvc.errors import ConfigError
from dcpsvc.preemption import Preemption, TriggerFile
from dcpsvc.ranks.proposals import STOP
from dcpsvc.stopsignals import AGAIN_S, StopSignals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BOUND_S = 20.0
TERM, USR1 = signal.SIGTERM, signal.SIGUSR1


class Clock(SystemClock):
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def now(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def calls() -> Iterator[list[int]]:
    """Signals that reach the handler of the process itself; afterwards everything must be as it was."""
    heard: list[int] = []

    def hear(number: int, _: object) -> None:
        heard.append(number)

    before = {number: signal.signal(number, hear) for number in (TERM, USR1)}
    yield heard
    left = [signal.getsignal(number) for number in (TERM, USR1)], signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)
    assert left == ([hear, hear], -1)


@contextlib.contextmanager
def taken(preemption: Preemption) -> Iterator[Preemption]:
    preemption.install()
    try:
        yield preemption
    finally:
        preemption.uninstall()


# --- what is told -----------------------------------------------------------------------------------


def test_as_long_as_nobody_asks_there_is_no_end_in_sight(clock: Clock) -> None:
    with taken(Preemption(clock=clock)) as preemption:
        assert preemption.wanted() is None
        assert preemption.requested == ""
        assert preemption.deadline is None
        assert preemption.left_s() is None


@pytest.mark.parametrize("number", [TERM, USR1])
def test_a_signal_is_a_wish_to_stop_and_its_grace_runs_from_then_on(clock: Clock, number: signal.Signals) -> None:
    with taken(Preemption(grace_s=25.0, rank=2, clock=clock)) as preemption:
        signal.raise_signal(number)
        assert preemption.wanted() == STOP
        assert preemption.requested == f"{number.name} on rank 2"
        assert preemption.deadline == clock.now() + 25.0
        clock.seconds += 10.0
        assert preemption.left_s() == 15.0
        clock.seconds += 100.0
        assert preemption.left_s() == 0.0
        assert preemption.wanted() == STOP


def test_the_first_signal_counts(clock: Clock) -> None:
    with taken(Preemption(grace_s=25.0, clock=clock)) as preemption:
        signal.raise_signal(USR1)
        clock.seconds += 5.0
        signal.raise_signal(TERM)
        assert preemption.requested == "SIGUSR1 on rank 0"
        assert preemption.left_s() == 20.0


def test_signals_that_are_not_named_are_left_alone(clock: Clock, calls: list[int]) -> None:
    with taken(Preemption(("SIGUSR1",), clock=clock)) as preemption:
        signal.raise_signal(TERM)
        assert preemption.wanted() is None
    with taken(Preemption((), clock=clock)) as preemption:
        signal.raise_signal(USR1)
        assert preemption.wanted() is None
    assert calls == [TERM, USR1]


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP", "SIGNONE", "term", ""])
def test_a_signal_that_nobody_can_take_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}'"):
        Preemption(("SIGTERM", name))


def test_a_rank_that_was_not_told_counts_from_the_moment_it_hears_of_it(clock: Clock) -> None:
    preemption = Preemption(grace_s=25.0, clock=clock)
    clock.seconds += 50.0
    preemption.noticed("SIGTERM on rank 3")
    clock.seconds += 5.0
    preemption.noticed("again")
    assert preemption.left_s() == 20.0
    assert preemption.requested == "SIGTERM on rank 3"
    assert preemption.wanted() is None  # nothing to ask for: all have agreed already


@pytest.mark.parametrize("told_first", [False, True])
def test_the_grace_runs_from_whatever_came_first(clock: Clock, told_first: bool) -> None:  # noqa: FBT001
    with taken(Preemption(grace_s=25.0, clock=clock)) as preemption:
        for told in (told_first, not told_first):
            if told:
                signal.raise_signal(TERM)
            else:
                preemption.noticed("SIGTERM on rank 3")
            clock.seconds += 1.0
        assert preemption.left_s() == 23.0
        assert preemption.requested == "SIGTERM on rank 0"


# --- the handlers that were there -------------------------------------------------------------------


def test_a_handler_that_was_there_is_called_as_well_and_stands_again_afterwards(calls: list[int]) -> None:
    theirs = signal.getsignal(TERM)
    with taken(Preemption()) as preemption:
        signal.raise_signal(TERM)
        assert preemption.wanted() == STOP
    assert calls == [TERM]
    assert signal.getsignal(TERM) is theirs


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_signal_that_was_ignored_or_deadly_is_taken_and_given_back(before: signal.Handlers) -> None:
    theirs = signal.signal(TERM, before)
    try:
        with taken(Preemption()) as preemption:
            signal.raise_signal(TERM)
            assert preemption.wanted() == STOP
        assert signal.getsignal(TERM) is before
    finally:
        signal.signal(TERM, theirs)


def test_what_a_handler_that_was_there_raises_is_raised() -> None:
    def leave(number: int, _: object) -> None:
        sys.exit(number)

    theirs = signal.signal(TERM, leave)
    try:
        with taken(Preemption()) as preemption:
            with pytest.raises(SystemExit):
                signal.raise_signal(TERM)
            assert preemption.wanted() == STOP
    finally:
        signal.signal(TERM, theirs)


def test_a_handler_that_came_later_keeps_the_signal(calls: list[int]) -> None:
    theirs, heard = signal.getsignal(USR1), []
    preemption = Preemption()
    preemption.install()
    ours = signal.signal(USR1, lambda number, frame: heard.append((number, frame)))
    signal.raise_signal(USR1)
    assert preemption.wanted() is None  # taken over for something else, and not handed on
    preemption.uninstall()
    assert signal.getsignal(USR1) is not ours
    signal.raise_signal(USR1)
    assert len(heard) == 2
    assert calls == []
    signal.signal(USR1, theirs)


@pytest.mark.parametrize("ended", [False, True])
def test_a_handler_that_came_later_and_hands_on_reaches_us_and_those_before(
    calls: list[int],
    ended: bool,  # noqa: FBT001
) -> None:
    theirs = signal.getsignal(TERM)
    preemption = Preemption()
    preemption.install()
    ours = signal.getsignal(TERM)
    signal.signal(TERM, later := lambda *given: ours(*given))  # noqa: PLW0108 - a handler of its own
    if ended:
        preemption.uninstall()
    signal.raise_signal(TERM)
    assert calls == [TERM]
    assert signal.getsignal(TERM) is later
    assert preemption.wanted() == (None if ended else STOP)
    signal.signal(TERM, theirs)
    preemption.uninstall()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_in_one_process_both_hear_and_leave_in_any_order(order: tuple[int, ...], calls: list[int]) -> None:
    both = [Preemption(), Preemption()]
    for preemption in both:
        preemption.install()
    signal.raise_signal(TERM)
    assert [preemption.wanted() for preemption in both] == [STOP, STOP]
    for n in order:
        both[n].uninstall()
    signal.raise_signal(TERM)
    assert calls == [TERM, TERM]
    signal.raise_signal(USR1)
    assert calls == [TERM, TERM, USR1]


def test_elsewhere_than_on_the_main_thread_nothing_is_watched_and_one_line_says_so(
    caplog: pytest.LogCaptureFixture, calls: list[int]
) -> None:
    preemption = Preemption()
    thread = threading.Thread(target=preemption.install)
    thread.start()
    thread.join()
    signal.raise_signal(TERM)
    preemption.uninstall()
    assert preemption.wanted() is None
    assert calls == [TERM]
    (record,) = caplog.records
    assert (record.levelno, record.name) == (logging.WARNING, "dcpsvc")
    assert "SIGTERM and SIGUSR1 cannot be watched" in record.getMessage()


def test_what_is_given_back_elsewhere_than_on_the_main_thread_is_handed_on(calls: list[int]) -> None:
    theirs, preemption = signal.getsignal(TERM), Preemption()
    preemption.install()
    thread = threading.Thread(target=preemption.uninstall)
    thread.start()
    thread.join()
    for number in (TERM, USR1):
        signal.raise_signal(number)
    assert calls == [TERM, USR1]
    assert preemption.wanted() is None
    assert signal.getsignal(TERM) is theirs
    preemption._signals._wakeup.close()


# --- it can always be ended -------------------------------------------------------------------------


def test_a_sigterm_soon_after_the_first_is_the_same_and_a_later_one_acts_as_if_nobody_were_here(
    clock: Clock, calls: list[int]
) -> None:
    theirs = signal.getsignal(TERM)
    with taken(Preemption(clock=clock)):
        ours = signal.getsignal(TERM)
        signal.raise_signal(TERM)
        clock.seconds += AGAIN_S / 2
        signal.raise_signal(TERM)
        assert signal.getsignal(TERM) == ours
        clock.seconds += AGAIN_S / 2
        signal.raise_signal(TERM)
        assert signal.getsignal(TERM) is theirs
    assert calls == [TERM] * 3


def test_sigusr1_may_come_as_often_as_it_likes_and_does_not_make_a_sigterm_the_second(clock: Clock) -> None:
    with taken(Preemption(clock=clock)):
        ours = signal.getsignal(TERM)
        for number in (USR1, USR1, TERM):
            signal.raise_signal(number)
            clock.seconds += 2 * AGAIN_S
        assert [signal.getsignal(number) for number in (TERM, USR1)] == [ours, ours]


LIVE = """
    import ctypes, signal, sys, threading, time
    from dcpsvc.preemption import Preemption
    from dcpsvc.deadline import SystemClock

    class Fast(SystemClock):
        def now(self):
            return 10 * super().now()

    def watch():
        told = False
        while True:
            if preemption.wanted() and not told:
                told = print("told", flush=True) is None
            time.sleep(0.02)

    preemption = Preemption(clock=Fast())
    preemption.install()
    threading.Thread(target=watch, daemon=True).start()
    print("ready", flush=True)
    signal.alarm(60)
"""
IN_PYTHON = """
    while True:
        time.sleep(0.01)
"""
IN_C = """
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize(
    ("main", "by"), [(IN_PYTHON, TERM), (IN_C, signal.SIGKILL)], ids=["in Python", "in a call that never returns"]
)
def test_a_second_sigterm_ends_the_process(main: str, by: signal.Signals) -> None:
    script = textwrap.dedent(LIVE) + textwrap.dedent(main)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            process.terminate()
            assert process.stdout.readline() == b"told\n"  # and it lives
            while process.poll() is None:  # the test's own timeout bounds it
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
            assert process.returncode == -by
        finally:
            process.kill()


def inside_a_call(meanwhile: Callable[[], None]) -> None:
    """Run something on another thread while the main thread is inside a call of C that no signal interrupts."""
    libc, mutex, condition = ctypes.CDLL(None), ctypes.create_string_buffer(128), ctypes.create_string_buffer(128)

    def run() -> None:
        libc.pthread_mutex_lock(mutex)  # the main thread lets go of it inside pthread_cond_wait, and not before
        try:
            meanwhile()
        finally:
            libc.pthread_cond_signal(condition)
            libc.pthread_mutex_unlock(mutex)

    libc.pthread_mutex_lock(mutex)
    thread = threading.Thread(target=run)
    thread.start()
    libc.pthread_cond_wait(condition, mutex)
    libc.pthread_mutex_unlock(mutex)
    thread.join()


def told(preemption: Preemption) -> str | None:
    """What it wants, once a signal that is on its way has come."""
    ends = time.monotonic() + BOUND_S
    while (kind := preemption.wanted()) is None and time.monotonic() < ends:
        time.sleep(0.001)
    return kind


def test_a_signal_is_heard_while_the_main_thread_is_inside_a_long_call(calls: list[int]) -> None:
    heard: list[object] = []
    with taken(Preemption()) as preemption:

        def meanwhile() -> None:
            heard.append(preemption.wanted())
            os.kill(os.getpid(), TERM)
            heard.extend((told(preemption), list(calls)))

        inside_a_call(meanwhile)
    assert heard == [None, STOP, []]
    assert calls == [TERM]


def test_a_main_thread_that_hears_the_first_sigterm_late_does_not_take_it_for_a_second(
    clock: Clock, calls: list[int]
) -> None:
    heard: list[object] = []
    with taken(Preemption(clock=clock)) as preemption:
        ours = signal.getsignal(TERM)

        def meanwhile() -> None:
            os.kill(os.getpid(), TERM)
            heard.append(told(preemption))
            clock.seconds += 10 * AGAIN_S

        inside_a_call(meanwhile)
        assert heard == [STOP]
        assert signal.getsignal(TERM) == ours
        assert preemption.wanted() == STOP
    assert calls == [TERM]


def test_signals_are_heard_although_somebody_else_has_the_wakeup_descriptor() -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(writer)
    try:
        with taken(Preemption()) as preemption:
            signal.raise_signal(TERM)
            assert preemption.wanted() == STOP
        assert signal.set_wakeup_fd(-1) == writer
    finally:
        signal.set_wakeup_fd(-1)
        os.close(reader)
        os.close(writer)


def test_no_descriptor_stays_behind() -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    for _ in range(3):
        with taken(Preemption()), taken(Preemption()):
            pass
    assert sorted(Path("/proc/self/fd").iterdir()) == before


# --- children ---------------------------------------------------------------------------------------


def test_a_forked_child_is_ended_by_sigterm_at_once_and_its_parent_is_not_told() -> None:
    theirs = signal.signal(TERM, signal.SIG_DFL)
    endings = []
    try:
        with taken(Preemption()) as preemption:
            for _ in range(30):
                if (child := os.fork()) == 0:
                    signal.alarm(20)
                    signal.pause()
                    os._exit(0)
                os.kill(child, TERM)
                endings.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            assert preemption.wanted() is None
            assert preemption.requested == ""
            signal.raise_signal(TERM)
            assert preemption.wanted() == STOP
    finally:
        signal.signal(TERM, theirs)
    assert endings == [-TERM] * 30


def test_a_child_that_was_forked_behind_pythons_back_is_ended_by_sigterm_too() -> None:
    theirs = signal.signal(TERM, signal.SIG_DFL)
    try:
        with taken(Preemption()):
            libc = ctypes.PyDLL(None)
            if (child := libc.fork()) == 0:
                signal.alarm(20)
                while True:
                    signal.pause()
            os.kill(child, TERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -TERM
    finally:
        signal.signal(TERM, theirs)


def test_a_fork_leaves_the_signals_of_its_parent_unblocked() -> None:
    with taken(Preemption()) as preemption:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        if (child := os.fork()) == 0:
            os._exit(len(signal.pthread_sigmask(signal.SIG_BLOCK, ()) ^ before))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
        signal.raise_signal(TERM)
        assert preemption.wanted() == STOP


# --- a trigger file ---------------------------------------------------------------------------------


def touch(path: Path, seconds: int) -> None:
    path.touch()
    os.utime(path, (seconds, seconds))


def test_a_trigger_file_that_is_made_or_touched_asks_to_stop_and_stays(tmp_path: Path, clock: Clock) -> None:
    for before in (False, True):
        path = tmp_path / f"stop-{before}"
        if before:
            touch(path, 1000)
        preemption = Preemption(trigger=path, grace_s=25.0, rank=2, clock=clock)
        assert preemption.wanted() is None
        touch(path, 2000)
        clock.seconds += 1.0
        assert preemption.wanted() == STOP
        clock.seconds += 5.0
        assert preemption.left_s() == 20.0
        assert preemption.requested == f"trigger file {path}"
        assert path.exists()


def test_a_trigger_file_from_an_earlier_time_does_not_stop_a_restarted_job(tmp_path: Path) -> None:
    path = tmp_path / "stop"
    touch(path, 1000)
    trigger = TriggerFile(path)
    assert not trigger.touched()
    path.rename(tmp_path / "away")  # a file system that loses sight of it for a while
    assert not trigger.touched()
    (tmp_path / "away").rename(path)
    assert not trigger.touched()
    path.unlink()
    assert not trigger.touched()
    touch(path, 999)
    assert trigger.touched()


def test_a_trigger_file_that_cannot_be_looked_at_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    trigger = TriggerFile(tmp_path / "file" / "stop")
    assert not trigger.touched()
    (tmp_path / "file").unlink()
    (tmp_path / "file").mkdir()
    touch(tmp_path / "file" / "stop", 1000)
    assert not trigger.touched()  # it may have been there all the time
    touch(tmp_path / "file" / "stop", 1001)
    assert trigger.touched()


def test_a_trigger_file_is_looked_at_once_a_second(tmp_path: Path, clock: Clock) -> None:
    preemption = Preemption(trigger=tmp_path / "stop", clock=clock)
    assert preemption.wanted() is None
    touch(tmp_path / "stop", 1000)
    clock.seconds += 0.5
    assert preemption.wanted() is None
    clock.seconds += 0.5
    assert preemption.wanted() == STOP


def test_stop_signals_know_when_the_first_one_came(clock: Clock) -> None:
    signals = StopSignals(["SIGUSR1"], clock)
    signals.install()
    signal.raise_signal(USR1)
    signals.give_back()
    signals.give_back()
    assert signals.first == (USR1, clock.now())

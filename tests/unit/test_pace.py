"""A store that asks to slow down gets fewer requests from the whole process, and more again when it bears them."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dcpsvc.config import Limits
from dcpsvc.errors import StoreThrottledError, StoreUnavailableError
from dcpsvc.storage.pace import Pace


def throttled(pace: Pace, count: int = 1) -> None:
    """So many transfers that are under way together, all turned away."""
    line = threading.Barrier(count)

    def one(_: int) -> None:
        with contextlib.suppress(StoreThrottledError), pace.turn(1):
            line.wait(10)
            raise StoreThrottledError("put_file", "x", "slow down")

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(one, range(count)))


def test_transfers_turned_away_together_halve_the_pace_once() -> None:
    pace = Pace(Limits(concurrency=8))
    throttled(pace, 8)
    assert pace.turns == 4
    throttled(pace, 4)
    assert pace.turns == 2


def test_one_transfer_is_always_allowed() -> None:
    pace = Pace(Limits(concurrency=2))
    for _ in range(5):
        throttled(pace)
    assert pace.turns == 1


def test_successes_bring_the_pace_back_and_never_above_the_limit() -> None:
    pace = Pace(Limits(concurrency=4))
    throttled(pace)
    needed = 0
    while pace.turns < 4:
        needed += 1
        with pace.turn(1):
            pass
    assert 2 <= needed <= 8
    for _ in range(20):
        with pace.turn(1):
            pass
    assert pace.turns == 4


def test_another_failure_does_not_slow_down() -> None:
    pace = Pace(Limits(concurrency=4))
    with pytest.raises(StoreUnavailableError), pace.turn(1):
        raise StoreUnavailableError("put_file", "x", "reset")
    assert pace.turns == 4


def test_no_more_transfers_than_turns_are_ever_under_way() -> None:
    pace, lock, under_way, most = Pace(Limits(concurrency=8)), threading.Lock(), 0, 0
    throttled(pace, 8)
    throttled(pace)

    def one(_: int) -> None:
        nonlocal under_way, most
        with pace.turn(1):
            with lock:
                under_way += 1
                most = max(most, under_way - pace.turns)
            with lock:
                under_way -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(200)))
    assert most <= 0
    assert under_way == 0


def test_bytes_keep_to_the_rate() -> None:
    pauses: list[float] = []
    now = 100.0

    def pause(seconds: float) -> None:
        nonlocal now
        pauses.append(seconds)
        now += seconds

    pace = Pace(Limits(nbytes_per_s=1000.0), clock=lambda: now, pause=pause)
    for _ in range(5):
        with pace.turn(500):
            pass
    assert pauses == [0.5] * 4

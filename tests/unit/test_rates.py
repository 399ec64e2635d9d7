"""Whether copying a part is faster than sending it is told by the last ones that went either way."""

from __future__ import annotations

import contextlib

import pytest

from dcpsvc.storage.parts import MIN_PART_NBYTES, How
from dcpsvc.storage.rates import ANEW, KNOWN, Rates

NBYTES = MIN_PART_NBYTES


class Timed:
    """Parts that took so many seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.rates = Rates(lambda: self.now)

    def took(self, how: How, seconds: float, count: int = KNOWN, nbytes: int = NBYTES) -> None:
        for _ in range(count):
            with self.rates.timed(how, nbytes):
                self.now += seconds

    def copied_of(self, count: int) -> int:
        return sum(self.rates.copies() for _ in range(count))


@pytest.mark.parametrize(("sent", "copied"), [(0, 0), (KNOWN, KNOWN - 1), (KNOWN - 1, KNOWN)])
def test_until_enough_is_known_all_is_copied(sent: int, copied: int) -> None:
    timed = Timed()
    timed.took(How.SENT, 1.0, sent)
    timed.took(How.COPIED, 9.0, copied)
    assert timed.copied_of(100) == 100


def test_slower_copies_are_not_made_but_for_one_in_some() -> None:
    timed = Timed()
    timed.took(How.SENT, 1.0)
    timed.took(How.COPIED, 1.1)
    assert timed.copied_of(10 * ANEW) == 10


def test_it_is_the_seconds_for_a_byte_that_count() -> None:
    timed = Timed()
    timed.took(How.SENT, 1.0)
    timed.took(How.COPIED, 3.0, nbytes=4 * NBYTES)
    assert timed.copied_of(100) == 100


def test_one_slow_copy_changes_nothing_and_the_last_ones_count() -> None:
    timed = Timed()
    timed.took(How.SENT, 1.0)
    timed.took(How.COPIED, 0.5)
    timed.took(How.COPIED, 60.0, 1)
    assert timed.copied_of(100) == 100
    timed.took(How.COPIED, 60.0)
    assert timed.copied_of(ANEW) == 1
    timed.took(How.COPIED, 0.5)
    assert timed.copied_of(100) == 100


def test_parts_that_failed_or_are_small_say_nothing() -> None:
    timed = Timed()
    timed.took(How.SENT, 1.0)
    timed.took(How.COPIED, 9.0, nbytes=NBYTES - 1)
    for _ in range(KNOWN):
        with contextlib.suppress(OSError), timed.rates.timed(How.COPIED, NBYTES):
            timed.now += 9.0
            raise OSError
    assert timed.copied_of(100) == 100

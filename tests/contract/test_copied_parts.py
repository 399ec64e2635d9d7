"""What an earlier object has is copied by the server while that is no slower than sending it, and else sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from scripted_s3 import ScriptedS3
from store_contract import MIB

from dcpsvc.config import Limits
from dcpsvc.storage.cargo import Cargo, Earlier
from dcpsvc.storage.objectstore import ObjectStore
from dcpsvc.storage.rates import ANEW, KNOWN, Rates

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from scripted_s3 import Handler

PART = 5 * MIB
HALF = KNOWN + 2
CONTENT = b"".join(bytes([number]) * PART for number in range(2 * HALF))
SECOND_HALF = Earlier("earlier", ((HALF * PART, len(CONTENT)),))
ALL = Earlier("earlier", ((0, len(CONTENT)),))
SEND_S = 1.0


class Server(ScriptedS3):
    """Parts take their time, by its own clock.

    Attributes:
        copy_s: What copying one takes.
        now: Its clock.
    """

    copy_s = 0.0
    now = 0.0

    def clock(self) -> float:
        return self.now


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        running.compares_md5 = True
        yield running


def takes_its_time(handler: Handler) -> None:
    server = handler.server
    assert isinstance(server, Server)
    if "partNumber" in handler.path:
        server.now += server.copy_s if "x-amz-copy-source" in handler.headers else SEND_S
    handler.truthful()


@pytest.fixture
def limits() -> Limits:
    return Limits(part_nbytes=PART, concurrency=1)


@pytest.fixture
def copied(server: Server, tmp_path: Path, limits: Limits) -> Callable[[str, Earlier], int]:
    """Parts that were copied when the file went to a key; what it is there was looked at."""
    server.objects["run/earlier"] = CONTENT
    server.faults.extend([takes_its_time] * 1000)
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    store = ObjectStore("s3://bucket/run", server.options(), limits=limits)
    store._wire._rates = Rates(server.clock)

    def carry(key: str, earlier: Earlier) -> int:
        carried = store.carry(key, Cargo(path=path, earlier=earlier))
        assert carried.proven
        assert server.objects.pop(f"run/{key}") == CONTENT
        return carried.copied_nbytes // PART

    return carry


def test_what_is_copied_in_less_time_than_it_takes_to_send_it_is_always_copied(
    server: Server, copied: Callable[[str, Earlier], int]
) -> None:
    server.copy_s = 0.9 * SEND_S
    assert [copied("a", SECOND_HALF), copied("b", ALL), copied("c", ALL)] == [HALF, 2 * HALF, 2 * HALF]


def test_where_copying_takes_longer_than_sending_the_rest_is_sent_but_for_a_part_now_and_then(
    server: Server, copied: Callable[[str, Earlier], int]
) -> None:
    server.copy_s = 1.1 * SEND_S
    assert copied("a", SECOND_HALF) == KNOWN
    assert copied("b", ALL) == (HALF - KNOWN + 2 * HALF) // ANEW


@pytest.mark.parametrize("limits", [Limits(part_nbytes=PART, concurrency=1, nbytes_per_s=2**40)])
def test_where_a_limit_is_set_to_what_is_sent_all_that_is_unchanged_is_copied(
    server: Server, copied: Callable[[str, Earlier], int]
) -> None:
    server.copy_s = 1.1 * SEND_S
    assert [copied("a", SECOND_HALF), copied("b", ALL)] == [HALF, 2 * HALF]


def test_copying_that_has_become_faster_is_found_out(server: Server, copied: Callable[[str, Earlier], int]) -> None:
    server.copy_s = 2.0 * SEND_S
    assert copied("a", SECOND_HALF) == KNOWN
    server.copy_s = 0.5 * SEND_S
    needed = next(number for number in range(ANEW) if copied(f"b{number}", ALL) == 2 * HALF)
    assert 0 < needed <= ANEW * KNOWN // (2 * HALF)

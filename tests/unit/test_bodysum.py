"""Checksums for the server: those of standards, and that of a whole from those of its parts."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcpsvc.storage import bodysum
from dcpsvc.storage.bodysum import Md5, candidates, crc32, crc32c

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.storage.bodysum import Crc


def test_md5_is_what_the_standard_says() -> None:
    assert Md5().of(b"hello world") == "XrY7u+Ae7tCTyyK7j1rNww=="


def test_md5_is_always_there_to_fall_back_on() -> None:
    assert isinstance(candidates()[-1], Md5)


def test_crc32_is_what_the_standard_says() -> None:
    assert crc32().of(b"123456789") == "y/Q5Jg=="  # CBF43926


def test_crc32c_is_what_the_standard_says() -> None:
    pytest.importorskip("crc32c")
    assert crc32c().of(b"123456789") == "4waSgw=="  # E3069283


def test_without_a_package_for_crc32c_that_of_the_standard_library_is_tried_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bodysum.util, "find_spec", lambda name: None)
    assert [kind.field for kind in candidates()] == ["ChecksumCRC32", ""]


@pytest.mark.parametrize("make", [crc32, crc32c])
@given(sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=5), seed=st.integers())
def test_the_checksum_of_a_whole_follows_from_its_parts(make: Callable[[], Crc], sizes: list[int], seed: int) -> None:
    if make is crc32c:
        pytest.importorskip("crc32c")
    kind = make()
    parts = [random.Random(seed + number).randbytes(nbytes) for number, nbytes in enumerate(sizes)]
    possible = kind.whole([(kind.of(part), len(part)) for part in parts])[kind.field]
    assert kind.of(b"".join(parts)) in possible
    assert kind.of(b"".join(parts) + b"x") not in possible

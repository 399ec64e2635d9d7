"""Checksums for the server: those of standards, and that of a whole from those of its parts."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcpsvc.storage.bodysum import Md5, candidates


def test_md5_is_what_the_standard_says() -> None:
    assert Md5().of(b"hello world") == "XrY7u+Ae7tCTyyK7j1rNww=="


def test_md5_is_always_there_to_fall_back_on() -> None:
    assert isinstance(candidates()[-1], Md5)


def test_crc32c_is_what_the_standard_says() -> None:
    bodysum = pytest.importorskip("dcpsvc.storage.bodysum")
    pytest.importorskip("crc32c")
    assert bodysum.Crc32c().of(b"123456789") == "4waSgw=="  # E3069283


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=5), st.integers())
def test_the_checksum_of_a_whole_follows_from_its_parts(sizes: list[int], seed: int) -> None:
    pytest.importorskip("crc32c")
    kind = candidates()[0]
    parts = [random.Random(seed + number).randbytes(nbytes) for number, nbytes in enumerate(sizes)]
    possible = kind.whole([(kind.of(part), len(part)) for part in parts])["ChecksumCRC32C"]
    assert kind.of(b"".join(parts)) in possible
    assert kind.of(b"".join(parts) + b"x") not in possible

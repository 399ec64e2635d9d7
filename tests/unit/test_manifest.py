"""A checkpoint exists exactly when its manifest parses: so what parses is whole, and what is not whole does not."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcpsvc.errors import ManifestError
from dcpsvc.format import keys, manifest
from dcpsvc.format.keys import Attempt
from dcpsvc.format.manifest import LayoutRef, Manifest
from tests.unit.small_manifest import PATH, SMALL, content, record

digests = st.from_regex(r"[0-9a-f]{32}", fullmatch=True)
attempts = st.builds(Attempt, st.integers(0, keys.MAX_STEP), st.from_regex(r"[0-9a-z]{1,12}(-[0-9])?", fullmatch=True))
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    attempt = draw(attempts)
    bodies = draw(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=4))
    return Manifest(
        run_id=draw(st.from_regex(r"[0-9a-z]{1,8}", fullmatch=True)),
        step=attempt.step,
        attempt=attempt.attempt,
        created=draw(st.sampled_from(["2026-01-31T23:59:59Z", "2026-01-31T23:59:59.123Z"])),
        shards=tuple(record(attempt, rank, body_nbytes=n, digest=draw(digests)) for rank, n in enumerate(bodies)),
        layout=LayoutRef(digest=draw(digests), nbytes=draw(st.integers(0, 1 << 40))),
        metrics=draw(st.dictionaries(words, st.floats(), max_size=4)),
        versions=draw(st.dictionaries(words, words, max_size=3)),
    )


@given(manifests())
def test_a_manifest_reads_back_as_it_was_written(written: Manifest) -> None:
    read = manifest.loads(written.key.manifest, written.dumps())
    assert replace(read, metrics={}) == replace(written, metrics={})
    assert {name: repr(value) for name, value in read.metrics.items()} == {
        name: repr(value) for name, value in written.metrics.items()
    }
    assert read.nbytes == sum(shard.nbytes for shard in written.shards)


@given(manifests())
def test_a_manifest_is_json_that_any_reader_accepts(written: Manifest) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    fields = json.loads(written.dumps(), parse_constant=refuse)
    assert fields["world_size"] == len(fields["shards"]) == written.world_size


def test_a_manifest_cut_short_anywhere_is_no_checkpoint() -> None:
    data = SMALL.dumps()
    assert data.endswith(b"}\n")
    for end in range(len(data) - 1):  # without its last newline it is still whole
        with pytest.raises(ManifestError) as caught:
            manifest.loads(PATH, data[:end])
        assert caught.value.path == PATH


@pytest.mark.parametrize(
    "path", [Attempt(8, "cafe-0").manifest, Attempt(7, "cafe-1").manifest, f"/{PATH}", "manifests/x.json", ""]
)
def test_a_manifest_under_another_name_is_refused(path: str) -> None:
    with pytest.raises(ManifestError, match=r"its content says step-000000000007.cafe-0"):
        manifest.loads(path, SMALL.dumps())


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b"7", b'"x"', b"\xff\xfe", b"{", b"{}{}", b"[" * 100_000])
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(ManifestError) as caught:
        manifest.loads(PATH, data)
    assert caught.value.path == PATH


@given(st.binary() | st.text().map(str.encode))
def test_arbitrary_bytes_are_only_ever_a_manifest_error(data: bytes) -> None:
    with pytest.raises(ManifestError):
        manifest.loads(PATH, data)


@given(at=st.integers(0, len(SMALL.dumps()) - 1), byte=st.integers(0, 255))
def test_a_damaged_byte_changes_nothing_or_is_noticed(at: int, byte: int) -> None:
    data = bytearray(SMALL.dumps())
    data[at] = byte
    try:
        found = manifest.loads(PATH, bytes(data))
    except ManifestError:
        return
    assert found == SMALL


@pytest.mark.parametrize("name", sorted(content()))
def test_a_field_changed_without_the_seal_is_noticed(name: str) -> None:
    with pytest.raises(ManifestError) as caught:
        manifest.loads(PATH, json.dumps(json.loads(SMALL.dumps()) | {name: "x"}).encode())
    assert caught.value.path == PATH


@pytest.mark.parametrize("seal", [None, "", "00" * 16, 7, "AB" * 16])
def test_a_manifest_without_its_seal_is_refused(seal: Any) -> None:
    with pytest.raises(ManifestError) as caught:
        manifest.loads(PATH, json.dumps(content() | ({"digest": seal} if seal is not None else {})).encode())
    assert caught.value.path == PATH


def test_a_manifest_written_with_other_spaces_is_the_same_checkpoint() -> None:
    assert manifest.loads(PATH, json.dumps(json.loads(SMALL.dumps())).encode()) == SMALL

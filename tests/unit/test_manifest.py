"""A checkpoint exists exactly when its manifest parses: so what parses is whole, and what is not whole does not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcpsvc.errors import ManifestError
from dcpsvc.format import keys, manifest
from dcpsvc.format.digest import BLOCK_NBYTES, table_nbytes
from dcpsvc.format.keys import Attempt
from dcpsvc.format.manifest import LayoutRef, Manifest, ShardRecord

digests = st.from_regex(r"[0-9a-f]{32}", fullmatch=True)
attempts = st.builds(Attempt, st.integers(0, keys.MAX_STEP), st.from_regex(r"[0-9a-z]{1,12}(-[0-9])?", fullmatch=True))
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def record(attempt: Attempt, rank: int, *, body_nbytes: int = 5000, digest: str = "ab" * 16) -> ShardRecord:
    nbytes = body_nbytes + table_nbytes(body_nbytes)
    return ShardRecord(rank=rank, path=attempt.shard(rank), nbytes=nbytes, body_nbytes=body_nbytes, digest=digest)


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


SMALL = Manifest(
    run_id="r1",
    step=7,
    attempt="cafe-0",
    created="2026-01-31T23:59:59Z",
    shards=tuple(record(Attempt(7, "cafe-0"), rank) for rank in range(2)),
    layout=LayoutRef(digest="01" * 16, nbytes=99),
    metrics={"loss": 0.5, "grad": math.inf},
    versions={"torch": "2.11"},
)
PATH = SMALL.key.manifest


def parsed(change: dict[str, Any] | None = None, shard: dict[str, Any] | None = None) -> Manifest:
    """What comes of the small manifest with some of its fields, or of its second shard's, replaced."""
    content = json.loads(SMALL.dumps()) | (change or {})
    if shard:
        content["shards"][1] |= shard
    return manifest.loads(PATH, json.dumps(content).encode())


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

    content = json.loads(written.dumps(), parse_constant=refuse)
    assert content["world_size"] == len(content["shards"]) == written.world_size


def test_a_manifest_cut_short_anywhere_is_no_checkpoint() -> None:
    data = SMALL.dumps()
    assert data.endswith(b"}\n")
    for end in range(len(data) - 1):  # without its last newline it is still whole
        with pytest.raises(ManifestError) as caught:
            manifest.loads(PATH, data[:end])
        assert caught.value.path == PATH


@pytest.mark.parametrize("name", sorted(json.loads(SMALL.dumps())))
def test_a_missing_field_is_named(name: str) -> None:
    content = json.loads(SMALL.dumps())
    del content[name]
    with pytest.raises(ManifestError, match=f"^{PATH}: field '{name}' is missing$"):
        manifest.loads(PATH, json.dumps(content).encode())


@pytest.mark.parametrize("name", ["rank", "path", "nbytes", "body_nbytes", "digest"])
def test_a_missing_field_of_a_shard_is_named(name: str) -> None:
    content = json.loads(SMALL.dumps())
    del content["shards"][1][name]
    with pytest.raises(ManifestError, match=f"field '{name}' is missing"):
        manifest.loads(PATH, json.dumps(content).encode())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", True), ("format", "1"), ("format", 1.0), ("format", 2), ("format", 0), ("format", None),
        ("run_id", 7), ("run_id", ""), ("run_id", None),
        ("step", True), ("step", 7.0), ("step", "7"), ("step", -1), ("step", 8), ("step", 10**12), ("step", None),
        ("attempt", 0), ("attempt", "cafe-1"), ("attempt", "../../x"), ("attempt", ""), ("attempt", None),
        ("created", 0), ("created", ""), ("created", "yesterday"), ("created", "2026-01-31"),
        ("created", "2026-01-31T23:59:59+01:00"), ("created", "2026-01-31T23:59:59Z\n"),
        ("world_size", True), ("world_size", 1), ("world_size", 3), ("world_size", "2"), ("world_size", 2.0),
        ("world_size", -1), ("world_size", 1 << 60),
        ("block_nbytes", True), ("block_nbytes", 1), ("block_nbytes", 2 * BLOCK_NBYTES), ("block_nbytes", None),
        ("layout", None), ("layout", []), ("layout", "x"), ("layout", {}), ("layout", {"digest": "01" * 16}),
        ("layout", {"digest": "../../x", "nbytes": 1}), ("layout", {"digest": "01" * 16, "nbytes": -1}),
        ("layout", {"digest": "01" * 16, "nbytes": True}), ("layout", {"digest": "01" * 16, "nbytes": 1 << 50}),
        ("layout", {"digest": "AB" * 16, "nbytes": 1}), ("layout", {"digest": f"{'01' * 16}\n", "nbytes": 1}),
        ("metrics", None), ("metrics", []), ("metrics", {"loss": None}), ("metrics", {"loss": True}),
        ("metrics", {"loss": "low"}), ("metrics", {"loss": "Infinity"}),
        ("versions", None), ("versions", "2.11"),
        ("shards", None), ("shards", {}), ("shards", []), ("shards", [None]), ("shards", [[]]), ("shards", "x"),
    ],
)  # fmt: skip
def test_a_field_that_makes_no_sense_is_refused_with_the_file_named(name: str, value: Any) -> None:
    with pytest.raises(ManifestError) as caught:
        parsed({name: value})
    assert caught.value.path == PATH


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", True), ("rank", 0), ("rank", 2), ("rank", -1), ("rank", "1"), ("rank", 1 << 60),
        ("path", "../../x"), ("path", "/etc/passwd"), ("path", f"/{SMALL.shards[1].path}"), ("path", ""), ("path", None),
        ("path", f"../other-run/{SMALL.shards[1].path}"), ("path", f"s3://bucket/{SMALL.shards[1].path}"),
        ("path", f"{SMALL.shards[1].path}\n"), ("path", PATH), ("path", "run.json"),
        ("nbytes", True), ("nbytes", -1), ("nbytes", 5000), ("nbytes", 5015), ("nbytes", 5017), ("nbytes", 1 << 60),
        ("body_nbytes", 4999), ("body_nbytes", 5016), ("body_nbytes", -1), ("body_nbytes", 5000.0), ("body_nbytes", 1 << 60),
        ("digest", ""), ("digest", 7), ("digest", "ab" * 15), ("digest", "AB" * 16), ("digest", "xy" * 16),
    ],
)  # fmt: skip
def test_a_shard_that_makes_no_sense_is_refused_with_the_file_named(name: str, value: Any) -> None:
    with pytest.raises(ManifestError) as caught:
        parsed(shard={name: value})
    assert caught.value.path == PATH


@pytest.mark.parametrize("order", [(1, 0), (0, 0), (1, 1), (0,), (1,), (0, 1, 1), (0, 1, 2)])
def test_the_shards_are_one_of_each_rank_in_order(order: tuple[int, ...]) -> None:
    shards = [record(SMALL.key, rank).to_json() for rank in order]
    with pytest.raises(ManifestError, match="shards are not one for each of 2 ranks, in order"):
        parsed({"shards": shards})


@pytest.mark.parametrize(
    "path", [Attempt(8, "cafe-0").manifest, Attempt(7, "cafe-1").manifest, f"/{PATH}", "manifests/x.json", ""]
)
def test_a_manifest_under_another_name_is_refused(path: str) -> None:
    with pytest.raises(ManifestError, match="its content says step-000000000007.cafe-0"):
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


@given(st.data())
def test_a_damaged_byte_gives_the_same_checkpoint_or_a_manifest_error(data: st.DataObject) -> None:
    content = bytearray(SMALL.dumps())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = manifest.loads(PATH, bytes(content))
    except ManifestError:
        return
    assert (found.key, found.world_size) == (SMALL.key, SMALL.world_size)
    assert all(keys.is_shard(shard.path) for shard in found.shards)


def test_what_a_later_version_adds_beside_our_fields_does_not_matter() -> None:
    assert parsed({"comment": {"any": ["thing"]}}) == SMALL

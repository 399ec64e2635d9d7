"""Names of objects: ours are recognised exactly, and nothing else is taken for ours."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dcpsvc.format import keys
from dcpsvc.format.keys import Attempt, Epoch

steps = st.integers(0, keys.MAX_STEP)
names = st.from_regex(r"[0-9a-z](?:[0-9a-z-]{0,62}[0-9a-z])?", fullmatch=True)
attempts = st.builds(Attempt, steps, names)
ranks = st.integers(0, 10**6)

GOOD_SHARD = "data/step-000000000500.cafe-0/rank-00003.safetensors"
GOOD_MANIFEST = "manifests/order-999999999499.step-000000000500.cafe-0.json"
GOOD_LAYOUT = f"layouts/{'0123456789abcdef' * 2}.json"

HOSTILE = [
    "",
    "/",
    "../../x",
    "/etc/passwd",
    "data/../../etc/passwd",
    f"/{GOOD_SHARD}",
    f"../{GOOD_SHARD}",
    f"other/{GOOD_SHARD}",
    f"{GOOD_SHARD}\n",
    f"{GOOD_SHARD}/",
    f"{GOOD_SHARD}\0",
    f" {GOOD_SHARD}",
    f"{GOOD_MANIFEST}\n",
    f"/{GOOD_MANIFEST}",
    f"{GOOD_LAYOUT}\n",
    f"../{GOOD_LAYOUT}",
    "data//step-000000000500.cafe-0/rank-00003.safetensors",
    "data/step-000000000500.cafe-0//rank-00003.safetensors",
    "data/step-000000000500.cafe-0/../rank-00003.safetensors",
    "data/step-000000000500.cafe-0/x/rank-00003.safetensors",
    "data/step-000000000500.../rank-00003.safetensors",
    "data/step-000000000500.ca/fe/rank-00003.safetensors",
    "data/step-000000000500./rank-00003.safetensors",
    "data/step-000000000500.-cafe/rank-00003.safetensors",
    "data/step-000000000500.cafe-/rank-00003.safetensors",
    "data/step-000000000500.CAFE/rank-00003.safetensors",
    f"data/step-000000000500.{'a' * 65}/rank-00003.safetensors",
    "data/step-500.cafe-0/rank-00003.safetensors",
    "data/step-0000000000500.cafe-0/rank-00003.safetensors",
    "data/step--00000000500.cafe-0/rank-00003.safetensors",
    "data/step-٠٠٠٠٠٠٠٠٠٥٠٠.cafe-0/rank-00003.safetensors",  # noqa: RUF001 - digits, but not ours
    "data/step-00000000050०.cafe-0/rank-00003.safetensors",  # noqa: RUF001
    "data/step-00000000050².cafe-0/rank-00003.safetensors",
    "data/step-000000000500.cafe-0/rank-3.safetensors",
    "data/step-000000000500.cafe-0/rank-0003.safetensors",
    "data/step-000000000500.cafe-0/rank-0000३.safetensors",
    "data/step-000000000500.cafe-0/rank--0003.safetensors",
    "data/step-000000000500.cafe-0/rank-00003.safetensors.tmp",
    "data/step-000000000500.cafe-0/rank-00003.pt",
    "manifests/order-999999999499.step-000000000500.cafe-0",
    "manifests/order-999999999499.step-000000000500.cafe-0.json.tmp",
    "manifests/x/order-999999999499.step-000000000500.cafe-0.json",
    "manifests/order-999999999499.step-000000000500.json",
    "manifests/order-999999999498.step-000000000500.cafe-0.json",
    "manifests/step-000000000500.cafe-0.json",
    "manifests\\order-999999999499.step-000000000500.cafe-0.json",
    "layouts/0123456789ABCDEF0123456789ABCDEF.json",
    "layouts/0123456789abcdef.json",
    f"layouts/{'0' * 33}.json",
    f"layouts/{'٠' * 32}.json",  # noqa: RUF001
    "layouts/../run.json",
    "run.json",
    "probes/cafe-00000",
]


@given(attempts, ranks)
@example(Attempt(0, "0"), 0)
@example(Attempt(keys.MAX_STEP, "a" * 64), 99_999)
def test_every_key_of_an_attempt_leads_back_to_it(attempt: Attempt, rank: int) -> None:
    for key in (attempt.manifest, attempt.tombstone, attempt.shard(rank)):
        assert keys.attempt_of(key) == attempt
    assert keys.attempt_below(attempt.shard(rank)) == attempt
    assert keys.attempt_below(f"{attempt.data}anything at all") == attempt
    assert attempt.shard(rank).startswith(attempt.data)


@given(attempts, ranks)
def test_a_shard_is_a_shard_and_nothing_else_is(attempt: Attempt, rank: int) -> None:
    assert keys.is_shard(attempt.shard(rank))
    assert not keys.is_layout(attempt.shard(rank))
    assert not any(keys.is_shard(key) for key in (attempt.manifest, attempt.tombstone, attempt.data))


@given(st.from_regex(r"[0-9a-f]{32}", fullmatch=True))
def test_a_layout_key_is_known_by_its_digest(digest: str) -> None:
    assert keys.is_layout(keys.layout(digest))
    assert keys.attempt_of(keys.layout(digest)) is None


@pytest.mark.parametrize("key", HOSTILE)
def test_a_name_that_is_not_ours_is_never_taken_for_ours(key: str) -> None:
    assert keys.attempt_of(key) is None
    assert not keys.is_shard(key)
    assert not keys.is_layout(key)


@given(st.text())
def test_whatever_is_taken_for_a_shard_stays_below_its_attempt(key: str) -> None:
    if keys.is_shard(key):
        assert ".." not in key.split("/")
        assert keys.attempt_of(key) == keys.attempt_below(key)


@pytest.mark.parametrize("key", [GOOD_MANIFEST, "layouts/x", "data/x/y", "x/data/"])
def test_only_a_data_folder_is_a_folder_of_an_attempt(key: str) -> None:
    assert keys.attempt_below(key) is None


@given(st.lists(attempts, min_size=2))
def test_attempts_sort_by_step_and_their_manifests_with_the_newest_first_behind_the_claims(
    found: list[Attempt],
) -> None:
    assert [attempt.step for attempt in sorted(found)] == sorted(attempt.step for attempt in found)
    assert [a.step for a in sorted(found)] == [a.step for a in sorted(found, key=lambda a: a.manifest, reverse=True)]
    assert min(attempt.manifest for attempt in found) > Epoch(keys.MAX_EPOCH, "ffffffff").inheritance


def test_the_example_in_the_documentation_is_what_we_write() -> None:
    attempt = Attempt(500, "cafe-0")
    assert attempt.manifest == GOOD_MANIFEST
    assert attempt.shard(3) == GOOD_SHARD
    assert keys.is_shard(GOOD_SHARD)
    assert keys.is_layout(GOOD_LAYOUT)

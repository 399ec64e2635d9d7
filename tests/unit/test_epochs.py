"""Claims and inheritances: what they say comes back; a damaged or hostile one is refused before it says anything."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dcpsvc.errors import FormatError
from dcpsvc.format import epochs, keys
from dcpsvc.format.epochs import Claim, Inheritance
from dcpsvc.format.keys import NO_EPOCH, Attempt, Epoch
from dcpsvc.format.seal import seal

tokens = st.from_regex(r"[0-9a-f]{8}", fullmatch=True)
numbers = st.integers(1, keys.MAX_EPOCH)
some_epochs = st.builds(Epoch, numbers, tokens)
steps = st.integers(0, keys.MAX_STEP)
ours = st.builds(lambda epoch, step, number: epoch.attempt(step, number), some_epochs, steps, st.integers(0, 99))
foreign = st.builds(Attempt, steps, st.from_regex(r"[g-z][0-9a-z]{1,12}(-[0-9])?", fullmatch=True))
attempts = st.one_of(ours, foreign)

EPOCH = Epoch(7, "cafecafe")
CLAIM = Claim(epoch=EPOCH, host="node-17", pid=4321, created="2026-01-31T23:59:59.000Z")
LIST = Inheritance(epoch=EPOCH, attempts=frozenset({Epoch(6, "beefbeef").attempt(500, 0), Attempt(400, "old-0")}))
SEVEN = "\N{ARABIC-INDIC DIGIT SEVEN}"
HOSTILE_KEYS = [
    "/etc/passwd", "../../etc/passwd", "manifests/../../x.json",
    "manifests/order-999999999499.step-000000000500.6-beefbeef-0.json\n",
    "data/step-000000000500.6-beefbeef-0/rank-00000.safetensors", "tombstones/step-000000000500.6-beefbeef-0.json",
    "manifests/epochs/00000007.cafecafe.json", "run.json", "", None, 7, True, [], {}, ["x"], 1.5,
]  # fmt: skip


def changed(data: bytes, change: dict[str, Any]) -> bytes:
    """A sealed document with some fields replaced, sealed anew; a field that becomes ``...`` goes."""
    fields = json.loads(data) | change
    del fields["digest"]
    return seal({name: value for name, value in fields.items() if value is not ...})


# --- names ------------------------------------------------------------------------------------------


@given(some_epochs)
def test_the_names_of_an_epoch_lead_back_to_it_and_to_nothing_else(epoch: Epoch) -> None:
    assert keys.epoch_of(epoch.claim) == (epoch, False)
    assert keys.epoch_of(epoch.inheritance) == (epoch, True)
    for key in (epoch.claim, epoch.inheritance):
        assert key.startswith(keys.EPOCHS)
        assert keys.attempt_of(key) is None


@given(some_epochs, steps, st.integers(0, 10**6))
def test_an_attempt_tells_which_start_of_the_job_made_it(epoch: Epoch, step: int, number: int) -> None:
    attempt = epoch.attempt(step, number)
    assert attempt.epoch == epoch
    assert keys.attempt_of(attempt.manifest) == attempt


@pytest.mark.parametrize(
    "attempt",
    ["cafe-0", "e1206641-0", "0-cafecafe-0", "07-cafecafe-0", "7-CAFECAFE-0", "7-cafecaf-0", "7-cafecafe",
     "-7-cafecafe-0", "7-cafecafe-x", "123456789-cafecafe-0", f"{SEVEN}-cafecafe-0", "7-cafecafe-0-0", ""],
)  # fmt: skip
def test_an_attempt_with_another_name_is_of_no_start_of_ours(attempt: str) -> None:
    assert Attempt(5, attempt).epoch == NO_EPOCH


@pytest.mark.parametrize(
    "key",
    ["manifests/epochs/7.cafecafe.json", "manifests/epochs/00000007.cafecafe.json\n", "epochs/00000007.cafecafe.json",
     "manifests/epochs/00000007.CAFECAFE.json", "manifests/epochs/00000007.cafecafe.inherited", "manifests/epochs/",
     "manifests/epochs/00000007.cafecafe.inherited.json.tmp", f"manifests/epochs/0000000{SEVEN}.cafecafe.json",
     "manifests/epochs/100000007.cafecafe.json", "manifests/epochs/../00000007.cafecafe.json", "run.json", ""],
)  # fmt: skip
def test_a_name_that_is_not_ours_is_no_epoch(key: str) -> None:
    assert keys.epoch_of(key) is None


@given(st.lists(some_epochs, min_size=2))
def test_of_two_starts_the_larger_number_is_the_newer_and_the_token_breaks_a_tie(found: list[Epoch]) -> None:
    assert max(found) == max(found, key=lambda epoch: (epoch.number, epoch.token))
    assert all(epoch > NO_EPOCH for epoch in found)


# --- documents --------------------------------------------------------------------------------------


@given(st.builds(Claim, epoch=some_epochs, host=st.just("h"), pid=st.integers(0, 2**31), created=st.just("now")))
def test_a_claim_reads_back_as_it_was_written(claim: Claim) -> None:
    assert epochs.load_claim(claim.epoch.claim, claim.dumps()) == claim


@given(st.builds(Inheritance, epoch=some_epochs, attempts=st.frozensets(attempts, max_size=5)))
@example(Inheritance(epoch=EPOCH, attempts=frozenset()))
def test_an_inheritance_reads_back_as_it_was_written(inheritance: Inheritance) -> None:
    assert epochs.load_inheritance(inheritance.epoch.inheritance, inheritance.dumps()) == inheritance


def test_a_claim_names_job_host_and_process_to_people() -> None:
    assert str(CLAIM) == "job cafecafe (epoch 7, process 4321 on node-17, 2026-01-31T23:59:59.000Z)"


@pytest.mark.parametrize("load", [epochs.load_claim, epochs.load_inheritance])
@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[]", b"7", b"\xff\xfe", b"{", b"{}{}", b"{}", b"[" * 100_000, b'{"a":' * 100_000, b"NaN",
     b"9" * 9999],
    ids=lambda data: repr(data[:9]),
)  # fmt: skip
def test_what_is_no_sealed_json_object_is_refused(load: Any, data: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        load(EPOCH.claim, data)
    assert caught.value.path == EPOCH.claim


@pytest.mark.parametrize(
    ("load", "key", "data"),
    [
        (epochs.load_claim, EPOCH.claim, CLAIM.dumps()),
        (epochs.load_inheritance, EPOCH.inheritance, LIST.dumps()),
    ],
    ids=["claim", "inheritance"],
)
def test_one_that_is_cut_short_or_has_a_flipped_bit_is_refused(load: Any, key: str, data: bytes) -> None:
    whole = load(key, data)
    for at in range(len(data) - 1):  # without its last newline it is still whole
        with pytest.raises(FormatError):
            load(key, data[:at])
        flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        try:
            read = load(key, flipped)
        except FormatError:
            continue
        assert read == whole, at  # white space


@pytest.mark.parametrize("other", [Epoch(8, "cafecafe"), Epoch(7, "cafecaff"), Epoch(70, "cafecafe")])
def test_one_under_the_name_of_another_epoch_is_refused(other: Epoch) -> None:
    with pytest.raises(FormatError, match="its content says epoch 7"):
        epochs.load_claim(other.claim, CLAIM.dumps())
    with pytest.raises(FormatError, match="its content says epoch 7"):
        epochs.load_inheritance(other.inheritance, LIST.dumps())


@pytest.mark.parametrize("key", ["manifests/epochs/x.json", "run.json", "", "../00000007.cafecafe.json"])
def test_one_under_a_name_that_is_not_ours_is_refused(key: str) -> None:
    with pytest.raises(FormatError):
        epochs.load_claim(key, CLAIM.dumps())
    with pytest.raises(FormatError):
        epochs.load_inheritance(key, LIST.dumps())


def test_a_claim_is_no_inheritance_and_the_other_way_round() -> None:
    with pytest.raises(FormatError, match="inherited"):
        epochs.load_inheritance(EPOCH.inheritance, CLAIM.dumps())
    with pytest.raises(FormatError, match="host"):
        epochs.load_claim(EPOCH.claim, LIST.dumps())


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"format": "1"}, {"format": ...}, {"epoch": 7.0}, {"epoch": "7"}, {"epoch": True}, {"epoch": -7},
     {"epoch": 10**400}, {"token": 7}, {"token": "CAFECAFE"}, {"token": ...}],
)  # fmt: skip
def test_a_sealed_field_that_makes_no_sense_is_refused_in_both(change: dict[str, Any]) -> None:
    for load, key, data in (
        (epochs.load_claim, EPOCH.claim, CLAIM.dumps()),
        (epochs.load_inheritance, EPOCH.inheritance, LIST.dumps()),
    ):
        with pytest.raises(FormatError):
            load(key, changed(data, change))


@pytest.mark.parametrize(
    "change",
    [{"host": "a\nb"}, {"host": "\x1b[31m"}, {"host": "\u202egnp"}, {"host": 7}, {"host": ...}, {"pid": -1},
     {"pid": 2**40}, {"pid": "1"}, {"created": "\r\n"}, {"created": None}],
)  # fmt: skip
def test_a_claim_cannot_put_anything_into_a_log_that_is_not_printable(change: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        epochs.load_claim(EPOCH.claim, changed(CLAIM.dumps(), change))


def test_a_claim_shows_a_bounded_part_of_what_it_says() -> None:
    read = epochs.load_claim(EPOCH.claim, changed(CLAIM.dumps(), {"host": "h" * 10_000, "created": "t" * 10_000}))
    assert len(str(read)) < 400


@pytest.mark.parametrize("key", HOSTILE_KEYS, ids=repr)
def test_an_inheritance_names_manifests_of_ours_and_nothing_else(key: Any) -> None:
    good = [attempt.manifest for attempt in sorted(LIST.attempts)]
    with pytest.raises(FormatError, match="no manifest"):
        epochs.load_inheritance(EPOCH.inheritance, changed(LIST.dumps(), {"inherited": [*good, key]}))


@pytest.mark.parametrize(
    "inherited", [None, {}, "manifests/order-999999999499.step-000000000500.6-beefbeef-0.json", 7, ...]
)
def test_an_inheritance_without_a_list_is_refused(inherited: Any) -> None:
    with pytest.raises(FormatError, match="inherited"):
        epochs.load_inheritance(EPOCH.inheritance, changed(LIST.dumps(), {"inherited": inherited}))


# --- what counts ------------------------------------------------------------------------------------


@given(st.builds(Inheritance, epoch=some_epochs, attempts=st.frozensets(attempts, max_size=5)), attempts)
def test_an_attempt_counts_if_it_is_named_or_newer_or_of_no_start_of_ours(inherited: Inheritance, one: Attempt) -> None:
    named = replace(inherited, attempts=inherited.attempts | {one})
    unnamed = replace(inherited, attempts=inherited.attempts - {one})
    assert named.counts(one)
    assert unnamed.counts(one) == (one.epoch == NO_EPOCH or one.epoch >= inherited.epoch)


@pytest.mark.parametrize(
    ("epoch", "counts"),
    [
        (Epoch(6, "ffffffff"), False),
        (Epoch(7, "cafecafd"), False),
        (Epoch(7, "cafecafe"), True),
        (Epoch(7, "cafecaff"), True),
        (Epoch(8, "00000000"), True),
        (Epoch(10, "00000000"), True),
    ],
)
def test_who_claimed_later_is_decided_by_number_then_token(epoch: Epoch, counts: bool) -> None:  # noqa: FBT001
    assert LIST.counts(epoch.attempt(500, 0)) is counts

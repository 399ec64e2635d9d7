"""One owner of a run root on a real S3 server: jobs that race, a zombie, and an upload that is finished."""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch

import dcpsvc
from dcpsvc import fence
from dcpsvc.errors import FencedError, RunBusyError
from dcpsvc.format import keys
from dcpsvc.format.epochs import Claim
from dcpsvc.format.keys import Attempt, Epoch
from dcpsvc.ranks.rendezvous import DisagreementError
from dcpsvc.settling import Settled, settle
from dcpsvc.stages import commit, discover
from dcpsvc.storage.open import open_store
from dcpsvc.storage.posix import PosixStore
from dcpsvc.tiers import Tiers
from tests.unit.turns import MEETING, RUN_ID, at_once, manifest, put_journal, put_shards, solo

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dcpsvc.storage.base import Store
    from tests.s3.servers import Server

pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]

RACERS = 8
PATIENCE_S = 60.0


@pytest.fixture
def reopen(s3_server: Server) -> Callable[[], Store]:
    """Makes clients of one run root, each with connections of its own."""
    run_root = f"s3://{s3_server.bucket}/{uuid.uuid4().hex}/run"
    return lambda: open_store(run_root, s3_server.storage_options)


def describe(token: str) -> Callable[[int], Claim]:
    return lambda number: Claim(epoch=Epoch(number, token), host="h", pid=1, created="now")


def start(store: Store, token: str, disk: Path) -> Settled:
    return settle(solo(token), Tiers(run_id=RUN_ID, remote=store, local=PosixStore(disk), local_path=disk), MEETING)


def publish(store: Store, attempt: Attempt) -> commit.Published:
    """Upload an attempt, and write its manifest as a job of one rank does."""
    put_shards(store, attempt)
    return commit.publish(
        solo(attempt.epoch.token),
        f"save/{attempt}",
        manifest(attempt),
        store,
        meeting=MEETING,
        within=at_once,
        created=lambda: None,
    )


def all_at_once(work: Callable[[int], Any]) -> list[Any]:
    line = threading.Barrier(RACERS)

    def run(racer: int) -> Any:
        line.wait(PATIENCE_S)
        return work(racer)

    with ThreadPoolExecutor(RACERS) as pool:
        return list(pool.map(run, range(RACERS)))


def test_of_eight_jobs_that_claim_at_once_each_winner_has_its_own_epoch_and_the_largest_claim_is_a_winner_s(
    reopen: Callable[[], Store],
) -> None:
    stores = [reopen() for _ in range(RACERS)]
    for round_ in range(3):

        def claim(racer: int, round_: int = round_) -> Epoch | None:
            try:
                return fence.claim(stores[racer], describe(f"{round_:04x}{racer:04x}")).epoch
            except RunBusyError:
                return None

        epochs = [epoch for epoch in all_at_once(claim) if epoch is not None]
        assert len(set(epochs)) == len(epochs) > 0
        last = max(epochs)
        for epoch in epochs:
            assert fence.successor(stores[0], epoch) == ("" if epoch == last else fence.describe(stores[0], last))


def test_of_eight_jobs_that_start_at_once_and_save_what_was_confirmed_counts_and_nothing_else(
    reopen: Callable[[], Store], tmp_path: Path
) -> None:
    stores = [reopen() for _ in range(RACERS)]
    for round_ in range(3):

        def race(racer: int, round_: int = round_) -> tuple[Attempt, bool | None] | None:
            token = f"{round_:04x}{racer:04x}"
            try:
                settled = start(stores[racer], token, tmp_path / token)
            except DisagreementError as err:
                assert {failure.error for failure in err.failures} == {RunBusyError.__name__}  # noqa: PT017
                return None
            attempt = settled.epoch.attempt(100 * (round_ + 1) + racer, 0)
            try:
                published = publish(stores[racer], attempt)
            except DisagreementError as err:
                assert {failure.error for failure in err.failures} == {FencedError.__name__}  # noqa: PT017
                return attempt, False
            return attempt, None if published.unknown else True

        told = dict(answer for answer in all_at_once(race) if answer is not None)
        counting = {attempt for attempt in discover.committed(stores[0]) if attempt.step >= 100 * (round_ + 1)}
        assert {attempt for attempt, counts in told.items() if counts} <= counting
        assert not {attempt for attempt, counts in told.items() if counts is False} & counting
        assert told[max(told, key=lambda attempt: attempt.epoch)]


class Held:
    """A client that stops before a call to a manifest until it is let go."""

    def __init__(self, store: Store, call: str) -> None:
        self._store, self._held = store, call
        self.came, self.go = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        return found if name != self._held else lambda *args, **kwargs: self._wait(found, *args, **kwargs)

    def _wait(self, call: Callable[..., Any], key: str, *args: Any, **kwargs: Any) -> Any:
        if keys.attempt_of(key) is not None and not self.came.is_set():
            self.came.set()
            assert self.go.wait(PATIENCE_S)
        return call(key, *args, **kwargs)


@pytest.mark.parametrize("call", ["create", "get"])
def test_a_zombie_s_manifest_counts_if_it_stood_before_the_new_owner_looked_and_never_if_it_did_not(
    reopen: Callable[[], Store], tmp_path: Path, call: str
) -> None:
    attempt = start(reopen(), "aaaaaaaa", tmp_path / "old").epoch.attempt(10, 0)
    held: Any = Held(reopen(), call)
    with ThreadPoolExecutor(1) as pool:
        zombie = pool.submit(publish, held, attempt)
        assert held.came.wait(PATIENCE_S)
        settled = start(reopen(), "bbbbbbbb", tmp_path / "new")
        held.go.set()
        if call == "get":
            published = zombie.result(PATIENCE_S)
            assert published.unknown == ""
            assert "bbbbbbbb" in published.replaced
        else:
            with pytest.raises(DisagreementError) as caught:
                zombie.result(PATIENCE_S)
            assert [failure.error for failure in caught.value.failures] == [FencedError.__name__]
    expected = [attempt] if call == "get" else []
    assert list(settled.committed) == discover.committed(reopen()) == expected


def test_an_upload_that_was_cut_short_is_finished_and_every_byte_of_it_proven(
    reopen: Callable[[], Store], tmp_path: Path
) -> None:
    store, disk = reopen(), tmp_path / "disk"
    crashed = start(store, "aaaaaaaa", disk).epoch.attempt(20, 0)
    put_journal(PosixStore(disk), crashed, 3)
    put_shards(store, crashed, [1])
    settled = start(reopen(), "bbbbbbbb", disk)
    assert settled.recovered == settled.committed == (crashed,)
    assert discover.valid(store, crashed) == manifest(crashed, 3)
    for rank in range(3):
        assert store.get(crashed.shard(rank), max_nbytes=1000) == (disk / crashed.shard(rank)).read_bytes()


def test_a_second_checkpointer_takes_over_and_the_first_is_told_so(s3_server: Server, tmp_path: Path) -> None:
    root = f"s3://{s3_server.bucket}/{uuid.uuid4().hex}/run"

    def opened(name: str) -> dcpsvc.Checkpointer:
        state = {"x": torch.zeros(4)}
        return dcpsvc.Checkpointer(
            root, state, local=tmp_path / name, storage_options=s3_server.storage_options, save_last=False
        )

    first = opened("first")
    first.save(1).wait(PATIENCE_S)
    with opened("second") as second:
        assert second.resume() == 1
        with pytest.raises(FencedError, match="was replaced by job"):
            first.save(2).wait(PATIENCE_S)
        second.save(2).wait(PATIENCE_S)
        with pytest.raises(FencedError):
            first.close()
    found = dcpsvc.list_checkpoints(root, storage_options=s3_server.storage_options)
    assert [(one.step, one.state) for one in found] == [(1, "committed"), (2, "committed")]

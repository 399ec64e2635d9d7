"""What finding and loading a checkpoint asks of a real server: counted on the wire."""

from __future__ import annotations

import contextlib
import re
import threading
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

import dcpsvc
from dcpsvc import fence
from dcpsvc.format.epochs import Claim
from dcpsvc.format.keys import Epoch
from dcpsvc.stages import discover
from dcpsvc.storage.nodeturns import NodeTurns
from dcpsvc.storage.open import open_store
from dcpsvc.storage.scatter import PIECE_NBYTES
from dcpsvc.tools.verifying import verify
from tests.ranks.harness import run_ranks, values
from tests.ranks.models import Training, checkpointer
from tests.s3.spoiling import Proxy, passes
from tests.unit.turns import manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.s3.servers import Server
    from tests.s3.spoiling import Spoiler


pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]

S3_NAMES = 1000
"""That a server gives in one answer to a LIST."""

A_PAGE, COMMITS, WIDTH = 990, 1000, 700


def claim_of(token: str) -> Callable[[int], Claim]:
    return lambda number: Claim(epoch=Epoch(number, token), host="here", pid=1, created="now")


@pytest.fixture
def between(s3_server: Server) -> Iterator[Proxy]:
    with Proxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def options(s3_server: Server, between: Proxy) -> dict[str, object]:
    return {**s3_server.storage_options, "endpoint_url": between.endpoint}


@pytest.fixture
def run_root(s3_server: Server) -> str:
    return f"s3://{s3_server.bucket}/{uuid.uuid4().hex}/run"


def kinds(seen: list[str]) -> Counter[str]:
    """Requests by what they are for: ``GET data``, ``LIST manifests``."""
    found: Counter[str] = Counter()
    for line in seen:
        listed = re.search(r"prefix=[^&]*run%2F(\w+)", line)
        below = re.search(r"/run/(\w+)", line)
        named = f"LIST {listed[1]}" if listed else f"{line.split()[0]} {below[1] if below else line.split()[1]}"
        found[named] += 1
    return found


@pytest.mark.parametrize("restarts", [0, 2])
def test_the_newest_of_a_thousand_commits_and_of_more_is_found_in_one_listing_and_one_manifest(
    s3_server: Server, run_root: str, options: dict[str, object], between: Proxy, restarts: int
) -> None:
    writer = open_store(run_root, s3_server.storage_options)
    epochs = [fence.claim(writer, claim_of("cafecafe")).epoch]
    fence.inherit(writer, epochs[0], [])
    attempts = [epochs[0].attempt(step, 0) for step in range(1, A_PAGE)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda attempt: writer.create(attempt.manifest, manifest(attempt).dumps()), attempts))
    for _ in range(restarts):
        epochs.append(fence.claim(writer, claim_of("deadbeef")).epoch)
        fence.inherit(writer, epochs[-1], attempts)
    for step in range(A_PAGE, COMMITS + 3):
        attempts.append(epochs[-1].attempt(step, 0))
        writer.create(attempts[-1].manifest, manifest(attempts[-1]).dumps())
        if step in {A_PAGE, COMMITS, COMMITS + 2}:
            between.seen.clear()
            found = dcpsvc.latest(run_root, storage_options=options, checked=False)
            assert found is not None
            assert found.key == attempts[-1]
            assert kinds(between.seen) == {"LIST manifests": 1, "GET manifests": 1}
    between.seen.clear()
    assert discover.committed(open_store(run_root, options)) == attempts
    assert kinds(between.seen)["LIST manifests"] == -(-(len(attempts) + 2 * len(epochs)) // S3_NAMES)
    with pytest.raises(dcpsvc.RootError, match=r"run\.json is missing"):
        dcpsvc.latest(run_root + "-elsewhere", storage_options=options)


def test_a_checked_latest_looks_at_the_files_of_one_commit_only(
    s3_server: Server, run_root: str, options: dict[str, object], between: Proxy, tmp_path: Path
) -> None:
    for _ in range(2):
        state = {"n": [1]}
        with dcpsvc.Checkpointer(
            run_root, state, local=tmp_path, save_last=False, storage_options=s3_server.storage_options
        ) as ckpt:
            step = ckpt.resume()
            for more in (1, 2, 3):
                ckpt.save(step + more).wait(60)
    between.seen.clear()
    found = dcpsvc.latest(run_root, storage_options=options)
    assert found is not None
    assert found.step == 6
    once = {"LIST manifests": 1, "GET manifests": 1, "LIST data": 1, "LIST metrics": 1, "HEAD layouts": 1}
    assert kinds(between.seen) == once


def save(rank: int, world: int, root: str, local: Path, options: dict[str, object]) -> dict[str, str]:
    training = Training("ddp", rank, width=WIDTH, depth=5)
    training.train(1)
    with checkpointer(root, training.state, store=root, local=local, storage_options=options) as ckpt:
        ckpt.save(1).wait(60)
    return training.fingerprint()


def load(
    rank: int, world: int, root: str, options: dict[str, object], *, read_together: bool | None = None
) -> dict[str, str]:
    training = Training("ddp", rank, width=WIDTH, depth=5, seed=7)
    dcpsvc.load(root, training.state, storage_options=options, read_together=read_together)
    return training.fingerprint()


@pytest.mark.parametrize(("read_together", "times"), [(None, 1), (False, 3)])
def test_ranks_that_all_need_the_whole_checkpoint_get_its_bytes_from_the_server_once_unless_told_to_read_by_themselves(
    s3_server: Server, run_root: str, options: dict[str, object], between: Proxy, tmp_path: Path,
    *, read_together: bool | None, times: int,
) -> None:  # fmt: skip
    saved = values(run_ranks(3, save, run_root, tmp_path, s3_server.storage_options))
    stored = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    between.body_nbytes["received"] = 0
    assert values(run_ranks(3, partial(load, read_together=read_together), run_root, options)) == saved
    by_each_rank = 5 << 20  # the beginning and the end of two shards: documents
    assert times * (stored - (1 << 20)) <= between.body_nbytes["received"] <= times * stored + 3 * by_each_rank


def test_a_load_asks_for_each_small_file_once_and_for_each_piece_once(
    s3_server: Server, run_root: str, options: dict[str, object], between: Proxy, tmp_path: Path
) -> None:
    model = torch.nn.Linear(4096, 2048)
    with dcpsvc.Checkpointer(
        run_root, {"model": model}, local=tmp_path, save_last=False, storage_options=s3_server.storage_options
    ) as ckpt:
        ckpt.save(1).wait(60)
    loaded = torch.nn.Linear(4096, 2048)
    dcpsvc.load(run_root, {"model": loaded}, storage_options=options)
    assert torch.equal(loaded.weight, model.weight)
    asked = kinds(between.seen)
    pieces = -(-model.weight.nbytes // PIECE_NBYTES) + 1
    assert asked.pop("GET data") <= pieces + 2  # and the beginning and the end of the shard, for its documents
    assert asked == {
        "GET run": 1, "LIST manifests": 1, "GET manifests": 1, "LIST data": 1, "LIST metrics": 1,
        "GET layouts": 1, "PUT pins": 1, "DELETE pins": 1,
    }  # fmt: skip


def counting(most: list[int]) -> Callable[[Spoiler], None]:
    """A slow server that notes how many large answers were under way at once."""
    lock, under_way = threading.Lock(), 0

    def fault(spoiler: Spoiler) -> None:
        nonlocal under_way
        begin, _, end = spoiler.headers.get("Range", "").removeprefix("bytes=").partition("-")
        large = end and int(end) - int(begin) > 1 << 20
        with lock:
            under_way += bool(large)
            most.append(under_way)
        spoiler.server.over.wait(0.05)
        passes(spoiler)
        with lock:
            under_way -= bool(large)

    return fault


@pytest.fixture
def busy_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Others have all turns of this node but one."""
    monkeypatch.setenv("DCPSVC_LOCAL", str(tmp_path / "local"))
    turns = NodeTurns(tmp_path / "local" / "turns", 32)
    with contextlib.ExitStack() as taken:
        for _ in range(31):
            taken.enter_context(turns.turn())
        yield


@pytest.mark.usefixtures("busy_node")
@pytest.mark.parametrize("what", ["load", "verify"])
def test_what_reads_outside_a_job_keeps_to_what_its_node_may_do_at_once(
    run_root: str, options: dict[str, object], between: Proxy, what: str
) -> None:
    model, loaded = (torch.nn.Linear(4096, 4096, bias=False) for _ in range(2))
    with dcpsvc.Checkpointer(run_root, {"model": model}, storage_options=options) as ckpt:
        ckpt.save(1).wait(60)
    most: list[int] = []
    between.spoil("^GET .*/data/", counting(most), 1000)
    if what == "load":
        dcpsvc.load(run_root, {"model": loaded}, storage_options=options)
        assert torch.equal(loaded.weight, model.weight)
    else:
        store = open_store(run_root, options)
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda _: verify(store, discover.committed(store)), range(3)))
        assert all(one.problems == () for (one,) in found)
    assert max(most) == 1

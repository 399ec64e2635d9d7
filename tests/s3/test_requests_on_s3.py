"""What finding and loading a checkpoint asks of a real server: counted on the wire."""

from __future__ import annotations

import re
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch

import dcpsvc
from dcpsvc.format.keys import Attempt
from dcpsvc.stages import discover
from dcpsvc.storage.open import open_store
from dcpsvc.storage.scatter import PIECE_NBYTES
from tests.ranks.harness import run_ranks, values
from tests.ranks.models import Training, checkpointer
from tests.s3.spoiling import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.s3.servers import Server


pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]

COMMITS, WIDTH = 1000, 700


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


def test_the_newest_of_a_thousand_commits_is_found_in_two_requests(
    s3_server: Server, run_root: str, options: dict[str, object], between: Proxy
) -> None:
    writer = open_store(run_root, s3_server.storage_options)
    writer.put("manifests/epochs/00000001.cafecafe.json", b"{}")
    writer.put("manifests/epochs/00000001.cafecafe.inherited.json", b"{}")
    attempts = [Attempt(step, "1-cafecafe-0") for step in range(1, COMMITS + 1)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda attempt: writer.put(attempt.manifest, b"{}"), attempts))
    between.seen.clear()
    assert discover.committed(open_store(run_root, options))[-1] == attempts[-1]
    assert len(between.seen) <= 2


def save(rank: int, world: int, root: str, local: Path, options: dict[str, object]) -> dict[str, str]:
    training = Training("ddp", rank, width=WIDTH, depth=5)
    training.train(1)
    with checkpointer(root, training.state, store=root, local=local, storage_options=options) as ckpt:
        ckpt.save(1).wait(60)
    return training.fingerprint()


def load(rank: int, world: int, root: str, options: dict[str, object]) -> dict[str, str]:
    training = Training("ddp", rank, width=WIDTH, depth=5, seed=7)
    dcpsvc.load(root, training.state, storage_options=options)
    return training.fingerprint()


def test_ranks_that_all_need_the_whole_checkpoint_get_its_bytes_from_the_server_once(
    s3_server: Server, run_root: str, options: dict[str, object], between: Proxy, tmp_path: Path
) -> None:
    saved = values(run_ranks(3, save, run_root, tmp_path, s3_server.storage_options))
    stored = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    between.body_nbytes["received"] = 0
    assert values(run_ranks(3, load, run_root, options)) == saved
    by_each_rank = 5 << 20  # the beginning and the end of two shards: documents
    assert stored - (1 << 20) <= between.body_nbytes["received"] <= stored + 3 * by_each_rank


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
        "GET run": 1, "LIST manifests": 1, "GET manifests": 1, "LIST data": 1, "HEAD layouts": 1, "LIST metrics": 1,
        "GET layouts": 1, "PUT pins": 1, "DELETE pins": 1,
    }  # fmt: skip

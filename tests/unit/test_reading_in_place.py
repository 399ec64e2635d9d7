"""A module is read in place where reading twice is cheap: nothing is touched before all is proven, no copy is held."""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING, TypeVar

import pytest
import torch

import dcpsvc
from dcpsvc.errors import NoValidCheckpointError, RestoreFailedError
from dcpsvc.storage.posix import PosixStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from dcpsvc.events import Event

T = TypeVar("T")


def linear(value: float) -> torch.nn.Linear:
    model = torch.nn.Linear(1000, 700)
    with torch.no_grad():
        model.weight.fill_(value)
        model.bias.fill_(value)
    return model


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two steps of a model of 2.7 MiB, all ones and all twos."""
    model = linear(0.0)
    with dcpsvc.Checkpointer(tmp_path / "root", {"model": model}, local=tmp_path / "local", save_last=False) as ckpt:
        for step in (1, 2):
            with torch.no_grad():
                model.weight.fill_(float(step))
                model.bias.fill_(float(step))
            ckpt.save(step).wait(60)
    return tmp_path / "root"


class Watching(PosixStore):
    """Tells of every read what the model held just then, and may damage what it gives out from some read on."""

    def __init__(self, root: Path, model: torch.nn.Linear, damaged_from: int = 10**9) -> None:
        super().__init__(root)
        self.model, self.damaged_from, self.held, self.given_out = model, damaged_from, list[float](), 0

    def stream(self, key: str, begin: int, end: int, look: Callable[[Iterator[memoryview]], T]) -> T:
        return super().stream(key, begin, end, self.noted(end - begin, look))

    def stream_into(
        self,
        key: str,
        begin: int,
        views: Sequence[memoryview],
        look: Callable[[Iterator[memoryview]], T],
        *,
        once: bool = False,
    ) -> T:
        look = self.noted(sum(map(len, views)), look)
        return super().stream_into(key, begin, views, look, once=once)

    def noted(self, nbytes: int, look: Callable[[Iterator[memoryview]], T]) -> Callable[[Iterator[memoryview]], T]:
        self.held.append(self.model.weight[0, 0].item())
        self.given_out += nbytes
        damaged = len(self.held) >= self.damaged_from

        def passed_on(views: Iterator[memoryview]) -> Iterator[memoryview]:
            for view in views:
                view[0] ^= damaged
                yield view

        return lambda views: look(passed_on(views))


def test_the_model_s_own_memory_is_what_is_read_into(root: Path) -> None:
    model = linear(0.0)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    store = Watching(root, model)
    assert dcpsvc.load(store, {"model": model}) == 2
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert torch.equal(model.weight, torch.full((700, 1000), 2.0))
    assert torch.equal(model.bias, torch.full((700,), 2.0))
    assert store.given_out > 2 * model.weight.nbytes


def test_where_reading_twice_is_dear_it_is_read_once(root: Path) -> None:
    given_out = []
    for cached in (True, False):
        model = linear(0.0)
        store = Watching(root, model)
        store.cached = cached
        assert dcpsvc.load(store, {"model": model}) == 2
        assert torch.equal(model.weight, torch.full((700, 1000), 2.0))
        given_out.append(store.given_out)
    assert set(store.held) == {0.0}
    assert given_out[0] - given_out[1] >= model.weight.nbytes


def resume_beside_a_far_root(tmp_path: Path, root: Path) -> tuple[torch.nn.Linear, Watching, Callable[[], str]]:
    """A model, the run root as a store far away, and what resumes the model from the disk that saved it."""
    model = linear(0.0)
    far = Watching(root, model)
    far.cached = False

    def resume() -> str:
        told: list[Event] = []
        with dcpsvc.Checkpointer(
            far, {"model": model}, local=tmp_path / "local", save_last=False, on_event=told.append
        ) as ckpt:
            far.given_out = 0
            ckpt.resume()
        return next(event.detail for event in told if event.name == "resumed")

    return model, far, resume


def test_what_the_node_s_own_disk_has_is_read_in_place_also_where_the_root_is_far(tmp_path: Path, root: Path) -> None:
    model, far, resume = resume_beside_a_far_root(tmp_path, root)
    place = model.weight.data_ptr()
    read = re.search(r"read ([\d.]+) MiB from local disks;", resume())
    assert read
    assert float(read[1]) * 2**20 > 2 * model.weight.nbytes + model.weight.nbytes // 2  # proven, then in place
    assert far.given_out == 0
    assert model.weight.data_ptr() == place
    assert torch.equal(model.weight, torch.full((700, 1000), 2.0))


def test_a_shard_damaged_on_the_own_disk_and_far_away_is_refused_before_anything_is_touched(
    tmp_path: Path, root: Path
) -> None:
    model, far, resume = resume_beside_a_far_root(tmp_path, root)
    for shard in [*(tmp_path / "local").rglob("*.safetensors"), *root.rglob("*.safetensors")]:
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    with pytest.raises(NoValidCheckpointError):
        resume()
    assert set(far.held) == {0.0}
    assert torch.equal(model.weight, torch.zeros(700, 1000))


@pytest.mark.parametrize("cached", [True, False])
def test_damage_is_found_before_anything_is_touched(root: Path, *, cached: bool) -> None:
    model = linear(0.0)
    store = Watching(root, model, damaged_from=1)
    store.cached = cached
    with pytest.raises((RestoreFailedError, NoValidCheckpointError)):
        dcpsvc.load(store, {"model": model})
    assert torch.equal(model.weight, torch.zeros(700, 1000))


def test_a_damaged_newest_commit_is_passed_over_for_the_older_one(root: Path) -> None:
    shard = next(path for path in root.rglob("*.safetensors") if "step-000000000002" in str(path))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    model = linear(0.0)
    assert dcpsvc.load(root, {"model": model}) == 1
    assert torch.equal(model.weight, torch.ones(700, 1000))


def test_what_breaks_after_it_was_proven_says_that_the_state_was_changed_and_nothing_older_is_tried(root: Path) -> None:
    model = linear(0.0)
    proving = Watching(root, model)
    dcpsvc.load(proving, {"model": linear(0.0)})
    first_in_place = proving.held.index(0.0)
    store = Watching(root, model, damaged_from=len(proving.held) - first_in_place)
    with pytest.raises(RestoreFailedError, match="partly changed") as caught:
        dcpsvc.load(store, {"model": model})
    assert caught.value.changed


def test_a_load_from_a_directory_waits_for_no_disk_to_keep_its_lease_and_leaves_nothing_behind(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, leases, true, model = [], [], os.fsync, linear(0.0)

    class Looking(PosixStore):
        def stream(self, key: str, begin: int, end: int, look: Callable[[Iterator[memoryview]], T]) -> T:
            until = time.monotonic() + 30  # it is taken beside the reading
            while not leases and time.monotonic() < until:
                leases.extend((root / "pins").rglob("*.json"))
                time.sleep(0.001)
            return super().stream(key, begin, end, look)

    def fsync(fd: int) -> None:
        synced.append(fd)
        true(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    assert dcpsvc.load(Looking(root), {"model": model}) == 2
    assert leases
    assert not synced
    assert not list((root / "pins").rglob("*"))


def test_a_module_whose_memory_is_not_in_one_piece_is_loaded_too(root: Path) -> None:
    model = linear(0.0)
    model.weight = torch.nn.Parameter(torch.zeros(1000, 700).t())
    assert dcpsvc.load(root, {"model": model}) == 2
    assert torch.equal(model.weight, torch.full((700, 1000), 2.0))

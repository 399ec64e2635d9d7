"""Whatever a store answers to the one write that counts, no shard is deleted that a manifest names."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import dcpsvc
from dcpsvc import Checkpointer, fence
from dcpsvc.errors import (
    CommitUnknownError,
    FencedError,
    SaveFailedError,
    StepExistsError,
    StoreAccessError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
)
from dcpsvc.format import keys
from dcpsvc.format.epochs import Claim
from dcpsvc.format.keys import Epoch
from dcpsvc.ranks.rendezvous import RefusalError
from dcpsvc.stages import commit
from dcpsvc.storage.memory import MemoryStore
from dcpsvc.storage.posix import PosixStore
from tests.unit.small_manifest import PATH, SMALL

if TYPE_CHECKING:
    from collections.abc import Callable

PERMANENT = [StoreFullError, StoreAccessError, StoreError]
TRANSIENT = [StoreUnavailableError]
STRANGE = [RuntimeError, OSError, ValueError, TimeoutError]


def error(kind: type[Exception]) -> Exception:
    return kind("create", "manifest", "no") if issubclass(kind, StoreError) else kind("no")


def is_manifest(key: str) -> bool:
    return key.startswith(keys.COMMITS)


class Faults:
    """What happens to manifests here.

    Attributes:
        stores: Whether a manifest is written.
        raises: What ``create`` raises then; None: it answers.
        blind: What reading a manifest raises; None: it can be read.
    """

    stores = True
    raises: type[Exception] | None = None
    blind: type[Exception] | None = None

    def create(self, key: str, data: bytes) -> bool:
        if not is_manifest(key):
            return super().create(key, data)
        made = super().create(key, data) if self.stores else True
        if self.raises:
            raise error(self.raises)
        return made

    def get(self, key: str, *, max_nbytes: int) -> bytes:
        if self.blind and is_manifest(key):
            raise error(self.blind)
        return super().get(key, max_nbytes=max_nbytes)


def store(**faults: Any) -> MemoryStore:
    """In memory, with some faults."""
    return type("Faulty", (Faults, MemoryStore), faults)(f"mended-commit-{uuid.uuid4().hex}")


# --- the stage --------------------------------------------------------------------------------------


def test_a_manifest_that_stands_is_committed() -> None:
    assert commit.create(store(), SMALL) is None


@pytest.mark.parametrize("raises", [*PERMANENT, *TRANSIENT, *STRANGE])
def test_a_store_that_stores_and_then_raises_has_committed(raises: type[Exception]) -> None:
    place = store(raises=raises)
    assert commit.create(place, SMALL) is None
    assert place.get(PATH, max_nbytes=1 << 20) == SMALL.dumps()


@pytest.mark.parametrize("raises", PERMANENT)
def test_a_store_that_refuses_for_good_and_holds_nothing_has_not_committed(raises: type[Exception]) -> None:
    with pytest.raises(RefusalError) as caught:
        commit.create(store(stores=False, raises=raises), SMALL)
    assert [failure.error for failure in caught.value.failures] == [raises.__name__]


@pytest.mark.parametrize("raises", [*TRANSIENT, *STRANGE])
def test_where_the_answer_was_lost_absence_proves_nothing(raises: type[Exception]) -> None:
    assert commit.create(store(stores=False, raises=raises), SMALL)


@pytest.mark.parametrize("stores", [True, False])
@pytest.mark.parametrize("raises", [None, *PERMANENT, *TRANSIENT, *STRANGE])
@pytest.mark.parametrize("blind", [StoreAccessError, StoreUnavailableError, StoreError])
def test_a_store_that_cannot_be_asked_leaves_it_unknown(stores: bool, raises: Any, blind: Any) -> None:  # noqa: FBT001
    assert commit.create(store(stores=stores, raises=raises, blind=blind), SMALL)


def test_a_manifest_of_ours_that_stands_already_is_committed() -> None:
    place = store()
    place.put(PATH, SMALL.dumps())
    assert commit.create(place, SMALL) is None


def test_other_content_under_our_key_is_refused_and_left_alone() -> None:
    place = store()
    place.put(PATH, b"{}")
    with pytest.raises(RefusalError):
        commit.create(place, SMALL)
    assert place.get(PATH, max_nbytes=99) == b"{}"


# --- a whole save -----------------------------------------------------------------------------------


@pytest.fixture
def checkpointer_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Checkpointer]:
    """Makes a Checkpointer on a directory with some faults."""

    def make(base: type = Faults, **faults: Any) -> Checkpointer:
        kind = type("Faulty", (base, PosixStore), faults)
        with monkeypatch.context() as patch:
            patch.setattr("dcpsvc.checkpointer.open_store", lambda root, _, **__: kind(Path(root)))
            return Checkpointer(tmp_path / "root", {"x": torch.ones(2)}, local=tmp_path / "local", save_last=False)

    return make


def manifests(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("manifests/*.json"))


def shards(root: Path) -> list[str]:
    return sorted(path.parent.name for path in root.glob("data/*/*"))


@pytest.mark.parametrize("raises", [*PERMANENT, *TRANSIENT, *STRANGE])
def test_a_save_whose_manifest_was_stored_before_the_error_is_a_checkpoint(
    tmp_path: Path, checkpointer_on: Callable[..., Checkpointer], raises: type[Exception]
) -> None:
    with checkpointer_on(raises=raises) as ckpt:
        ckpt.save(1).wait(20)
        ckpt.save(2).wait(20)
    target = torch.zeros(2)
    assert dcpsvc.load(tmp_path / "root", {"x": target}) == 2
    assert torch.equal(target, torch.ones(2))
    assert [found.state for found in dcpsvc.list_checkpoints(tmp_path / "root")] == ["committed"] * 2


@pytest.mark.parametrize("raises", PERMANENT)
def test_a_save_whose_manifest_was_refused_leaves_nothing(
    tmp_path: Path, checkpointer_on: Callable[..., Checkpointer], raises: type[Exception]
) -> None:
    ckpt = checkpointer_on(stores=False, raises=raises)
    with pytest.raises(SaveFailedError, match=raises.__name__):
        ckpt.save(1).wait(20)
    with pytest.raises(SaveFailedError):
        ckpt.close()
    assert manifests(tmp_path / "root") == shards(tmp_path / "root") == []


@pytest.mark.parametrize(
    "faults",
    [
        {"raises": StoreFullError, "blind": StoreAccessError},
        {"raises": StoreAccessError, "blind": StoreUnavailableError},
        {"raises": StoreUnavailableError, "blind": StoreUnavailableError},
        {"raises": RuntimeError, "blind": StoreError},
        {"blind": StoreUnavailableError},
        {"blind": StoreAccessError},
        {"stores": False, "raises": StoreUnavailableError},
        {"stores": False, "raises": TimeoutError},
        {"stores": False, "raises": StoreFullError, "blind": StoreUnavailableError},
    ],
    ids=lambda faults: " ".join(getattr(value, "__name__", "absent") for value in faults.values()),
)
def test_a_save_nobody_knows_about_says_so_and_keeps_its_shards_on_both_tiers(
    tmp_path: Path, checkpointer_on: Callable[..., Checkpointer], faults: dict[str, Any]
) -> None:
    root, ckpt = tmp_path / "root", checkpointer_on(**faults)
    with pytest.raises(CommitUnknownError, match="list the run root"):
        ckpt.save(1).wait(20)
    with pytest.raises(StepExistsError):
        ckpt.save(1)
    with pytest.raises(CommitUnknownError):
        ckpt.close()
    assert shards(root) == [path.parent.name for path in (tmp_path / "local").glob("*/data/*/*")] != []
    if faults.get("stores", True):
        target = torch.zeros(2)
        assert dcpsvc.load(root, {"x": target}) == 1
        assert torch.equal(target, torch.ones(2))
    else:
        assert [found.state for found in dcpsvc.list_checkpoints(root)] == ["incomplete"]


def test_the_job_after_an_unknown_commit_resumes_it_if_it_stands_and_saves_on(
    tmp_path: Path, checkpointer_on: Callable[..., Checkpointer]
) -> None:
    with pytest.raises(CommitUnknownError), checkpointer_on(blind=StoreUnavailableError) as ckpt:
        ckpt.save(1)
    with checkpointer_on() as ckpt:
        assert ckpt.resume() == 1
        ckpt.save(2).wait(20)
    assert [found.step for found in dcpsvc.list_checkpoints(tmp_path / "root")] == [1, 2]


def test_the_job_after_an_unknown_commit_finishes_it_if_it_does_not_stand(
    tmp_path: Path, checkpointer_on: Callable[..., Checkpointer]
) -> None:
    with pytest.raises(CommitUnknownError), checkpointer_on(stores=False, raises=StoreUnavailableError) as ckpt:
        ckpt.save(1)
    with checkpointer_on() as ckpt:
        assert ckpt.resume() == 1
    assert [(found.step, found.state) for found in dcpsvc.list_checkpoints(tmp_path / "root")] == [(1, "committed")]


# --- another job takes over meanwhile ----------------------------------------------------------------


class Joined:
    """A newer job claims the root right after a manifest was written, and is slow with saying what it inherits."""

    epoch: Epoch | None = None

    def create(self, key: str, data: bytes) -> bool:
        made = super().create(key, data)
        if is_manifest(key) and not Joined.epoch:
            Joined.epoch = fence.claim(self, claim).epoch
        return made


def claim(number: int) -> Claim:
    return Claim(epoch=Epoch(number, "deadbeef"), host="there", pid=1, created="now")


@pytest.mark.parametrize("inherits", [True, False])
def test_the_save_that_a_takeover_falls_into_is_unknown_until_the_new_owner_decides_and_the_next_one_is_refused(
    tmp_path: Path,
    checkpointer_on: Callable[..., Checkpointer],
    monkeypatch: pytest.MonkeyPatch,
    inherits: bool,  # noqa: FBT001
) -> None:
    monkeypatch.setattr(Joined, "epoch", None)
    ckpt = checkpointer_on(Joined)
    with pytest.raises(CommitUnknownError, match="at this moment job deadbeef"):
        ckpt.save(1).wait(20)
    with pytest.raises(FencedError):
        ckpt.save(2).wait(20)
    with pytest.raises(FencedError):
        ckpt.close()
    assert Joined.epoch is not None
    root = tmp_path / "root"
    unknown = [found.key for found in dcpsvc.list_checkpoints(root) if found.step == 1]
    fence.inherit(PosixStore(root), Joined.epoch, unknown if inherits else [])
    counting = [found.step for found in dcpsvc.list_checkpoints(root) if found.state == "committed"]
    assert counting == ([1] if inherits else [])

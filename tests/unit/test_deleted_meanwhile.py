"""Commands that read a checkpoint while it is being deleted, or after that has begun: they say so, and what to do."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry as registry_of_fsspec
from fsspec.registry import known_implementations

import dcpsvc
from dcpsvc import conversion, deletions
from dcpsvc.cli import cli, main
from dcpsvc.commandline.failures import remedy as remedy_of
from dcpsvc.errors import CorruptShardError, NoSuchStepError, StepDeletedError
from dcpsvc.format import keys
from dcpsvc.format.keys import Attempt
from dcpsvc.reading import open_root
from dcpsvc.stages import discover, retain
from dcpsvc.storage.open import open_store
from dcpsvc.storage.posix import PosixStore
from dcpsvc.tools import comparing, exporting, listing, mirroring, showing, surgery, verifying
from dcpsvc.tools.changes import Setting

READ = 10
"""The step that goes; 20 and 30 stay."""


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    state = {"model": torch.nn.Linear(64, 64), "note": "hello"}
    with dcpsvc.Checkpointer(folder / "root", state, local=folder / "local") as ckpt:
        for step in (10, 20, 30):
            ckpt.save(step).wait(30)
    return folder / "root"


@pytest.fixture
def root(original, tmp_path) -> Path:
    shutil.copytree(original, tmp_path / "root")
    return tmp_path / "root"


class Deleting(PosixStore):
    """Step 10 is deleted by a job, but for its last file, when somebody has looked at its manifest and goes on."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.manifest = discover.read_manifest(PosixStore(root), attempt(root))
        self.waits = True

    def read(self, key: str, begin: int, end: int) -> bytes:
        self._delete(key)
        return super().read(key, begin, end)

    def size(self, key: str) -> int:
        self._delete(key)
        return super().size(key)

    def stream(self, key, *more):
        self._delete(key)
        return super().stream(key, *more)

    def stream_into(self, key, *more, **options):
        self._delete(key)
        return super().stream_into(key, *more, **options)

    def _delete(self, key: str) -> None:
        if self.waits and key.startswith(self.manifest.key.data):
            self.waits = False
            delete(Path(self.url), all_of_it=False)


def attempt(root: Path):
    return next(one for one in discover.committed(PosixStore(root)) if one.step == READ)


def delete(root: Path, *, all_of_it: bool) -> None:
    """As a job does it; one that is killed in the middle has deleted the manifest."""
    store, condemned = PosixStore(root), attempt(root)
    assert retain.condemn(store, condemned, lambda: True)
    if all_of_it:
        retain.finish_removal(store, condemned)
    else:
        store.delete(condemned.manifest)
        store.put(condemned.data + "rank-00001.safetensors", b"-" * 12_345)
        store.delete(condemned.shard(0))


def resumed(root, local: Path) -> int:
    with dcpsvc.Checkpointer(root, {"model": torch.nn.Linear(64, 64)}, local=local, save_last=False) as ckpt:
        return ckpt.resume(READ)


READERS = {
    "export hf": lambda store, out: exporting.export_hf(exporting.Source(store, READ, "model"), out),
    "export torch": lambda store, out: conversion.export_torch(exporting.Source(store, READ, "model"), store, out),
    "export dcp": lambda store, out: conversion.export_dcp(store, READ, out),
    "export peft": lambda store, out: exporting.export_peft(exporting.Source(store, READ, "model"), out),
    "diff": lambda store, _: comparing.compare(side(store, READ), side(store, 20)),
    "diff --values": lambda store, _: comparing.compare(side(store, 20), side(store, READ), lambda _: None),
    "edit": lambda store, _: surgery.Operation(
        source=store, manifest=store.manifest, settings=(Setting("note", "bye"),)
    ).plan(),
    "load": lambda store, _: dcpsvc.load(store, {"model": torch.nn.Linear(64, 64)}, READ),
    "resume": resumed,
    "storage_reader": lambda store, _: dcpsvc.storage_reader(store, READ),
    "promote": lambda store, out: surgery.promote(
        surgery.Operation(source=store, manifest=store.manifest), open_store(out), lambda _: None
    ),
}


def side(store, step: int) -> comparing.Side:
    manifest = showing.find(PosixStore(Path(store.url)), step)
    return comparing.Side(store, manifest, showing.layout_of(store, manifest))


@pytest.mark.parametrize("name", READERS)
def test_a_checkpoint_that_goes_while_it_is_read_is_told_as_deleted_and_not_as_damaged(name, root, tmp_path):
    with pytest.raises(StepDeletedError) as caught:
        READERS[name](Deleting(root), tmp_path / "out")
    assert (caught.value.step, caught.value.under_way, caught.value.left_nbytes) == (READ, True, 12_345)
    assert caught.value.available == (20, 30)


def test_what_is_missing_of_a_checkpoint_that_nobody_deletes_is_damage(root, tmp_path):
    (root / attempt(root).shard(0)).unlink()
    with pytest.raises(NoSuchStepError, match="the file is missing"):
        exporting.Source(open_root(root), READ, "model")
    store = open_root(root)
    manifest = discover.read_manifest(store, attempt(root))
    with pytest.raises(CorruptShardError):
        mirroring.copy(store, [manifest], open_store(tmp_path / "copy"), lambda _: None)


def test_a_copy_leaves_out_what_goes_in_the_middle_of_it_and_brings_the_rest(root, tmp_path):
    store = Deleting(root)
    manifests = [discover.read_manifest(store, one) for one in discover.committed(store)]
    done = mirroring.copy(store, manifests, open_store(tmp_path / "copy"), lambda _: None)
    assert [(one.step, one.gone) for one in done] == [(10, True), (20, False), (30, False)]
    assert [one.step for one in discover.committed(PosixStore(tmp_path / "copy"))] == [20, 30]


def test_verify_says_of_it_that_it_is_gone(root):
    store = Deleting(root)
    found = verifying.verify(store, verifying.commits(store, READ))
    assert [(one.gone, one.problems) for one in found] == [(True, ())]


COMMANDS = {
    "show": ("show", "ROOT", "10"),
    "verify": ("verify", "ROOT", "10"),
    "diff": ("diff", "ROOT", "10", "20"),
    "fetch": ("fetch", "ROOT", "10", "OUT"),
    "cp": ("cp", "ROOT", "OUT", "10"),
    "export": ("export", "ROOT", "10", "OUT", "--format", "hf"),
    "edit": ("edit", "ROOT", "10", "--drop", "note"),
    "promote": ("promote", "ROOT", "10", "OUT"),
    "pin": ("pin", "ROOT", "10"),
    "gc": ("gc", "ROOT", "--remove", "10"),
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_a_step_whose_deletion_was_broken_off_is_told_as_that_by(arguments, root, tmp_path):
    delete(root, all_of_it=False)
    places = {"ROOT": str(root), "OUT": str(tmp_path / "out")}
    failed = CliRunner().invoke(cli, [places.get(one, one) for one in arguments]).exception
    assert isinstance(failed, StepDeletedError), failed
    assert "step 10" in str(failed)
    told = "was never committed, or is being deleted by the policy of its job, or by dcpsvc gc; 12,345 bytes"
    assert told in str(failed)
    assert str(failed).endswith("committed steps: 20, 30")
    assert not (tmp_path / "out" / "manifests").exists()


@pytest.mark.parametrize("read", [dcpsvc.load, dcpsvc.storage_reader])
def test_a_step_whose_deletion_was_broken_off_is_told_as_that_to_a_program(read, root):
    delete(root, all_of_it=False)
    arguments = [{"model": torch.nn.Linear(64, 64)}] if read is dcpsvc.load else []
    with pytest.raises(StepDeletedError, match=r"or is being deleted .*; 12,345 bytes .*; committed steps: 20, 30$"):
        read(root, *arguments, step=READ)


def test_a_step_whose_deletion_the_start_of_the_job_has_finished_is_told_as_that(root, tmp_path):
    delete(root, all_of_it=False)
    with pytest.raises(StepDeletedError, match=r"or was deleted .*; nothing of it is left; committed steps: 20, 30$"):
        resumed(root, tmp_path / "local")


def test_a_failed_save_whose_mark_the_start_of_the_job_has_taken_away_is_no_deletion(root, tmp_path):
    failed_save(root, 15)
    with (
        dcpsvc.Checkpointer(root, {"n": 1}, local=tmp_path / "local", save_last=False) as ckpt,
        pytest.raises(NoSuchStepError, match="step 15 is not committed; committed steps: 10, 20, 30") as caught,
    ):
        ckpt.resume(15)
    assert type(caught.value) is NoSuchStepError


class DeletingFiles(LocalFileSystem):
    """As :class:`Deleting`, for whoever opens a URL: when the first bytes of its shard are asked for."""

    protocol = "deleting"
    condemned = ""

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("deleting://"))

    def cat_file(self, path, *more, **options):
        self._delete(path)
        return super().cat_file(path, *more, **options)

    def open(self, path, *more, **options):
        self._delete(path)
        return super().open(path, *more, **options)

    def _delete(self, path: str) -> None:
        root, _, below = path.partition("/data/")
        if below.startswith("step-000000000010.") and type(self).condemned:
            type(self).condemned = ""
            delete(Path(root), all_of_it=False)


@pytest.fixture
def going(root, monkeypatch) -> str:
    monkeypatch.setitem(known_implementations, "deleting", {"class": f"{__name__}.DeletingFiles"})
    monkeypatch.setitem(registry_of_fsspec, "deleting", DeletingFiles)
    monkeypatch.setattr(DeletingFiles, "condemned", "yes")
    return f"deleting://{root}"


@pytest.mark.parametrize("as_json", [False, True], ids=["as text", "as JSON"])
def test_cp_of_named_steps_copies_the_others_says_what_was_deleted_in_the_middle_and_ends_with_1(
    as_json, going, tmp_path, monkeypatch, capsys
):
    more = ["--json"] if as_json else []
    monkeypatch.setattr(sys, "argv", ["dcpsvc", "cp", going, str(tmp_path / "copy"), "10", "20", *more])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert ended.value.code == 1
    assert "step 10 (attempt 1-" in told.err
    assert " is being deleted by the policy of its job" in told.err
    assert "dcpsvc pin ROOT STEP" in told.err
    if as_json:
        assert [(one["step"], one["gone"]) for one in json.loads(told.out)] == [(10, True), (20, False)]
    else:
        assert "step 10 (attempt 1-" in told.out
        assert "deleted meanwhile, not copied" in told.out
    assert [one.step for one in discover.committed(PosixStore(tmp_path / "copy"))] == [20]


def test_cp_of_everything_goes_on_without_what_was_deleted_in_the_middle(going, tmp_path):
    done = CliRunner().invoke(cli, ["cp", going, str(tmp_path / "copy")])
    assert done.exit_code == 0, done.output
    assert [one.step for one in discover.committed(PosixStore(tmp_path / "copy"))] == [20, 30]


def test_the_program_says_what_to_do_and_ends_with_1(root):
    delete(root, all_of_it=False)
    done = subprocess.run(
        [sys.executable, "-m", "dcpsvc", "show", str(root), "10"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "dcpsvc ls ROOT shows" in done.stderr
    assert "pin" not in done.stderr


def test_what_a_job_deletes_while_a_command_reads_it_is_told_with_the_remedy(root):
    gone = attempt(root)
    delete(root, all_of_it=False)
    error = deletions.error(PosixStore(root), gone)
    assert "(attempt 1-" in str(error)
    assert " is being deleted by" in str(error)
    assert "never committed" not in str(error)
    assert "dcpsvc pin ROOT STEP" in remedy_of(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301 - our own


def failed_save(root: Path, step: int = 40) -> Attempt:
    """What is left at the run root of a save that failed in its upload: its mark, and no file."""
    failed = Attempt(step, "1-00000000-9")
    retain.condemn(PosixStore(root), failed, lambda: True)
    return failed


@pytest.mark.parametrize("command", ["show", "verify", "export"])
def test_a_save_that_failed_is_no_deletion(command, root, tmp_path):
    failed_save(root)
    more = [str(tmp_path / "out"), "--format", "hf"] if command == "export" else []
    failed = CliRunner().invoke(cli, [command, str(root), "40", *more]).exception
    assert type(failed) is NoSuchStepError, failed
    assert str(failed).endswith("step 40 is not committed; committed steps: 10, 20, 30")


def test_files_that_a_failed_save_left_are_not_told_as_a_deletion_alone(root):
    PosixStore(root).put(failed_save(root).shard(0), b"-" * 99)
    with pytest.raises(StepDeletedError, match=r"was never committed, or is being deleted .*; 99 bytes") as caught:
        showing.find(open_root(root), 40)
    assert not caught.value.was_committed
    assert next(one.reason for one in discover.listing(PosixStore(root)) if one.step == 40).startswith("never comm")


def test_the_mark_of_a_failed_attempt_does_not_hide_that_the_next_one_is_damaged(root):
    PosixStore(root).put(failed_save(root, READ).shard(0), b"-" * 99)
    (root / attempt(root).shard(0)).unlink()
    with pytest.raises(NoSuchStepError, match="the file is missing") as caught:
        showing.find(open_root(root), READ)
    assert type(caught.value) is NoSuchStepError


def test_a_listing_says_of_what_is_left_that_it_is_being_deleted(root):
    delete(root, all_of_it=False)
    assert [(one.step, one.reason.partition(":")[0]) for one in discover.listing(PosixStore(root))] == [
        (10, "never committed, or being deleted"),
        (20, ""),
        (30, ""),
    ]


def test_a_step_that_was_deleted_altogether_is_not_committed(root):
    delete(root, all_of_it=True)
    with pytest.raises(NoSuchStepError, match="step 10 is not committed; committed steps: 20, 30") as caught:
        showing.find(open_root(root), READ)
    assert type(caught.value) is NoSuchStepError


def test_a_line_that_is_wanted_of_what_was_deleted_meanwhile(root):
    gone = attempt(root)
    delete(root, all_of_it=True)
    with pytest.raises(StepDeletedError, match="was deleted meanwhile"):
        listing.row_of(open_root(root), gone)


class DeletingBetween(PosixStore):
    """Step 10 is deleted by a job while somebody lists: the manifest before, and the rest at, the LIST of ``of``."""

    def __init__(self, root: Path, of: str) -> None:
        super().__init__(root)
        self.condemned, self.of, self.listed = attempt(root), of, list[str]()

    def list(self, prefix):
        theirs = PosixStore(Path(self.url))
        if prefix == keys.MANIFESTS:
            retain.condemn(theirs, self.condemned, lambda: True)
            theirs.delete(self.condemned.manifest)
        if prefix == self.of and prefix not in self.listed:
            retain.finish_removal(theirs, self.condemned)
        self.listed.append(prefix)
        return super().list(prefix)


@pytest.mark.parametrize("of", [keys.MANIFESTS, keys.TOMBSTONES])
def test_a_listing_does_not_say_of_what_is_deleted_in_the_middle_of_it_that_it_was_never_committed(of, root):
    store = DeletingBetween(root, of)
    assert [(one.step, one.state) for one in discover.listing(store)] == [(20, "committed"), (30, "committed")]
    assert store.listed.index(keys.DATA) < store.listed.index(of)
    assert not PosixStore(root).list(store.condemned.data)


def test_a_listing_says_of_what_is_deleted_while_it_is_looked_at_again_that_it_may_be(root):
    store = DeletingBetween(root, of="nothing")
    rows = {one.step: (one.state, one.reason.partition(":")[0]) for one in discover.listing(store)}
    assert rows == {
        10: ("incomplete", "never committed, or being deleted"),
        20: ("committed", ""),
        30: ("committed", ""),
    }

"""Looking at a real run with the command line: ls, show, verify, diff, du, fetch. Nothing of it is changed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from click.testing import CliRunner

import dcpsvc
from dcpsvc import progress
from dcpsvc.cli import cli
from dcpsvc.errors import StoreNotFoundError
from dcpsvc.format import keys
from dcpsvc.policies import Best, EveryNSteps
from dcpsvc.reading import open_root
from dcpsvc.stages import discover, retain
from dcpsvc.storage.posix import PosixStore
from dcpsvc.tools import listing, numbers, tables, verifying
from dcpsvc.tools.comparing import leaves

if TYPE_CHECKING:
    from dcpsvc.storage.base import Entry


class Run(NamedTuple):
    root: Path
    local: Path
    model: torch.nn.Module


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """Two steps of a small model; the second has another learning rate and one changed weight."""
    folder = tmp_path_factory.mktemp("run")
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    state = {"model": model, "optim": optimizer, "note": "hello"}
    with dcpsvc.Checkpointer(folder / "root", state, local=folder / "local", keep_local=1) as ckpt:
        ckpt.save(10, metrics={"loss": 2.0}).wait(30)
        with torch.no_grad():
            model.weight[1, 2] += 0.25
        optimizer.param_groups[0]["lr"] = 0.125
        ckpt.save(20, metrics={"loss": float("nan")}).wait(30)
    return Run(folder / "root", folder / "local", model)


@pytest.fixture
def copy(run, tmp_path) -> Run:
    """The same run, to be harmed."""
    shutil.copytree(run.root, tmp_path / "root")
    return Run(tmp_path / "root", tmp_path / "local", run.model)


def told(*arguments: object, code: int = 0) -> str:
    """What a command prints; it must end with ``code``."""
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done.stdout


def told_json(*arguments: object, code: int = 0):
    return json.loads(told(*arguments, "--json", code=code), parse_constant=pytest.fail)


def shell(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own."""
    command = [sys.executable, "-m", "dcpsvc", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environ)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# --- ls -------------------------------------------------------------------------------------------


def test_ls_tells_step_size_metrics_and_on_which_tiers(run):
    first, second = told_json("ls", run.root, "--local", run.local)
    assert (first["step"], first["metrics"], first["state"], first["tiers"]) == (
        10,
        {"loss": 2.0},
        "committed",
        ["remote"],
    )
    assert (second["step"], second["metrics"], second["tiers"]) == (20, {"loss": "nan"}, ["remote", "local"])
    shown = told("ls", run.root, "--local", run.local).splitlines()
    assert "loss=2" in shown[1]
    assert "remote+local" in shown[2]
    assert "kept because" not in shown[0]


def test_ls_says_what_waits_on_this_disk_for_its_upload(copy, run):
    shutil.copytree(run.local, copy.local)
    attempt = next(each for each in discover.committed(open_root(copy.root)) if each.step == 20)
    (copy.root / attempt.manifest).unlink()
    waiting = told_json("ls", copy.root, "--local", copy.local)[1]
    assert (waiting["step"], waiting["state"], waiting["tiers"]) == (20, "incomplete", ["local"])
    assert "finishes its upload" in waiting["reason"]


def test_what_was_deleted_at_the_run_root_does_not_wait_for_an_upload_though_a_disk_still_has_it(tmp_path):
    root, local = tmp_path / "root", tmp_path / "local"
    with dcpsvc.Checkpointer(root, {"x": 1}, local=local) as ckpt:
        for step in (1, 2):
            ckpt.save(step).wait(30)
    retain.remove(open_root(root), discover.committed(open_root(root))[0], lambda: True)
    assert len(list(local.glob("*/manifests/*.step-*"))) == 2
    assert [each["step"] for each in told_json("ls", root, "--local", local)] == [2]


def test_the_reasons_to_keep_a_checkpoint_stand_beside_it(run, capsys):
    rows = listing.rows(open_root(run.root), rule=Best(1, "loss", "min"))
    assert [row.reasons for row in rows] == [("best 1 of 1 by loss (2)",), ("newest commit",)]
    assert [(row.best, row.goes) for row in rows] == [(True, False), (False, False)]
    tables.print_listing(rows)
    header, first, second = capsys.readouterr().out.splitlines()
    assert "kept because" in header
    assert "best 1 of 1" in first
    assert "best 1 of 1" not in second


def test_a_long_listing_tells_the_same_plainly(run, capsys):
    rows = listing.rows(open_root(run.root), rule=EveryNSteps(10))
    tables.print_listing(rows * 400)
    header, first, second, *more = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["step", "attempt", "age", "size"]
    assert first.endswith("remote  committed  a multiple of 10 steps, loss=2")
    assert second.endswith("remote  committed  a multiple of 10 steps, loss=nan")
    assert len(more) == 798


def test_listing_with_threads_tells_the_same_as_without(run):
    store = open_root(run.root)
    assert repr(discover.listing(store, at_once=8)) == repr(discover.listing(store))


# --- show -----------------------------------------------------------------------------------------


def test_show_filters_tensors_in_both_forms(run):
    everything = told_json("show", run.root, 10)
    assert everything["tensors"]["model.weight"] == {"dtype": "F32", "shape": [3, 4], "nbytes": 48, "ranks": [0]}
    assert everything["lineage"] is None
    assert set(told_json("show", run.root, 10, "--filter", "bias")["tensors"]) == {"model.bias"}
    assert "model.weight" not in told("show", run.root, 10, "--filter", "bias")


def test_an_unknown_step_names_those_there_are(run):
    done = shell("show", run.root, 11)
    assert done.returncode == 1
    assert "11" in done.stderr
    assert "10" in done.stderr
    assert "20" in done.stderr
    assert "Traceback" not in done.stderr


# --- verify ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 8])
def test_verify_names_the_damaged_file_and_goes_on(copy, jobs):
    shard = next((copy.root / "data").glob("step-000000000010*/rank-00000.safetensors"))
    flip(shard, 4100)
    bad, good = told_json("verify", copy.root, "--jobs", jobs, code=1)
    assert (bad["step"], bad["intact"]) == (10, False)
    assert shard.name in bad["problems"][0]
    assert (good["step"], good["intact"]) == (20, True)
    assert told_json("verify", copy.root, 20) == [good]


class Meanwhile(PosixStore):
    """Step 10 is deleted there by a job just after the manifests are listed for the first time."""

    def list(self, prefix: str) -> list[Entry]:
        found = super().list(prefix)
        if prefix == keys.MANIFESTS and (old := [each for each in map(keys.attempt_of, keys_of(found)) if each]):
            with contextlib.suppress(StoreNotFoundError):
                retain.finish_removal(PosixStore(Path(self.url)), min(old, key=lambda each: each.step))
        return found


def keys_of(entries: list[Entry]) -> list[str]:
    return [entry.key for entry in entries if "10" in entry.key]


def test_what_a_job_deletes_meanwhile_is_gone_and_not_damaged(copy):
    store = Meanwhile(copy.root)
    old, new = verifying.verify(store, verifying.commits(store, None))
    assert (old.step, old.gone, old.intact, old.problems) == (10, True, False, ())
    assert (new.step, new.gone, new.intact) == (20, False, True)


def test_a_listing_leaves_out_what_a_job_deletes_meanwhile(copy):
    assert [(one.step, one.state) for one in discover.listing(Meanwhile(copy.root))] == [(20, "committed")]


def test_a_listing_takes_in_whole_what_a_job_commits_meanwhile(copy):
    class Late(PosixStore):
        """Its first listing of the shards is from before step 20."""

        asked = 0

        def list(self, prefix: str) -> list[Entry]:
            self.asked += prefix == keys.DATA
            early = prefix == keys.DATA and self.asked == 1
            return [entry for entry in super().list(prefix) if not (early and "0020." in entry.key)]

    assert [(one.step, one.state) for one in discover.listing(Late(copy.root))] == [
        (10, "committed"),
        (20, "committed"),
    ]


def test_verify_says_now_and_then_how_far_it_is_where_nobody_watches():
    now, said = [0.0], []
    lines = progress.Lines("verified", 400 << 20, said.append, lambda: now[0])
    for second in range(0, 25, 5):
        now[0] = float(second)
        lines.advance(50 << 20)
    assert said == [
        "verified 150.00 MiB of 400.00 MiB, 15.00 MiB/s, 17 s left",
        "verified 250.00 MiB of 400.00 MiB, 12.50 MiB/s, 12 s left",
    ]


# --- diff -----------------------------------------------------------------------------------------


def test_diff_tells_plain_values_and_with_values_which_numbers_and_by_how_much(run):
    found = told_json("diff", run.root, 10, 20, code=1)
    assert found["plain"] == [["optim.param_groups.0.lr", 0.5, 0.125]]
    assert found["values"] == []
    found = told_json("diff", run.root, 10, 20, "--values", code=1)
    (gap,) = found["values"]
    assert (gap["name"], gap["elements"], gap["differing"], gap["largest"]) == (
        "model.weight",
        12,
        1,
        pytest.approx(0.25),
    )
    assert found["equal"] == 1
    assert "optim.param_groups.0.lr" in told("diff", run.root, 10, 20, code=1)


def test_a_checkpoint_does_not_differ_from_itself(run):
    assert told_json("diff", run.root, 10, 10, "--values")["same"]
    assert "no difference" in told("diff", run.root, 10, 10, "--values")


def test_diff_tells_what_only_one_has_and_what_is_described_otherwise(run, tmp_path):
    other = torch.nn.Linear(4, 2).to(torch.bfloat16)
    with dcpsvc.Checkpointer(
        tmp_path / "root", {"model": other, "extra": torch.zeros(3)}, local=tmp_path / "local"
    ) as ckpt:
        ckpt.save(1).wait(30)
    found = told_json("diff", run.root, 10, 1, "--root-b", tmp_path / "root", "--values", code=1)
    assert found["only_b"] == ["extra"]
    assert found["changed"] == [
        ["model.bias", "F32 -> BF16, [3] -> [2]"],
        ["model.weight", "F32 -> BF16, [3, 4] -> [2, 4]"],
    ]
    assert ["note", "hello", None] in found["plain"]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.complex64]
)
def test_numbers_of_every_kind_are_compared(tmp_path, dtype):
    value = torch.tensor([1, 2, 4]).to(dtype)
    with dcpsvc.Checkpointer(tmp_path / "root", {"x": value}, local=tmp_path / "local") as ckpt:
        ckpt.save(1).wait(30)
        value[1] = 5
        ckpt.save(2).wait(30)
    (gap,) = told_json("diff", tmp_path / "root", 1, 2, "--values", code=1)["values"]
    assert (gap["differing"], gap["largest"]) == (1, 3.0)
    assert gap["relative"] == pytest.approx(3 / 21**0.5)


def test_tensors_cut_in_other_ways_are_compared_box_by_box():
    from dcpsvc.format.layout import Chunk, Tensor

    class Bytes:
        def __init__(self, array):
            self.data = array.tobytes()

        def read(self, begin, end):
            return memoryview(self.data)[begin:end]

    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6).numpy()
    by_rows = Tensor.of("F32", (4, 6), (Chunk(0, (0, 0), (3, 6), 0), Chunk(1, (3, 0), (1, 6), 0)))
    by_columns = Tensor.of("F32", (4, 6), (Chunk(0, (0, 0), (4, 2), 0), Chunk(1, (0, 2), (4, 4), 0)))
    rows = [Bytes(whole[:3]), Bytes(whole[3:])]
    columns = [Bytes(whole[:, :2].copy()), Bytes(whole[:, 2:].copy())]
    done: list[int] = []
    assert numbers.compare("x", (by_rows, rows), (by_columns, columns), done.append).differing == 0
    assert sum(done) == 96
    other = whole.copy()
    other[3, 5] = float("inf")
    gap = numbers.compare("x", (by_rows, [rows[0], Bytes(other[3:])]), (by_columns, columns), done.append)
    assert (gap.differing, gap.largest) == (1, float("inf"))


def test_lists_of_groups_are_told_apart_by_number_and_tagged_values_stay_whole():
    document = {"groups": [{"lr": 1}, {"lr": 2}], "betas": {"$tuple": [0.9, 0.99]}, "names": ["a", "b"]}
    assert leaves(document, "o") == {
        "o.groups.0.lr": 1, "o.groups.1.lr": 2, "o.betas": {"$tuple": [0.9, 0.99]}, "o.names": ["a", "b"],
    }  # fmt: skip


# --- du -------------------------------------------------------------------------------------------


def test_du_counts_every_byte_once(copy):
    debris = copy.root / "data" / "step-000000000030.1-0123abcd-0"
    debris.mkdir()
    (debris / "rank-00000.safetensors").write_bytes(b"x" * 777)
    found = told_json("du", copy.root)
    assert found["total"] == sum(len(data) for data in contents(copy.root).values())
    assert found["debris"] == [{"step": 30, "attempt": "1-0123abcd-0", "nbytes": 777}]
    assert [each["step"] for each in found["checkpoints"]] == [10, 20]
    assert found["kinds"]["debris"] == 777
    assert found["components"] == {"model": 60}
    assert "777 B" in told("du", copy.root)


# --- fetch ----------------------------------------------------------------------------------------


def test_what_was_fetched_is_a_run_root_that_verifies_and_loads(run, tmp_path):
    told("fetch", run.root, 20, tmp_path / "copy")
    assert [each["step"] for each in told_json("ls", tmp_path / "copy")] == [20]
    told("verify", tmp_path / "copy")
    model = torch.nn.Linear(4, 3)
    assert dcpsvc.load(tmp_path / "copy", {"model": model}) == 20
    assert torch.equal(model.weight, run.model.weight)


def test_a_fetch_that_broke_off_goes_on_and_trusts_nothing_it_finds(tmp_path):
    with dcpsvc.Checkpointer(tmp_path / "root", {"x": torch.rand(20 << 20)}, local=tmp_path / "local") as ckpt:
        ckpt.save(1).wait(30)
    told("fetch", tmp_path / "root", 1, tmp_path / "copy")
    shard = next((tmp_path / "copy").rglob("*.safetensors"))
    whole = shard.read_bytes()
    (manifest,) = (tmp_path / "copy" / "manifests").glob("*.json")
    manifest.unlink()
    flip(shard, 40 << 20)  # in the second of three pieces
    with shard.open("r+b") as file:
        file.truncate(70 << 20)  # the third lacks its end
    shard.rename(shard.with_name(f".tmp-{shard.name}"))  # as a fetch that was killed leaves it
    assert told_json("ls", tmp_path / "copy") == []
    assert told_json("fetch", tmp_path / "root", 1, tmp_path / "copy")["found_nbytes"] == 32 << 20
    assert shard.read_bytes() == whole
    told("verify", tmp_path / "copy")


def test_a_damaged_checkpoint_is_not_fetched(copy, tmp_path):
    shard = next((copy.root / "data").glob("step-000000000010*/rank-00000.safetensors"))
    flip(shard, 4100)
    done = shell("fetch", copy.root, 10, tmp_path / "copy")
    assert done.returncode == 1
    assert shard.name in done.stderr
    assert not list((tmp_path / "copy").rglob("*step-*.json"))


def test_a_directory_of_another_run_is_refused_as_a_place_to_fetch_to(run, tmp_path):
    with dcpsvc.Checkpointer(tmp_path / "other", {"x": 1}, local=tmp_path / "local") as ckpt:
        ckpt.save(1).wait(30)
    before = contents(tmp_path / "other")
    done = shell("fetch", run.root, 10, tmp_path / "other")
    assert done.returncode == 3
    assert "Give another place" in done.stderr
    assert contents(tmp_path / "other") == before


# --- all of them ----------------------------------------------------------------------------------

LOOKS = (["ls"], ["show", "10"], ["verify"], ["diff", "10", "20", "--values"], ["du"])


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look[0])
def test_looking_changes_nothing_and_needs_no_torch(run, look):
    before = contents(run.root)
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['dcpsvc', {look[0]!r}, {str(run.root)!r}, *{look[1:]!r}]\n"
        "try:\n    runpy.run_module('dcpsvc', run_name='__main__')\n"
        "finally:\n    print('torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "False", done.stderr
    assert contents(run.root) == before


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look[0])
def test_colour_is_left_out_where_no_color_is_set(run, look):
    forced = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    arguments = [look[0], run.root, *look[1:]]
    assert "\x1b[" not in shell(*arguments, NO_COLOR="1", **forced).stdout.replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert "\x1b[" in shell(*arguments, **forced).stdout


def test_the_shell_completes_commands_and_the_steps_of_a_root(run):
    typed = f"dcpsvc show {run.root} 2"
    done = shell(_DCPSVC_COMPLETE="bash_complete", COMP_WORDS=typed, COMP_CWORD="3")
    assert done.stdout.split() == ["plain,20"]
    assert "_DCPSVC_COMPLETE=bash_complete" in told("completion", "bash")

"""``dcpsvc gc``: what it finds, what it removes, and what it never touches; with kills, and on random run roots."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import event, given, settings
from hypothesis import strategies as st

import dcpsvc
from dcpsvc import sidefiles
from dcpsvc.cli import cli
from dcpsvc.errors import ConfigError, FencedError, RemovalRefusedError, RunBusyError, StoreAccessError
from dcpsvc.format import keys, policy
from dcpsvc.policies import Best, EveryHours, EveryNSteps, Everything, Latest, Pinned
from dcpsvc.reading import open_root
from dcpsvc.stages import discover
from dcpsvc.storage.posix import PosixStore
from dcpsvc.tools import clearing, leftovers, live, owning
from dcpsvc.tools.clearrules import Rules
from tests.unit import gc_roots
from tests.unit.gc_roots import NEW, OLD, Made, a_bit_of_everything
from tests.unit.turns import RUN_ID, Place

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dcpsvc.storage.base import Store

KEEP = policy.parse("latest:2,best:1:loss:min")
AT_ANY_AGE = Rules(keep=KEEP, older_than_s=0.0)
DAY_S = 86400.0


def clear(store: Store, rules: Rules = AT_ANY_AGE, **more: Any) -> clearing.Cleared:
    return clearing.clear(store, RUN_ID, rules, clearing.Pace(lambda _: None), take_over=True, **more)


def steps(store: Store) -> list[int]:
    return [attempt.step for attempt in discover.committed(store)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_epochs(found: dict[str, bytes]) -> set[str]:
    return {key for key in found if not key.startswith(keys.EPOCHS)}


# --- by example -----------------------------------------------------------------------------------


def test_what_the_policy_lets_go_and_all_that_is_no_checkpoint_goes_and_nothing_else(tmp_path):
    made = a_bit_of_everything(tmp_path)
    done = clear(made.store)
    kept = {3, 4, 5, 6}
    assert steps(made.store) == sorted(kept)
    expected = made.left(kept) | {
        made.committed[3].record(1, "11111111"),
        made.committed[4].pin("22222222"),
        discover.read_manifest(made.store, made.committed[6]).layout.path,
    }
    assert without_epochs(files(tmp_path)) == {key for key in expected if not key.startswith(keys.EPOCHS)}
    for step in kept:
        assert discover.valid(made.store, made.committed[step])
    kinds = {one.kind for one in done.removed}
    assert kinds == {"checkpoint", "attempt", "layout", "lease", "probe", "orphan"}
    assert done.unfinished == 1


def test_a_second_run_finds_nothing_and_writes_nothing(tmp_path):
    made = a_bit_of_everything(tmp_path)
    clear(made.store)
    before = files(tmp_path)
    again = clear(made.store)
    assert (again.removed, again.nbytes) == ((), 0)
    assert files(tmp_path) == before


def test_a_dry_run_says_what_would_be_freed_and_changes_nothing(tmp_path):
    made = a_bit_of_everything(tmp_path / "root")
    before = files(tmp_path / "root")
    found = leftovers.find(made.store, AT_ANY_AGE, time.time())
    assert files(tmp_path / "root") == before
    assert found.keep[made.committed[3]] == "best 1 of 1 by loss (0.5)"
    assert found.nbytes == clear(made.store).nbytes


def test_what_is_young_stays_until_its_time_for_it_may_be_on_its_way(tmp_path):
    made = a_bit_of_everything(tmp_path)
    torn = OLD.attempt(8, 7)
    clear(made.store, Rules(keep=KEEP, older_than_s=DAY_S))
    assert steps(made.store) == [3, 4, 5, 6]
    assert made.store.list(torn.data), "somebody may copy it here, or finish it from the disk of its node"
    assert made.store.list(keys.PROBES)
    assert not made.store.list(OLD.attempt(1, 7).data), "its deletion had begun, and a later step is committed"
    found = leftovers.find(made.store, Rules(keep=KEEP, older_than_s=DAY_S), time.time())
    assert "too young" in found.spared[str(torn)]
    long_ago = time.time() - 2 * DAY_S
    for path in tmp_path.rglob("*"):
        os.utime(path, (long_ago, long_ago))
    clear(made.store, Rules(keep=KEEP, older_than_s=DAY_S))
    assert not made.store.list(torn.data)
    assert not made.store.list(keys.PROBES)


@pytest.mark.parametrize("skew_s", [-2 * DAY_S, 2 * DAY_S], ids=["behind", "ahead"])
def test_age_is_told_by_the_clock_that_the_store_dates_by(tmp_path, skew_s):
    class Misdating(PosixStore):
        def written_s(self, key: str) -> float | None:
            date = super().written_s(key)
            return None if date is None else date + skew_s

    a_bit_of_everything(tmp_path)
    torn = OLD.attempt(8, 7)
    store = Misdating(tmp_path)
    clear(store, Rules(keep=KEEP, older_than_s=DAY_S))
    assert store.list(torn.data), "it is young, whatever this machine's clock says"
    long_ago = time.time() - 1.5 * DAY_S
    for path in tmp_path.rglob("*"):
        os.utime(path, (long_ago, long_ago))
    clear(store, Rules(keep=KEEP, older_than_s=DAY_S))
    assert not store.list(torn.data)


def test_without_a_recorded_policy_every_checkpoint_stays(tmp_path):
    made = a_bit_of_everything(tmp_path)
    clear(made.store, Rules(older_than_s=0.0))
    assert steps(made.store) == [1, 2, 3, 4, 5, 6]


def test_damaged_checkpoints_go_only_when_asked_and_never_push_a_whole_one_out(tmp_path):
    made = a_bit_of_everything(tmp_path)
    made.damage(6, "shard")
    made.damage(5, "manifest")
    clear(made.store)
    assert steps(made.store) == [3, 4, 5, 6], "the two newest whole ones, and what is damaged"
    clear(made.store, Rules(keep=KEEP, older_than_s=0.0, damaged=True))
    assert steps(made.store) == [3, 4]


def test_the_newest_checkpoint_goes_only_by_force(tmp_path):
    made = a_bit_of_everything(tmp_path)
    before = files(tmp_path)
    with pytest.raises(RemovalRefusedError, match=r"step 6 .* newest .* nothing was deleted"):
        clear(made.store, Rules(steps=(6,), older_than_s=0.0))
    assert files(tmp_path) == before
    clear(made.store, Rules(steps=(6,), older_than_s=0.0, force_last=True))
    assert steps(made.store) == [1, 2, 3, 4, 5]


def test_the_last_commit_goes_only_by_force_even_if_it_is_damaged(tmp_path):
    made = Made(PosixStore(tmp_path))
    made.begin()
    made.commit(1)
    made.damage(1, "shard")
    made.end()
    with pytest.raises(RemovalRefusedError, match="the last commit there is"):
        clear(made.store, Rules(damaged=True, older_than_s=0.0))
    clear(made.store, Rules(damaged=True, older_than_s=0.0, force_last=True))
    assert steps(made.store) == []


def test_a_step_by_name_goes_unless_it_is_pinned_or_another_one_needs_its_files(tmp_path):
    made = Made(PosixStore(tmp_path))
    made.begin()
    for step in (1, 2, 3):
        made.commit(step, uses=1 if step == 3 else None)
    made.commit(4)
    made.pin(4)
    made.commit(5)
    made.end()
    clear(made.store, Rules(steps=(2,), older_than_s=0.0))
    assert steps(made.store) == [1, 3, 4, 5]
    with pytest.raises(RemovalRefusedError, match=r"step 4 .* \(pinned\)"):
        clear(made.store, Rules(steps=(4,)))
    with pytest.raises(RemovalRefusedError, match=r"step 1 .* files of step 3"):
        clear(made.store, Rules(steps=(1,)))
    clear(made.store, Rules(steps=(1, 3), older_than_s=0.0))
    assert steps(made.store) == [4, 5]


def test_a_checkpoint_that_is_pinned_while_the_others_go_stays_and_so_does_its_layout(tmp_path, monkeypatch):
    made = a_bit_of_everything(tmp_path)
    second = made.committed[2]

    class Pinning(PosixStore):
        def create(self, key: str, data: bytes) -> bool:
            if key == second.tombstone:
                sidefiles.pin(made.store, second, "wanted after all")
            return super().create(key, data)

    done = clear(Pinning(tmp_path))
    assert [one.attempt for one in done.held] == [second]
    assert discover.valid(made.store, second)
    assert steps(made.store) == [2, 3, 4, 5, 6]


def test_a_job_that_starts_meanwhile_takes_the_root_over_and_nothing_more_is_deleted(tmp_path):
    made = a_bit_of_everything(tmp_path)

    class Overtaken(PosixStore):
        deleted = 0

        def delete(self, key: str) -> None:
            super().delete(key)
            if key.startswith(keys.DATA) and not Overtaken.deleted:
                Overtaken.deleted += 1
                owning.claim(PosixStore(tmp_path))

    with pytest.raises(RunBusyError, match="has taken it over"):
        clear(Overtaken(tmp_path))
    assert steps(made.store) == [2, 3, 4, 5, 6]


def test_without_the_right_to_see_unfinished_uploads_the_rest_goes(tmp_path):
    class NoRight(PosixStore):
        def remove_unfinished(self, before: str | float, *, dry_run: bool = False) -> int:
            raise StoreAccessError("remove_unfinished", "", "AccessDenied")

    made = a_bit_of_everything(tmp_path)
    store = NoRight(tmp_path)
    assert "AccessDenied" in leftovers.find(store, AT_ANY_AGE, time.time()).remarks[0]
    clear(store)
    assert steps(made.store) == [3, 4, 5, 6]


def test_deletions_keep_to_a_rate():
    pauses: list[float] = []
    now = [0.0]

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    pace = clearing.Pace(lambda _: None, 4.0, clock=lambda: now[0], pause=pause)
    assert all(pace.more(10) for _ in range(9))
    assert (sum(pauses), pace.nbytes) == (2.0, 90)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("latest:3", Latest(3)),
        ("latest:3,best:2:loss:min,steps:1000", Latest(3) | Best(2, "loss", "min") | EveryNSteps(1000)),
        ("all", Everything()),
        ("hours:0.5, pinned", EveryHours(0.5) | Pinned()),
    ],
)
def test_a_policy_is_typed_in_a_line(text, wanted):
    assert policy.parse(text) == wanted


@pytest.mark.parametrize(
    "text", ["", "latest", "latest:x", "latest:0", "best:2:loss", "best:2:loss:up", "last:3", "latest:3,"]
)
def test_what_is_no_policy_is_refused(text):
    with pytest.raises(ConfigError):
        policy.parse(text)


# --- a real run, by the command line --------------------------------------------------------------


@pytest.fixture
def run(tmp_path) -> Path:
    model = torch.nn.Linear(4, 3)
    with dcpsvc.Checkpointer(tmp_path / "root", {"model": model}, local=tmp_path / "local", keep_local=9) as ckpt:
        for step in range(1, 6):
            ckpt.save(step, metrics={"loss": abs(step - 2.0)}).wait(30)
    return tmp_path


def told(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done.output


def _nbytes(place: Path, steps: Iterable[int]) -> int:
    """Of the shards of some steps."""
    shards = [path for step in steps for path in place.glob(f"data/step-{step:012d}.*/*")]
    return sum(path.stat().st_size for path in shards)


def test_the_table_of_what_was_removed_names_the_tier_of_each_thing(run):
    arguments = ("gc", run / "root", "--local", run / "local", "--keep", "latest:4", "--older-than", "0")
    gone = [line.split() for line in told(*arguments).splitlines() if line.startswith("gone")]
    assert [(step, tier) for _, _, step, _, tier, *_ in gone] == [("1", "remote"), ("1", "local")]


def test_the_command_clears_both_tiers_and_a_job_resumes_from_what_is_left(run):
    root, local = run / "root", run / "local"
    arguments = ("gc", root, "--local", local, "--keep", "latest:1,best:1:loss:min", "--older-than", "0")
    shown = told(*arguments, "--dry-run")
    assert "best 1 of 1 by loss (0)" in shown
    stay, gone = (sum(_nbytes(place, steps) for place in (root, *local.glob("*"))) for steps in ((2, 5), (1, 3, 4)))
    assert re.search(r"would be freed \(remote .*iB, local .*iB\)", shown)
    assert re.search(r"stay \(remote .*iB, local .*iB\)", shown)
    assert re.search(r"stays +step 2 \S+ +remote +\S+ [KM]iB +best 1 of 1", shown)
    found = json.loads(told(*arguments, "--dry-run", "--json"))
    assert [one["step"] for one in found["remove"] if one["kind"] == "checkpoint"] == [1, 3, 4]
    assert [one["step"] for one in found["local"] if one["kind"] == "attempt"] == [1, 3, 4]
    assert sum(found["staying_nbytes"].values()) == stay
    assert sum(one["nbytes"] for one in found["keep"]) == found["staying_nbytes"]["remote"] == stay // 2
    done = json.loads(told(*arguments, "--json"))
    assert (done["nbytes"], done["dry_run"]) == (found["nbytes"], False)
    assert done["freed_nbytes"] == {"remote": gone // 2, "local": gone // 2}
    assert [(one["tier"], one["step"]) for one in done["remove"]] == [("remote", step) for step in (1, 3, 4)]
    assert [(one["tier"], one["step"]) for one in done["local"]] == [("local", step) for step in (1, 3, 4)]
    assert [one.step for one in dcpsvc.list_checkpoints(root)] == [2, 5]
    assert sorted(path.name[:17] for path in local.glob("*/data/*")) == ["step-000000000002", "step-000000000005"]
    assert "nothing to remove" in told(*arguments)
    with dcpsvc.Checkpointer(root, {"model": torch.nn.Linear(4, 3)}, local=local, save_last=False) as ckpt:
        assert ckpt.resume() == 5


def test_an_upload_that_waits_on_this_disk_is_left_to_the_next_start(run):
    root, local = run / "root", run / "local"
    newest = discover.committed(open_root(root))[-1]
    (root / newest.manifest).unlink()
    told("gc", root, "--local", local, "--older-than", "0")
    with dcpsvc.Checkpointer(root, {"model": torch.nn.Linear(4, 3)}, local=local, save_last=False) as ckpt:
        assert ckpt.resume() == 5


def test_what_this_disk_has_of_the_run_that_was_copied_is_left_when_the_copy_is_cleared(run):
    root, copy, local = run / "root", run / "copy", run / "local"
    shutil.copytree(root, copy)
    before = sorted(local.rglob("*"))
    arguments = ("gc", copy, "--local", local, "--keep", "latest:1", "--older-than", "0")
    assert f"belongs to {root}" in told(*arguments, "--dry-run").replace("\n", "")
    assert json.loads(told(*arguments, "--json"))["local_of"] == str(root)
    assert sorted(local.rglob("*")) == before
    with dcpsvc.Checkpointer(copy, {"model": torch.nn.Linear(4, 3)}, local=local, save_last=False) as ckpt:
        assert ckpt.resume() == 5  # a job of the copy has this disk from now on
    told(*arguments)
    assert sorted(path.name[:17] for path in local.glob("*/data/*")) == ["step-000000000005"]


def test_a_root_that_a_live_job_writes_is_refused_and_left_as_it_is(run):
    root = run / "root"
    with dcpsvc.Checkpointer(root, {"x": 1}, local=run / "other", save_last=False) as ckpt:
        before = files(root)
        done = subprocess.run(
            [sys.executable, "-m", "dcpsvc", "gc", str(root), "--keep", "latest:1"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, "live job" in done.stderr) == (3, True), done.stderr
        assert files(root) == before
        assert "would be freed" in told("gc", root, "--keep", "latest:1", "--dry-run")
        ckpt.save(9).wait(30)


def test_a_zombie_of_the_job_before_commits_nothing_after_it(run, monkeypatch):
    root = run / "root"
    ckpt = dcpsvc.Checkpointer(root, {"x": 1}, local=run / "other", save_last=False)
    monkeypatch.setattr(live, "ranks", lambda of=None: [])  # as from another host
    told("gc", root, "--keep", "latest:1", "--take-over")
    with pytest.raises(FencedError):
        ckpt.save(9).wait(30)
    with pytest.raises(FencedError):
        ckpt.close()
    assert [one.step for one in dcpsvc.list_checkpoints(root) if one.state == "committed"] == [5]


def test_a_typed_policy_by_a_metric_that_no_checkpoint_has_is_refused_and_deletes_nothing(run):
    root = run / "root"
    before = files(root)
    for more in ((), ("--dry-run",), ("--json",)):
        said = told("gc", root, "--keep", "latest:1,best:1:nosuch:min", *more, code=2)
        assert "no checkpoint has 'nosuch'; they have loss" in " ".join(said.split())
    assert files(root) == before


def test_what_is_odd_about_a_policy_is_said_when_it_is_carried_out_too(run):
    dcpsvc.record_metrics(run / "root", 4, {"eval": 1.0})
    said = told("gc", run / "root", "--keep", "latest:1,best:1:eval:min")
    assert "step 1 has no 'eval'" in said
    assert "removed 3 checkpoints" in said


def test_wrong_usage_is_told_in_a_line(run):
    assert "is no rule" in told("gc", run / "root", "--keep", "newest:3", code=2)
    assert "keeps nothing" in told("gc", run / "root", "--keep", "pinned", code=2)
    for arguments, said in ((("--remove", "77"), "step 77"), (("--remove", "5"), "--force-last")):
        command = [sys.executable, "-m", "dcpsvc", "gc", str(run / "root"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, said in done.stderr) == (1, True), done.stderr
        assert "Traceback" not in done.stderr


# --- killed ---------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
@pytest.mark.parametrize("after", ["before", "after"])
def test_killed_around_any_change_the_next_call_finishes_and_nothing_that_is_kept_is_lost(tmp_path, after):
    rng = random.Random(after)
    points = [*range(3), *rng.sample(range(3, 40), 4)]
    for number in points:
        folder = tmp_path / f"{number}"
        made = a_bit_of_everything(folder)
        command = [sys.executable, "-m", "tests.unit.gc_roots", str(folder), str(number), after]
        killed = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=Path(gc_roots.__file__).parents[2]
        )
        assert killed.returncode == -signal.SIGKILL, (number, killed.stderr)
        for step in (3, 4, 5, 6):
            assert discover.valid(made.store, made.committed[step])
        clear(made.store)
        assert steps(made.store) == [3, 4, 5, 6]
        assert without_epochs(files(folder)) == without_epochs(_cleared(tmp_path / "never")), f"killed at {number}"


def _cleared(folder: Path) -> dict[str, bytes]:
    if not folder.exists():
        clear(a_bit_of_everything(folder).store)
    return files(folder)


# --- any run root ---------------------------------------------------------------------------------

LOSSES = st.sampled_from([0.0, -1.0, 2.0, 2.5, math.nan, math.inf, None])
CHECKPOINT = st.fixed_dictionaries(
    {
        "loss": LOSSES,
        "late": LOSSES,
        "pinned": st.sampled_from([False, False, False, True]),
        "lease": st.booleans(),
        "uses": st.none() | st.integers(0, 5),
        "own_layout": st.booleans(),
        "damage": st.sampled_from([None, None, None, None, "manifest", "shard"]),
        "orphan": st.booleans(),
    }
)
DEBRIS = st.tuples(st.integers(0, 30), st.booleans(), st.booleans())


@pytest.mark.timeout(300)
@settings(max_examples=150, deadline=None)
@given(
    about=st.lists(CHECKPOINT, min_size=1, max_size=8),
    debris=st.lists(DEBRIS, max_size=4, unique_by=lambda one: one[0]),
    policies=st.tuples(st.integers(1, 3), st.integers(0, 2), st.sampled_from(["min", "max"])),
    damaged=st.booleans(),
)
def test_of_any_run_root_exactly_what_must_stay_is_left_and_it_loads(about, debris, policies, damaged):
    made = any_root(about, debris)
    n, k, mode = policies
    chosen = Rules(keep=Latest(n) | Best(k, "loss", mode) if k else Latest(n), older_than_s=0.0, damaged=damaged)
    if not made.committed and damaged and made.damaged:
        with pytest.raises(RemovalRefusedError):
            clear(made.store, chosen)
        return
    done = clear(made.store, chosen)
    event(f"{min(len(done.removed), 6)} things removed")
    kept = expected(made, n, k, mode)
    assert set(steps(made.store)) == kept | (set() if damaged else {one.step for one in made.damaged})
    for step in kept:
        found = discover.read_manifest(made.store, made.committed[step])
        assert all(made.store.size(record.path) == record.nbytes for record in found.shards)
        assert made.store.size(found.layout.path) == found.layout.nbytes
    check_nothing_else(made, kept, damaged=damaged)
    before = dict(made.store.objects)
    clear(made.store, chosen)
    assert made.store.objects == before


def any_root(about, debris) -> Made:
    made = Made(Place("root"))
    made.begin()
    for number, one in enumerate(about):
        step = 3 * number + 1
        uses = None if one["uses"] is None else 3 * one["uses"] + 1
        # of a checkpoint that owns its shard 1
        uses = uses if uses in made.committed and uses not in made.needs else None
        made.commit(step, loss=one["loss"], uses=uses, own_layout=one["own_layout"])
        beside(made, step, one)
    for number, one in enumerate(about):
        if one["damage"] and 3 * number + 1 not in {*made.pinned, *made.needs.values()}:
            made.damage(3 * number + 1, one["damage"])
    for step, fenced, marked in debris:
        made.debris(step, fenced=fenced, marked=marked)
    made.end()
    return made


def beside(made: Made, step: int, one) -> None:
    if one["late"] is not None:
        made.record(step, one["late"])
    if one["pinned"]:
        made.pin(step)
    if one["lease"]:
        made.pin(step, until_s=1000)
    if one["orphan"]:
        made.store.put(made.committed[step].shard(9), b"of nobody")


def expected(made: Made, n: int, k: int, mode: str) -> set[int]:
    """By plain sorting."""
    steps = sorted(made.committed)
    able = [step for step in steps if math.isfinite(made.metrics.get(step, math.nan))]
    sign = 1 if mode == "min" else -1
    kept = set(steps[-n:]) | set(sorted(able, key=lambda step: (sign * made.metrics[step], step))[:k])
    kept |= made.pinned & set(steps)
    return kept | {made.needs[step] for step in kept if step in made.needs}


def check_nothing_else(made: Made, kept: set[int], *, damaged: bool) -> None:
    layouts = {discover.read_manifest(made.store, made.committed[step]).layout.path for step in kept}
    allowed = made.left(kept) | layouts
    mine = [made.committed[step] for step in kept] + ([] if damaged else made.damaged)
    unknown = not damaged and made.damaged
    for key in made.store.objects:
        of_kept = any(key.startswith((one.data, one.metrics, one.pins)) or key == one.manifest for one in mine)
        beside = of_kept and not key.endswith("rank-00009.safetensors") and ".until-" not in key
        orphan_of_damaged = unknown and key.endswith("rank-00009.safetensors")
        a_layout = unknown and keys.is_layout(key)  # a damaged manifest may mean any of them
        known = key in allowed or key.startswith(keys.EPOCHS) or beside or orphan_of_damaged or a_layout
        assert known, f"{key} is left"
    assert NEW.claim in made.store.objects

"""R27 R30: every way to divide a job: killed after a commit it goes on bit for bit, and each loads what each saved.

``pytest tests/ranks/test_parallelisms.py -s`` prints the matrix.
"""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import pytest

import dcpsvc
from tests.ranks.harness import die, run_ranks, values
from tests.ranks.models import checkpointer
from tests.ranks.parallelisms import KINDS, Job, Model

pytestmark = pytest.mark.timeout(300)

NAMES = sorted(f"model.{name}" for name in Model().state_dict())
"""What a checkpoint must call them, however the model is wrapped."""


@pytest.fixture(scope="module")
def runs():
    """A folder for the runs of each kind, made when it is first asked for."""
    folder = Path(tempfile.mkdtemp(prefix="dcpsvc-parallelisms-"))
    yield functools.cache(functools.partial(trained, folder))
    shutil.rmtree(folder)


def root_of(folder, kind):
    return folder / "".join(letter if letter.isalnum() else "-" for letter in kind) / "run"


# --- on the ranks -----------------------------------------------------------------------------------


def train_and_die(rank, world, root, kind):
    """Ten steps, a commit, ten more steps; what they gave is noted, and the job is killed."""
    job = Job(kind)
    ckpt = checkpointer(root, job.state, save_last=False)
    job.train(0, 10)
    prints = job.prints()
    ckpt.save(10).wait()
    losses = job.train(10, 10)
    (root.parent / f"{rank}.json").write_text(json.dumps({"losses": losses, "saved": prints, "end": job.prints()}))
    die()


def resume_and_train(rank, world, root, kind):
    job = Job(kind, seed=5)
    job.train(100, 2)
    with checkpointer(root, job.state, save_last=False) as ckpt:
        assert ckpt.resume() == 10
        prints = job.prints()
        losses = job.train(10, 10)
    return {"losses": losses, "saved": prints, "end": job.prints()}


def load_each(rank, world, roots, kind):
    job = Job(kind, seed=5)
    found = {}
    for other, root in roots.items():
        dcpsvc.load(root, job.state)
        found[other] = job.prints()
    return found


# --- what they are asked ----------------------------------------------------------------------------


def trained(folder, kind):
    """Root and, by rank, what was seen when the run of a kind was killed."""
    root = root_of(folder, kind)
    shutil.rmtree(root.parent, ignore_errors=True)  # one that failed costs its own tests, not those of all others
    root.parent.mkdir()
    outcomes = run_ranks(KINDS[kind][0], train_and_die, root, kind, timeout_s=100)
    assert {outcome.signal for outcome in outcomes} == {9}, [(each.rank, each.log[-4000:]) for each in outcomes]
    return root, [json.loads((root.parent / f"{outcome.rank}.json").read_text()) for outcome in outcomes]


def together(by_rank):
    """What the ranks know of, as one: they must agree where two know the same."""
    whole = {}
    for prints in by_rank:
        assert all(whole.get(key, value) == value for key, value in prints.items())
        whole |= prints
    return whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_killed_after_a_commit_goes_on_bit_for_bit(runs, kind):
    root, straight = runs(kind)
    assert values(run_ranks(KINDS[kind][0], resume_and_train, root, kind, timeout_s=100)) == straight


@pytest.mark.parametrize("kind", KINDS)
def test_the_names_in_a_checkpoint_are_those_of_the_model(runs, kind):
    root, _ = runs(kind)
    found = dcpsvc.storage_reader(root).layout.names()
    assert [name for name in found if name.startswith("model.")] == NAMES
    parameters = {name for name in NAMES if name != "model.scale"}
    states = {f"optim.state.{name[6:]}.{entry}" for name in parameters for entry in ("exp_avg", "exp_avg_sq", "step")}
    assert {name for name in found if name.startswith("optim.")} == states


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_any_kind_is_loaded_exactly_by_every_other(runs, kind, capsys):
    roots = {other: runs(other)[0] for other in KINDS}
    loaded = values(run_ranks(KINDS[kind][0], load_each, roots, kind, timeout_s=200))
    exact = {
        other: together(found[other] for found in loaded) == together(seen["saved"] for seen in runs(other)[1])
        for other in KINDS
    }
    with capsys.disabled():
        if kind == next(iter(KINDS)):
            print("\nloaded by, saved by " + ", ".join(KINDS))
        print(f"\n{kind:18}" + "".join("  exact" if fits else "  WRONG" for fits in exact.values()), end=" ")
    assert all(exact.values())

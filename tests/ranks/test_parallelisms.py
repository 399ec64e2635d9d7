"""R27 R30 R33: every way to divide a job: killed it goes on bit for bit, each loads what each saved, and exports it.

``pytest tests/ranks/test_parallelisms.py -s`` prints the matrix.
"""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import fully_shard

import dcpsvc
from dcpsvc import conversion
from dcpsvc.reading import open_root
from dcpsvc.tools.exporting import Source, export_hf
from tests.ranks.harness import die, run_ranks, values
from tests.ranks.models import checkpointer
from tests.ranks.parallelisms import KINDS, Job, Model, hashed
from tests.ranks.test_reading_together import Far

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


def resume_from_both_tiers(rank, world, root, kind):
    """Once from the disk that the ranks before have left, once from the run root alone; what came back, from where."""
    found = []
    for local in (root.parent / "local", root.parent / f"another-disk-{rank}"):
        job, store, told = Job(kind, seed=5), Far(root), []
        job.train(100, 2)
        options = {"store": store, "local": local, "save_last": False, "on_event": told.append}
        with checkpointer(root, job.state, **options) as ckpt:
            store.given_out.clear()
            assert ckpt.resume() == 10
            given_nbytes = sum(store.given_out.values())
            prints = job.prints()
            job.train(10, 1)
        detail = next(event.detail for event in told if event.name == dcpsvc.Point.RESUMED)
        found.append({"prints": prints, "given_nbytes": given_nbytes, "detail": detail})
    return found


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


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [("DDP", None), ("FSDP2 on 3", "dp=3"), ("HSDP 2x2", "replica=2 x shard=2"), ("FSDP2 x TP", "dp=2 x tp=2")],
)
def test_the_mesh_and_the_number_of_ranks_are_recorded(runs, kind, mesh):
    root, _ = runs(kind)
    (manifest,) = [json.loads(path.read_bytes()) for path in (root / "manifests").glob("order-*.json")]
    assert manifest["versions"].get("mesh") == mesh
    assert manifest["versions"]["world"] == str(KINDS[kind][0])


# --- a rank that owns nothing -----------------------------------------------------------------------


class Single:
    """One row, on whichever rank has it."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.model = fully_shard(nn.Linear(3, 1, bias=False))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.state = {"model": self.model, "optim": self.optimizer}

    def train(self, first, until):
        return [self.step(number) for number in range(first, until)]

    def step(self, number):
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(2, 3, generator=torch.Generator().manual_seed(number))).square().mean()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach()).hex()


def train_one_row_and_die(rank, world, root):
    single = Single(0)
    ckpt = checkpointer(root, single.state, save_last=False)
    single.train(0, 3)
    held = single.model.weight.to_local().numel()
    ckpt.save(3).wait()
    (root.parent / f"{rank}.json").write_text(json.dumps([held, single.train(3, 6)]))
    die()


def resume_one_row(rank, world, root):
    single = Single(5)
    with checkpointer(root, single.state, save_last=False) as ckpt:
        assert ckpt.resume() == 3
        return single.train(3, 6)


def test_ranks_that_own_nothing_save_and_resume_with_the_others(tmp_path):
    root = tmp_path / "run"
    outcomes = run_ranks(3, train_one_row_and_die, root)
    assert {outcome.signal for outcome in outcomes} == {9}, [each.log[-4000:] for each in outcomes]
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [held for held, _ in told] == [3, 0, 0]
    for world in (3, 2):
        assert values(run_ranks(world, resume_one_row, root)) == [losses for _, losses in told[:world]]


# --- each loads what each saved ---------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("saved", "kind"),
    [("TP", "FSDP2 x TP"), ("FSDP2 x TP", "TP"), ("FSDP2 x TP", "FSDP2 on 3"), ("HSDP 2x2", "FSDP2 x TP")],
)
def test_another_mesh_goes_on_exactly_from_the_disk_of_the_one_before_and_from_the_run_root(runs, saved, kind):
    root, straight = runs(saved)
    wanted = together(seen["saved"] for seen in straight)
    ranks = values(run_ranks(KINDS[kind][0], resume_from_both_tiers, root, kind, timeout_s=100))
    for near, far in ranks:
        assert near["given_nbytes"] == 0
        assert "from local disks" in near["detail"]
        assert "from local disks" not in far["detail"]
        assert "from the run root" in far["detail"]
    assert sum(far["given_nbytes"] for _, far in ranks) > 0
    for found in zip(*ranks, strict=True):
        assert together(each["prints"] for each in found) == wanted


# --- exported ---------------------------------------------------------------------------------------


def of_hf(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def of_dcp(folder):
    kinds = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: kind for name, kind in kinds.items() if isinstance(kind, TensorStorageMetadata)}
    state = {name: torch.empty(kind.size, dtype=kind.properties.dtype) for name, kind in tensors.items()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return {name.replace("optim.state.", "optim."): tensor for name, tensor in state.items()}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_holds_every_byte_that_was_saved(runs, kind, tmp_path):
    root, seen = runs(kind)
    saved = together(each["saved"] for each in seen)
    store = open_root(root)
    source = Source(store, 10, "model")
    export_hf(source, tmp_path / "hf", max_shard_nbytes=800)
    conversion.export_torch(source, store, tmp_path / "torch")
    conversion.export_dcp(store, 10, tmp_path / "dcp")
    model = {name: told for name, told in saved.items() if name.startswith("model.")}
    for found in (of_hf(tmp_path / "hf"), torch.load(tmp_path / "torch" / "model.pt", weights_only=True)):
        assert {f"model.{name}": hashed(tensor) for name, tensor in found.items()} == model
    assert {name: hashed(tensor) for name, tensor in of_dcp(tmp_path / "dcp").items()} == saved


def test_the_table_of_the_docs_has_every_kind_and_its_ranks():
    text = (Path(__file__).parents[2] / "docs" / "states.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    told = {row[0]: row[1:] for row in rows if len(row) == 4}
    assert {kind: told.get(kind) for kind in KINDS} == {
        kind: [str(ranks or 1), "exact", "exact"] for kind, (ranks, _) in KINDS.items()
    }

"""R27 R31: optimizer state made late, or no longer changing, averages and scalers: killed, they go on bit for bit.

All cases run inside one start of the ranks, each with a run root of its own.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dcpsvc
from tests.ranks.harness import die, run_ranks, values
from tests.ranks.models import checkpointer

pytestmark = pytest.mark.timeout(200)

SAVED_AT, UNTIL = 8, 16

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, fused=True),
    "AdamW foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, foreach=True),
}
WRAPPERS = ("DDP", "FSDP2", "DDP inside")
CASES = [
    *((wrap, name, fate) for wrap in WRAPPERS[:2] for name in OPTIMIZERS for fate in ("late", "frozen")),
    *((wrap, "AdamW foreach", extra) for wrap in WRAPPERS for extra in ("average", "scaler")),
]
"""``late``: a part has its first gradient after the resume. ``frozen``: it had some, and is frozen over the resume."""


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.part, self.head = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 2)

    def forward(self, x, *, with_part):
        x = self.first(x).tanh()
        return self.head(self.part(x).tanh() if with_part else x)


class Outer(nn.Module):
    """Only what is inside is divided."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, *, with_part):
        return self.inner(x, with_part=with_part)


def wrapped(wrap, core):
    if wrap == "FSDP2":
        fully_shard(core.part)
        return fully_shard(core, reshard_after_forward=True)  # an average has no backward to do that
    found = DistributedDataParallel(core, find_unused_parameters=True)
    return Outer(found) if wrap == "DDP inside" else found


def averaged(wrap, model):
    """FSDP2 cannot be copied: its average is divided by itself."""
    average = AveragedModel(Model() if wrap == "FSDP2" else model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    if wrap == "FSDP2":
        wrapped(wrap, average.module)
    return average


class Run:
    """One rank of one case."""

    def __init__(self, case, rank, seed=0):
        self.wrap, name, self.what = case
        self.rank = rank
        torch.manual_seed(seed)
        self.core = Model()
        self.model = wrapped(self.wrap, self.core)
        self.optimizer = OPTIMIZERS[name](self.model.parameters())
        self.state = {"model": self.model, "optim": self.optimizer}
        if self.what == "average":
            self.state["ema"] = averaged(self.wrap, self.model)
        if self.what == "scaler":
            self.state["scaler"] = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)

    def train(self, first, until):
        return [self.step(number) for number in range(first, until)]

    def step(self, number):
        """What it gave, to the last bit."""
        self.core.part.requires_grad_(self.what != "frozen" or not SAVED_AT - 3 <= number < SAVED_AT + 3)
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(100 * number + self.rank))
        self.optimizer.zero_grad()
        loss = self.model(x, with_part=self.what != "late" or number >= SAVED_AT + 2).square().mean()
        scaler = self.state.get("scaler")
        if scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            scaler.scale(loss * (torch.inf if number == SAVED_AT - 1 else 1)).backward()
            scaler.step(self.optimizer)
            scaler.update()
        seen = [float(loss.detach()).hex()]
        if scaler is not None:
            seen.append(scaler.get_scale())
        if self.what == "average":
            self.state["ema"].update_parameters(self.model)
            seen.append(float(self.state["ema"](x, with_part=True).detach().square().mean()).hex())
            seen.append(int(self.state["ema"].n_averaged))
        return seen


def place_of(root, case):
    return root / "-".join(case).replace(" ", "-") / "run"


def train_and_die(rank, world, root):
    seen, open_ = {}, []
    for case in CASES:
        run = Run(case, rank)
        open_.append(ckpt := checkpointer(place_of(root, case), run.state, save_last=False))
        run.train(0, SAVED_AT)
        ckpt.save(SAVED_AT).wait()
        seen["-".join(case)] = run.train(SAVED_AT, UNTIL)
    (root / f"{rank}.json").write_text(json.dumps(seen))
    die()


def resume_and_train(rank, world, root):
    seen = {}
    for case in CASES:
        run = Run(case, rank, seed=5)
        run.train(100, 102)
        with checkpointer(place_of(root, case), run.state, save_last=False) as ckpt:
            assert ckpt.resume() == SAVED_AT
            seen["-".join(case)] = run.train(SAVED_AT, UNTIL)
    return seen


@pytest.fixture(scope="module")
def runs():
    """By rank: what each case gave without a break, and what it gave after the kill; and the names it saved."""
    with tempfile.TemporaryDirectory(prefix="dcpsvc-optimizers-") as folder:
        root = Path(folder)
        for case in CASES:
            place_of(root, case).parent.mkdir()
        outcomes = run_ranks(2, train_and_die, root, timeout_s=90)
        assert {outcome.signal for outcome in outcomes} == {9}, [(each.raised, each.log[-4000:]) for each in outcomes]
        straight = [json.loads((root / f"{rank}.json").read_text()) for rank in range(2)]
        resumed = values(run_ranks(2, resume_and_train, root, timeout_s=90))
        names = {case: dcpsvc.storage_reader(place_of(root, case)).layout.names() for case in CASES}
        yield straight, resumed, names


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_killed_after_a_commit_the_losses_are_those_of_a_run_without_a_break(runs, case):
    straight, resumed, _ = runs
    name = "-".join(case)
    assert [one[name] for one in resumed] == [one[name] for one in straight]
    assert straight[0][name] != straight[1][name]  # each rank its own batches


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_the_names_are_those_of_the_model_and_of_its_average_whatever_wraps_them(runs, wrap):
    inside = "inner." if wrap == "DDP inside" else ""
    names = {f"{component}.{inside}{name}" for component in ("model", "ema") for name in Model().state_dict()}
    found = runs[2][wrap, "AdamW foreach", "average"]
    assert {name for name in found if not name.startswith("optim.")} == names | {"ema.n_averaged"}

"""R34: what PEFT trains inside a larger model, on two ranks, killed and gone on; its folder is PEFT's own."""

import importlib.util
import re

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dcpsvc
from tests.ranks.harness import die, raised_by, run_ranks, values
from tests.ranks.models import checkpointer

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="not installed: peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),  # between the two libraries
]


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))


class Outer(nn.Module):
    """Of which PEFT knows only what is inside."""

    def __init__(self):
        import peft

        super().__init__()
        torch.manual_seed(1)
        self.front = nn.Linear(6, 6).requires_grad_(requires_grad=False)
        self.inner = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["0", "2"], lora_dropout=0.25))

    def forward(self, x):
        return self.inner(self.front(x))


def job(rank, world, root, wrap):
    model = Outer()
    if wrap == "FSDP2":
        model = fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    trained = DistributedDataParallel(model) if wrap == "DDP" else model
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.1)
    torch.manual_seed(10 + rank)  # dropout and data are this rank's
    state = {"model": trained, "optim": optimizer, "rng": dcpsvc.Rng(), "own": dcpsvc.PerRank({"rank": rank})}
    return state, checkpointer(root, state, only="trainable", save_last=False, adapter_folder="model")


def slices(state):
    """What this rank holds of what is trained, its moments included."""
    tensors = {name: p.detach() for name, p in state["model"].named_parameters() if p.requires_grad}
    for number, moments in enumerate(state["optim"].state.values()):
        tensors |= {f"{number}.{name}": moment for name, moment in moments.items()}
    return {name: (t.to_local() if isinstance(t, DTensor) else t).tolist() for name, t in tensors.items()}


def whole(state):
    """The adapter of all ranks together."""
    found = {name: p.detach() for name, p in state["model"].named_parameters() if p.requires_grad}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).tolist() for name, t in found.items()}


def steps(state, ckpt, start, until):
    """Losses; a commit at step 6, and what there is then."""
    losses, then = [], None
    with ckpt:
        for step in range(start + 1, until + 1):
            loss = state["model"](torch.randn(4, 6)).square().mean()
            loss.backward()
            state["optim"].step()
            state["optim"].zero_grad()
            losses.append(float(loss.detach()).hex())
            if step == 6:
                ckpt.save(6).wait()
                then = slices(state), whole(state)
            if step == 8 < until == 9:
                die()
    return losses, then


def straight(rank, world, root, wrap):
    losses, then = steps(*job(rank, world, root, wrap), 0, 12)
    return losses[6:], *then


def killed(rank, world, root, wrap):
    steps(*job(rank, world, root, wrap), 0, 9)


def resumed(rank, world, root, wrap):
    state, ckpt = job(rank, world, root, wrap)
    assert ckpt.resume() == 6
    assert state["own"].value == {"rank": rank}
    then = slices(state), whole(state)
    losses, _ = steps(state, ckpt, 6, 12)
    return losses, *then


@pytest.mark.parametrize("wrap", ["DDP", "FSDP2"])
def test_an_adapter_inside_a_larger_model_goes_on_bit_for_bit_and_peft_loads_its_folder(tmp_path, wrap):
    import peft

    expected = values(run_ranks(2, straight, tmp_path / "straight", wrap, timeout_s=120))
    outcomes = run_ranks(2, killed, tmp_path / "run", wrap, timeout_s=120)
    assert {outcome.signal for outcome in outcomes} == {9}, outcomes
    found = values(run_ranks(2, resumed, tmp_path / "run", wrap, timeout_s=120))
    assert found == expected
    assert (found[0][1] == found[1][1]) == (wrap == "DDP")  # sharded, each rank has its own
    assert found[0][0] != found[1][0]
    names = dcpsvc.storage_reader(tmp_path / "run", 6).layout.names()
    assert {name.rsplit(".", 3)[1] for name in names if name.startswith("model.")} == {"lora_A", "lora_B"}
    (folder,) = (tmp_path / "run" / "data").glob("step-000000000006*/adapter")
    loaded = peft.PeftModel.from_pretrained(base(), folder)
    here = {name: p.tolist() for name, p in loaded.named_parameters() if "lora" in name}
    prefix = "module.inner." if wrap == "DDP" else "inner."
    assert here == {name.removeprefix(prefix): value for name, value in found[0][2].items()}


def over_a_named_base(rank, world, root, wrap, name):
    """Saves over the first base of all, or says what a resume over one comes to, and whether nothing is touched."""
    model = Outer()
    if name == "tiny-other":
        with torch.no_grad():
            model.front.weight[0, 0] += 1
    model.inner.peft_config["default"].base_model_name_or_path = name
    if wrap == "FSDP2":
        model = fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    state = {"model": DistributedDataParallel(model) if wrap == "DDP" else model}
    with checkpointer(root, state, only="trainable", save_last=False) as ckpt:
        before = whole(state)
        error = raised_by(ckpt.resume)
        if not dcpsvc.list_checkpoints(root):
            ckpt.save(1).wait()
        return error, whole(state) == before


@pytest.mark.parametrize(("saved", "resumed"), [("DDP", "FSDP2"), ("FSDP2", "DDP")])
def test_a_base_that_peft_calls_otherwise_is_refused_by_both_names_on_every_rank(tmp_path, saved, resumed):
    values(run_ranks(2, over_a_named_base, tmp_path / "run", saved, "tiny-one"))
    assert dcpsvc.storage_reader(tmp_path / "run").manifest.versions["base.model"].startswith("tiny-one ")
    for error, untouched in values(run_ranks(2, over_a_named_base, tmp_path / "run", resumed, "tiny-other")):
        assert error.type == "RestoreFailedError"
        assert re.search(r"tiny-one [0-9a-f]{16}.* tiny-other [0-9a-f]{16}", error.text), error.text
        assert untouched
    same = values(run_ranks(2, over_a_named_base, tmp_path / "run", resumed, "tiny-one"))
    assert [error for error, _ in same] == [None, None]

"""R27 R32 R34: jobs of two ranks as the ecosystem's libraries run them, killed after a commit, go on bit for bit."""

import importlib.util
import json
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dcpsvc
from tests.ranks.harness import die, run_ranks, values
from tests.ranks.models import checkpointer

pytestmark = pytest.mark.timeout(300)


def needs(*names):
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def alone(tmp_path, straight, killed, resumed, *more):
    """What a run without a break saw after step 6, and what one that was killed there saw."""
    whole = values(run_ranks(2, straight, tmp_path / "straight", *more, timeout_s=120))
    outcomes = run_ranks(2, killed, tmp_path / "run", *more, timeout_s=120)
    assert {outcome.signal for outcome in outcomes} == {9}, outcomes
    return whole, values(run_ranks(2, resumed, tmp_path / "run", *more, timeout_s=120))


# --- accelerate -----------------------------------------------------------------------------------------


def accelerated(root, kind):
    """The loop of accelerate's own examples."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, DistributedType, FullyShardedDataParallelPlugin

    from dcpsvc.integrations.accelerate import Checkpoints

    config = DataLoaderConfiguration(use_stateful_dataloader=True, use_seedable_sampler=True, data_seed=2)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2) if kind == "FSDP2" else None
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, dataloader_config=config, fsdp_plugin=plugin)
    if kind == "FSDP2":  # without a GPU it wraps in DDP all the same, and says nothing; its own FSDP2 can be asked for
        assert accelerator.distributed_type is DistributedType.MULTI_CPU
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.25), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    data = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    torch.manual_seed(10 + accelerator.process_index)
    options = {"local": root.parent / f"{root.name}-local", "save_last": False, "sync_timeout_s": 30}
    return accelerator, (model, optimizer, loader, schedule), Checkpoints(accelerator, root, **options)


def accelerate_steps(root, kind, commit, until):
    """Batches, two to a step, 8 steps to an epoch; what each gave, by the step it belongs to."""
    accelerator, (model, optimizer, loader, schedule), run = accelerated(root, kind)
    assert {isinstance(parameter, DTensor) for parameter in model.parameters()} == {kind == "FSDP2"}
    seen = []
    with run:
        run.resume()
        while True:
            for x in run.batches(loader):
                with accelerator.accumulate(model):
                    loss = model(x + torch.randn(3)).square().mean()
                    accelerator.backward(loss)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                seen.append((run.epoch, run.number, float(loss.detach()).hex(), x[:, 0].tolist()))
                run.step()
                if accelerator.sync_gradients and run.number == commit:
                    run.checkpointer.save(commit).wait()
                if run.number == until:
                    return seen


def accelerate_straight(rank, world, root, kind, commit):
    return [each for each in accelerate_steps(root, kind, commit, 20) if each[1] >= commit]


def accelerate_killed(rank, world, root, kind, commit):
    accelerate_steps(root, kind, commit, commit + 2)
    die()


def accelerate_resumed(rank, world, root, kind, commit):
    return accelerate_steps(root, kind, None, 20)


@needs("accelerate", "torchdata")
@pytest.mark.parametrize("commit", [6, 8], ids=["inside an epoch", "after its last batch"])
@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_what_accelerate_prepared_goes_on_in_the_data_bit_for_bit(tmp_path, kind, commit):
    straight, resumed = alone(tmp_path, accelerate_straight, accelerate_killed, accelerate_resumed, kind, commit)
    assert resumed == straight
    assert resumed[0][0][0] == (0 if commit == 6 else 1)
    assert resumed[0][-1][0] == 2
    assert resumed[0] != resumed[1]  # each rank its own data
    layout = dcpsvc.storage_reader(tmp_path / "run").layout
    assert [name for name in layout.names() if name.startswith("model.")] == [
        "model.0.bias", "model.0.weight", "model.2.bias", "model.2.weight",
    ]  # fmt: skip


def accelerate_without_positions(rank, world, root):
    from accelerate import Accelerator

    from dcpsvc.integrations.accelerate import Checkpoints

    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(torch.utils.data.DataLoader(torch.randn(8, 3)))
    with Checkpoints(accelerator, root, local=root.parent / "disk") as run:
        next(run.batches(loader))


@needs("accelerate", "torchdata")
def test_a_loader_of_accelerate_that_cannot_tell_where_it_is_is_refused_with_the_remedy(tmp_path):
    (outcome,) = run_ranks(1, accelerate_without_positions, tmp_path / "run", timeout_s=120)
    assert outcome.raised is not None
    assert "use_stateful_dataloader=True" in outcome.raised.text


def trainer_that_asks_for_fsdp(rank, world, root):
    import transformers

    given = transformers.TrainingArguments(str(root), use_cpu=True, fsdp=True, report_to=[])
    made = transformers.Trainer(model=nn.Linear(3, 1), args=given)
    return made.accelerator.distributed_type.value, made.is_fsdp_enabled


@needs("accelerate", "transformers")
def test_a_trainer_that_asks_for_fsdp_has_ddp_without_a_gpu(tmp_path):
    told = values(run_ranks(2, trainer_that_asks_for_fsdp, tmp_path / "out", timeout_s=120))
    assert told == [("MULTI_CPU", False)] * 2


# --- lightning ------------------------------------------------------------------------------------------


def trained_by_lightning(root, until, kind):
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
    from torchdata.stateful_dataloader import StatefulDataLoader

    from dcpsvc.integrations.lightning import Checkpoints

    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # it has joined

    class Regression(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
            self.seen = []

        def configure_model(self):
            if kind == "FSDP2":
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch, batch_idx):
            if self.global_step == until:
                checkpoints.checkpointer.wait()
                die()
            loss = self.net(batch).square().mean()
            self.seen.append((self.global_step, batch[:, 0].tolist(), float(loss.detach()).hex()))
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]

    checkpoints = Checkpoints(root, every=dcpsvc.Every(steps=3), local=root.parent / "local", save_last=False)
    module = Regression()
    torch.manual_seed(1 + dist.get_rank())
    data = torch.arange(40 * 3, dtype=torch.float32).view(40, 3) + 1000 * dist.get_rank()
    loader = StatefulDataLoader(data, batch_size=4, shuffle=True)
    strategy = {
        "DDP": lambda: DDPStrategy(process_group_backend="gloo"),
        "FSDP2": lambda: ModelParallelStrategy(2, 1, process_group_backend="gloo"),
    }
    trainer = pl.Trainer(
        max_epochs=2, callbacks=[checkpoints], enable_checkpointing=False, logger=False, accelerator="cpu", devices=2,
        strategy=strategy[kind](), plugins=[TorchElasticEnvironment()],
        use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=root.parent,
    )  # fmt: skip
    trainer.fit(module, loader)
    return [seen for seen in module.seen if seen[0] >= 6], sorted({type(p).__name__ for p in module.parameters()})


def lightning_straight(rank, world, root, kind):
    root.parent.mkdir(exist_ok=True)
    return trained_by_lightning(root / "root", None, kind)


def lightning_killed(rank, world, root, kind):
    trained_by_lightning(root / "root", 8, kind)


@needs("lightning", "torchdata")
@pytest.mark.parametrize(("kind", "parameters"), [("DDP", "Parameter"), ("FSDP2", "DTensor")])
def test_a_lightning_run_of_two_ranks_killed_goes_on_inside_the_epoch(tmp_path, kind, parameters):
    straight, resumed = alone(tmp_path, lightning_straight, lightning_killed, lightning_straight, kind)
    assert resumed == straight
    assert {tuple(kinds) for _, kinds in straight} == {(parameters,)}
    assert len(straight[0][0]) == 14
    assert straight[0] != straight[1]


@needs("lightning")
def test_lightning_itself_refuses_fsdp1_without_a_gpu():
    import lightning.pytorch as pl

    with pytest.raises(ValueError, match=r"strategy `fsdp` requires a GPU accelerator, but received"):
        pl.Trainer(strategy=pl.strategies.FSDPStrategy(), accelerator="cpu", devices=2, logger=False)


# --- a loop like torchtitan's -----------------------------------------------------------------------------


class TitanState:
    """Counters, as tensors and numbers."""

    def __init__(self):
        self.step, self.tokens = 0, torch.tensor(0)

    def state_dict(self):
        return {"step": torch.tensor(self.step), "ntokens_seen": self.tokens}

    def load_state_dict(self, state):
        self.step, self.tokens = int(state["step"]), state["ntokens_seen"]


class TitanLoader:
    """Its state is bytes under the name of the data-parallel rank, as torchtitan's is: ours to store, not to read."""

    def __init__(self, rank):
        self.rank, self.at = rank, 0

    def next(self):
        self.at += 1
        return torch.randn(4, 12, generator=torch.Generator().manual_seed(1000 * self.rank + self.at))

    def state_dict(self):
        return {f"dp_rank_{self.rank}": pickle.dumps({"at": self.at}), "world_size": 2}

    def load_state_dict(self, state):
        self.at = pickle.loads(state[f"dp_rank_{self.rank}"])["at"]  # noqa: S301 - its own


class TitanOptimizers(torch.optim.Optimizer):
    """Those of several parts of a model as one, which has no state of its own."""

    def __init__(self, optimizers):
        self.optimizers = optimizers
        super().__init__([p for each in optimizers for group in each.param_groups for p in group["params"]], {})


class TitanSchedules:
    """Likewise."""

    def __init__(self, parts):
        self.parts = parts

    def state_dict(self):
        return {str(number): part.state_dict() for number, part in enumerate(self.parts)}

    def load_state_dict(self, state):
        for number, part in enumerate(self.parts):
            part.load_state_dict(state[str(number)])


def titan(rank, world, root):
    torch.manual_seed(0)
    model = nn.ModuleDict({str(n): nn.Sequential(nn.Linear(12, 24), nn.SiLU(), nn.Linear(24, 12)) for n in range(2)})
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp_shard",))
    for block in model.values():
        fully_shard(block, mesh=mesh)
    compiled = [torch.compile(block, backend="eager") for block in model.values()]
    optimizers = [torch.optim.AdamW(block.parameters(), lr=0.01) for block in model.values()]
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 / (1 + step)) for each in optimizers]
    train = TitanState()
    state = {
        "model": model, "optim": TitanOptimizers(optimizers), "lr": TitanSchedules(schedules),
        "loader": dcpsvc.PerRank(TitanLoader(rank)), "train_state": train,
    }  # fmt: skip
    return (
        state,
        compiled,
        optimizers,
        schedules,
        checkpointer(root, state, every=dcpsvc.Every(steps=6), save_last=False),
    )


def titan_steps(job, until):
    state, compiled, optimizers, schedules, ckpt = job
    losses, train = [], state["train_state"]
    while train.step < until:
        train.step += 1
        x = state["loader"].value.next()
        train.tokens = train.tokens + x.numel()
        loss = compiled[1](compiled[0](x)).square().mean()
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        losses.append((train.step, float(loss.detach()).hex(), int(train.tokens)))
        ckpt.step(train.step)
    ckpt.wait()
    return losses


def titan_straight(rank, world, root):
    job = titan(rank, world, root)
    with job[-1] as ckpt:
        ckpt.resume()
        return titan_steps(job, 12)[-6:]


def titan_killed(rank, world, root):
    titan_steps(titan(rank, world, root), 8)
    die()


def test_a_loop_like_that_of_torchtitan_goes_on(tmp_path):
    straight, resumed = alone(tmp_path, titan_straight, titan_killed, titan_straight)
    assert resumed == straight
    assert straight[0] != straight[1]


# --- adapters ---------------------------------------------------------------------------------------------


def adapter(rank, wrap, mark):
    """A frozen base and two factors; every rank knows what its slice of them was, for they are all different."""
    torch.manual_seed(0)
    model = nn.Module()
    model.base = nn.Linear(6, 6).requires_grad_(requires_grad=False)
    model.inner = nn.Module()
    model.inner.down, model.inner.up = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.zeros(6, 5))
    model.forward = lambda x: model.base(x) + x @ model.inner.down.T @ model.inner.up.T
    if wrap == "FSDP2":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    trained = DistributedDataParallel(model) if wrap == "DDP" else model
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.1)
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            local = parameter.to_local() if wrap == "FSDP2" else parameter
            local.copy_(
                torch.arange(local.numel()).view(local.shape) + mark * (100 * number + 1000 * rank * (wrap == "FSDP2"))
            )
    return model, trained, optimizer


def slices(model, wrap):
    found = {}
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if wrap == "FSDP2" else parameter
        found[name] = (list(local.shape), local.flatten().tolist())
    return found


def save_adapter(rank, world, root, wrap):
    model, trained, optimizer = adapter(rank, wrap, 1)
    with checkpointer(root, {"model": trained, "optim": optimizer}, only="trainable", save_last=False) as ckpt:
        ckpt.save(1).wait()
    return slices(model, wrap)


def load_adapter(rank, world, root, wrap):
    model, trained, optimizer = adapter(rank, wrap, 0)
    with checkpointer(root, {"model": trained, "optim": optimizer}, only="trainable", save_last=False) as ckpt:
        ckpt.resume()
    return slices(model, wrap)


@pytest.mark.parametrize("wrap", ["DDP", "FSDP2"])
def test_of_an_adapter_every_rank_gets_its_own_slice_back_and_the_base_is_not_stored(tmp_path, wrap):
    saved = values(run_ranks(2, save_adapter, tmp_path / "run", wrap))
    assert (saved[0]["inner.down"] == saved[1]["inner.down"]) == (wrap == "DDP")
    assert values(run_ranks(2, load_adapter, tmp_path / "run", wrap)) == saved
    names = [name for name in dcpsvc.storage_reader(tmp_path / "run").layout.names() if name.startswith("model.")]
    assert names == ["model.inner.down", "model.inner.up"]
    other = {"DDP": "FSDP2", "FSDP2": "DDP"}[wrap]
    (loaded, _) = values(run_ranks(2, load_adapter, tmp_path / "run", other))
    rows = loaded["inner.up"][0][0]
    assert json.dumps(loaded["inner.up"][1][: 5 * min(rows, 3)]) == json.dumps(
        saved[0]["inner.up"][1][: 5 * min(rows, 3)]
    )

"""R27 R32: a Lightning run goes on where it was, bit for bit, from our checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import dcpsvc
from tests.unit.one_process import told

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

lightning = pytest.importorskip("lightning.pytorch")
stateful = pytest.importorskip("torchdata.stateful_dataloader")

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),  # theirs
]


class Interrupted(Exception):  # noqa: N818 - as a kill would be
    pass


class Regression(lightning.LightningModule):
    def __init__(self, until: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        self.until, self.seen, self.losses = until, [], []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.until:
            raise Interrupted
        loss = self.net(batch).square().mean()
        self.seen.append(batch[:, 0].tolist())
        self.losses.append(float(loss.detach()).hex())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


class Passes(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Another order each time, which it counts by itself."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data, self.passes, self.at, self.goes_on = data, 0, 0, False

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.at, self.goes_on = self.at if self.goes_on else 0, False
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.passes)).tolist()
        while self.at < len(order):
            self.at += 1
            yield self.data[order[self.at - 1]]
        self.passes, self.at = self.passes + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"passes": self.passes, "at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.passes, self.at, self.goes_on = state["passes"], state["at"], True


def fit(folder: Path, *, until: int | None = None, counts: bool = False) -> Regression:
    from dcpsvc.integrations.lightning import Checkpoints

    checkpoints = Checkpoints(
        folder / "root", every=dcpsvc.Every(steps=5), local=folder / "local", save_last=until is None
    )
    module = Regression(until)
    torch.manual_seed(1)
    data = torch.arange(40 * 3, dtype=torch.float32).view(40, 3)
    kind = {"dataset": Passes(data)} if counts else {"dataset": data, "shuffle": True}
    loader = stateful.StatefulDataLoader(batch_size=4, **kind)
    trainer = lightning.Trainer(
        max_epochs=3, callbacks=[checkpoints], enable_checkpointing=False, logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    try:
        trainer.fit(module, loader)
    except Interrupted:
        assert until is not None
    return module


@pytest.mark.parametrize(("until", "committed"), [(17, [5, 10, 15]), (12, [5, 10])], ids=["inside", "between epochs"])
def test_a_run_killed_between_two_saves_goes_on_bit_for_bit(tmp_path: Path, until: int, committed: list[int]) -> None:
    straight = fit(tmp_path / "straight")
    assert len(straight.losses) == 30
    fit(tmp_path, until=until)
    assert [found.step for found in dcpsvc.list_checkpoints(tmp_path / "root")] == committed
    second = fit(tmp_path)
    assert second.seen == straight.seen[committed[-1] :]
    assert second.losses == straight.losses[committed[-1] :]
    assert told(dict(second.state_dict())) == told(dict(straight.state_dict()))
    assert dcpsvc.latest(tmp_path / "root").step == 30
    assert dcpsvc.latest(tmp_path / "root").metrics["loss"] > 0


def test_data_that_counts_its_passes_goes_on_with_the_next_one_between_epochs(tmp_path: Path) -> None:
    straight = fit(tmp_path / "straight", counts=True)
    assert len({str(straight.seen[begin : begin + 10]) for begin in (0, 10, 20)}) == 3
    fit(tmp_path, until=12, counts=True)
    assert fit(tmp_path, counts=True).seen == straight.seen[10:]


class Validated(Regression):
    """Its validation says ten times the step, and what it is called in training too."""

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", 10.0 * self.global_step, batch_size=1)

    def on_validation_epoch_end(self) -> None:
        self.log("val_score", -10.0 * self.global_step)


def validated(folder: Path, *, val_check_interval: int, max_steps: int = 20, **options: Any) -> dict[int, Any]:
    """The metrics of each commit of a run of 10 steps an epoch."""
    from dcpsvc.integrations.lightning import Checkpoints

    data = torch.arange(40 * 3, dtype=torch.float32).view(40, 3)
    trainer = lightning.Trainer(
        max_steps=max_steps, val_check_interval=val_check_interval, logger=False, accelerator="cpu",
        callbacks=[Checkpoints(folder / "root", local=folder / "local", **options)], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    trainer.fit(Validated(None), loader, torch.utils.data.DataLoader(data[:2]))
    return {found.step: found.metrics for found in dcpsvc.list_checkpoints(folder / "root")}


def values_of(found: dict[int, Any]) -> dict[int, float | None]:
    assert all("loss" in metrics for metrics in found.values())
    assert all(metrics.get("val_score", 0) == -metrics.get("val_loss", 0) for metrics in found.values())
    return {step: metrics.get("val_loss") for step, metrics in found.items()}


@pytest.mark.parametrize(
    ("val_check_interval", "every", "expected"),
    [
        (5, 5, {5: 50.0, 10: 100.0, 15: 150.0, 20: 200.0}),
        (4, 2, {step: 10.0 * step if step in {4, 8, 14, 18} else None for step in range(2, 21, 2)}),
        (3, 5, {5: None, 10: None, 15: None, 20: None}),
    ],
    ids=["at each save", "at some saves", "between saves"],
)
def test_what_a_validation_logs_is_recorded_with_its_own_step_and_with_no_later_one(
    tmp_path: Path, val_check_interval: int, every: int, expected: dict[int, float | None]
) -> None:
    found = validated(tmp_path, val_check_interval=val_check_interval, every=dcpsvc.Every(steps=every))
    assert values_of(found) == expected


def test_a_validation_after_the_last_step_goes_into_the_save_at_the_end(tmp_path: Path) -> None:
    found = validated(tmp_path, val_check_interval=7, max_steps=17, every=dcpsvc.Every(steps=5))
    assert values_of(found) == {5: None, 10: None, 15: None, 17: 170.0}


def test_the_best_by_a_validation_are_those_that_it_came_after(tmp_path: Path) -> None:
    keep = dcpsvc.Best(2, "val_loss", "min") | dcpsvc.Latest(2)
    found = validated(tmp_path, val_check_interval=4, every=dcpsvc.Every(steps=2), keep=keep)
    assert values_of(found) == {4: 40.0, 8: 80.0, 18: 180.0, 20: None}

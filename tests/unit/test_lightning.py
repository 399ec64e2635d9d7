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

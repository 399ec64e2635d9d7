"""R9: what a load leaves as it is, or does not use, is told by key before anything is touched."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import dcpsvc
from dcpsvc import Checkpointer, Event, Point
from tests.unit.one_process import bits, save

if TYPE_CHECKING:
    from pathlib import Path


def two(first: str = "first", second: str = "second") -> nn.Module:
    return nn.ModuleDict({first: nn.Linear(2, 2), second: nn.Linear(2, 2, bias=False)})


def trained(module: nn.Module, **more: Any) -> dict[str, Any]:
    optimizer = torch.optim.Adam(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"model": module, "optim": optimizer} | more


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "dcpsvc"]


class Told:
    """What a resume says: warnings, and the detail of its event.

    Args:
        folder: Of the run.
        caplog: Takes the warnings.
    """

    def __init__(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.folder, self.caplog = folder, caplog
        self.warnings: list[str] = []
        self.event = ""

    def _hear(self, event: Event) -> None:
        if event.name == Point.RESUMED:
            self.event = event.detail

    def resume(self, state: dict[str, Any], **terms: Any) -> None:
        with (
            self.caplog.at_level(logging.WARNING, "dcpsvc"),
            Checkpointer(
                self.folder / "root", state, local=self.folder / "local", save_last=False, on_event=self._hear
            ) as ckpt,
        ):
            self.caplog.clear()
            ckpt.resume(**terms)
            self.warnings = warnings(self.caplog)


@pytest.fixture
def told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Told:
    return Told(tmp_path, caplog)


def rows(warning: str) -> list[list[str]]:
    return [line.split()[:2] for line in warning.splitlines()[2:]]


def test_a_renamed_layer_is_named_on_both_sides_in_the_log_and_in_the_event(told: Told) -> None:
    save(told.folder, {"model": two()})
    fresh = two("first", "other")
    before = bits(fresh["other"].weight)
    told.resume({"model": fresh}, strict=False)
    (warning,) = told.warnings
    assert rows(warning) == [["model.other.weight", "missing"], ["model.second.weight", "unexpected"]]
    expected = "1 not in the checkpoint, so not loaded: model.other.weight; 1 of the checkpoint not used: "
    assert f"{expected}model.second.weight" in told.event
    assert f"{expected}model.second.weight" in warning.splitlines()[0]
    assert bits(fresh["other"].weight) == before


def test_parameters_that_an_optimizer_knew_by_another_name_are_named(told: Told) -> None:
    save(told.folder, trained(two()))
    told.resume(trained(two("first", "other")), strict=False)
    (warning,) = told.warnings
    assert ["optim.param_groups.0.other.weight", "missing"] in rows(warning)
    assert ["optim.param_groups.0.second.weight", "unexpected"] in rows(warning)
    assert "2 not in the checkpoint, so not loaded: model.other.weight, optim.param_groups.0.other.weight" in told.event


def test_a_component_that_the_checkpoint_lacks_is_named(told: Told) -> None:
    save(told.folder, {"model": two()})
    told.resume({"model": two(), "ema": {"n": 1}}, strict=False)
    (warning,) = told.warnings
    assert rows(warning) == [["ema", "missing"]]
    assert "1 not in the checkpoint, so not loaded: ema" in told.event


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_is_said_where_everything_matches(told: Told, *, strict: bool) -> None:
    save(told.folder, trained(two(), seen={"n": 1}))
    told.resume(trained(two(), seen={"n": 0}), strict=strict)
    assert told.warnings == []
    assert told.event.startswith("loaded: model, optim, seen; read ")


def test_of_many_the_line_names_three_and_counts_all(told: Told) -> None:
    save(told.folder, {"model": nn.ModuleList(nn.Linear(1, 1) for _ in range(40))})
    told.resume({"model": nn.ModuleList([nn.Linear(1, 1)])}, strict=False)
    (warning,) = told.warnings
    assert "; 78 of the checkpoint not used: model.1.bias, model.1.weight, model.10.bias, ...; " in told.event
    assert warning.endswith("... and 48 more")


def test_a_saved_key_whose_place_another_one_takes_is_told(told: Told) -> None:

    save(told.folder, {"model": two("first", "ema"), "count": {"n": 1}})
    fresh = nn.ModuleDict({"ema": nn.Linear(2, 2, bias=False), "first": nn.Linear(2, 2)})
    told.resume({"model": fresh, "seen": {"n": 0}}, rename={"model.ema": "model.first", "count": "seen"}, strict=False)
    (warning,) = told.warnings
    assert ["model.first.weight", "unexpected"] in rows(warning)
    assert "in the checkpoint but not in the state" not in told.event  # count is seen


class Remembering(nn.Linear):
    memory = 0

    def get_extra_state(self) -> Any:
        return {"memory": self.memory}

    def set_extra_state(self, state: Any) -> None:
        self.memory = state["memory"]


def test_an_extra_state_that_only_one_side_has_is_named(told: Told) -> None:
    save(told.folder, {"model": nn.ModuleDict({"old": Remembering(1, 1), "both": nn.Linear(1, 1)})})
    told.resume({"model": nn.ModuleDict({"both": Remembering(1, 1)})}, strict=False)
    (warning,) = told.warnings
    assert ["model.both._extra_state", "missing"] in rows(warning)
    assert ["model.old._extra_state", "unexpected"] in rows(warning)


def test_a_load_tells_it_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, {"model": two()})
    with caplog.at_level(logging.WARNING, "dcpsvc"):
        dcpsvc.load(tmp_path / "root", {"model": two("first", "other")}, strict=False)
    (warning,) = warnings(caplog)
    assert rows(warning) == [["model.other.weight", "missing"], ["model.second.weight", "unexpected"]]

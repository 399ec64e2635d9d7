"""What a state may hold, and what does not fit: compared between ranks, brought back whole, or refused untouched."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import dcpsvc
from dcpsvc import Checkpointer
from dcpsvc.errors import (
    ConfigError,
    RestoreFailedError,
    SaveFailedError,
    StructureMismatchError,
    UnsupportedStateError,
)
from dcpsvc.state import claims, documents
from dcpsvc.state.app import AppState
from dcpsvc.state.replicas import Replicas
from tests.unit.one_process import bits, resume, save, told

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# --- ranks whose values have diverged ---------------------------------------------------------------


def disagreements(*states: dict[str, Any]) -> dict[str, dict[str, list[int]]]:
    said: list[claims.Claims] = []
    for rank, state in enumerate(states):
        collected = AppState(state).collect(rank)
        said.append(claims.claims(collected))
        replicas = Replicas(collected, {}, later=False, guarded=False)
        replicas.complete(None)
        for component, values in replicas.said.items():
            said[-1].setdefault(component, {}).update(values)
    differing = claims.differing([claims.digests(one) for one in said])
    found = dict(claims.disagreements(said))
    assert differing == sorted({claims.component_of(key) for key in found})
    return found


def trained(**moments: float) -> dict[str, Any]:
    """A model after one step of Adam, with something added to a moment of its first weight."""
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    for name, more in moments.items():
        optimizer.state[model.weight][name] += more
    ema = copy.deepcopy(model).requires_grad_(requires_grad=False)
    return {"model": model, "optim": optimizer, "ema": ema, "average": {"w": torch.ones(3)}, "scale": torch.ones(5)}


def test_ranks_that_trained_alike_agree() -> None:
    assert disagreements(trained(), trained(), trained()) == {}


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq", "step"])
def test_a_diverged_moment_is_named_by_its_parameter_with_the_ranks(moment: str) -> None:
    ((key, answers),) = disagreements(trained(), trained(**{moment: 1.0}), trained()).items()
    assert key == f"optim.state.weight.{moment}"
    assert sorted(answers.values()) == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale", torch.zeros(5)),
        ("scale", torch.ones(5, dtype=torch.float64)),
        ("scale", torch.ones(5, 1)),
        ("scale", torch.tensor([1.0, 1.0, 1.0, 1.0, float("nan")])),
        ("average", {"w": torch.ones(3) * 2}),
    ],
)
def test_a_diverged_tensor_in_the_state_is_named(name: str, value: Any) -> None:
    ((key, answers),) = disagreements(trained(), trained(), trained() | {name: value}).items()
    assert claims.component_of(key) == name
    assert sorted(answers.values()) == [[0, 1], [2]]


def test_a_diverged_ema_model_is_named_by_its_weight() -> None:
    other = trained()
    with torch.no_grad():
        other["ema"].bias[1] += 1e-6
    assert list(disagreements(trained(), other)) == ["ema.bias"]


# --- extra states -----------------------------------------------------------------------------------


class Remembering(nn.Linear):
    """Keeps something that is neither parameter nor buffer; None until it has seen anything."""

    def __init__(self, memory: Any = None) -> None:
        super().__init__(1, 1)
        self.memory = memory

    def get_extra_state(self) -> Any:
        return self.memory

    def set_extra_state(self, state: Any) -> None:
        self.memory = state


@pytest.mark.parametrize(
    "memory",
    [5, 0, "text", [], {"seen": 3, "of": (1, None)}, torch.arange(3.0), torch.tensor(7), torch.ones(2, 2).bfloat16()],
    ids=repr,
)
@pytest.mark.parametrize("depth", [0, 2])
def test_an_extra_state_comes_back_into_a_fresh_module_that_has_none(tmp_path: Path, memory: Any, depth: int) -> None:
    saved, fresh = Remembering(memory), Remembering(torch.zeros_like(memory) if torch.is_tensor(memory) else None)
    one, other = saved, fresh
    for _ in range(depth):
        one, other = nn.Sequential(one), nn.Sequential(other)
    save(tmp_path, {"model": one})
    resume(tmp_path, {"model": other})
    assert told(fresh.memory) == told(memory)
    assert torch.equal(fresh.weight, saved.weight)


def test_an_extra_state_of_none_leaves_the_module_as_it_is(tmp_path: Path) -> None:
    fresh = Remembering("of before")
    save(tmp_path, {"model": Remembering(None)})
    resume(tmp_path, {"model": fresh})
    assert fresh.memory == "of before"


def test_a_module_without_tensors_resumes_beside_one_with(tmp_path: Path) -> None:
    state = {"model": nn.Linear(1, 1), "loss": nn.CrossEntropyLoss(), "act": nn.Sequential(nn.ReLU())}
    save(tmp_path, state, step=3)
    fresh = nn.Linear(1, 1)
    assert resume(tmp_path, {"model": fresh, "loss": nn.CrossEntropyLoss(), "act": nn.Sequential(nn.ReLU())}) == 3
    assert torch.equal(fresh.weight, state["model"].weight)


def test_a_state_of_a_module_without_tensors_alone_resumes(tmp_path: Path) -> None:
    save(tmp_path, {"loss": nn.CrossEntropyLoss()}, step=3)
    assert resume(tmp_path, {"loss": nn.CrossEntropyLoss()}) == 3


# --- states that do not fit -------------------------------------------------------------------------


def refused_untouched(tmp_path: Path, state: dict[str, Any], word: str) -> None:
    """Resuming into the state fails with a typed error that names the key; nothing in it has changed."""
    before = {name: _content(value) for name, value in state.items()}
    with pytest.raises(RestoreFailedError, match=word) as caught:
        resume(tmp_path, state)
    assert [failure.error for failure in caught.value.failures] == [StructureMismatchError.__name__]
    assert "partly" not in str(caught.value)
    assert {name: _content(value) for name, value in state.items()} == before


def _content(value: Any) -> Any:
    return told(value.state_dict() if hasattr(value, "state_dict") else value)


KINDS: dict[str, dict[str, Callable[[], Any]]] = {
    "value": {"number": lambda: 5, "list": lambda: [1, torch.ones(2)], "size": lambda: torch.Size([2])},
    "tensor": {"vector": lambda: torch.zeros(2), "scalar": lambda: torch.tensor(1.0)},
    "dict": {
        "plain": lambda: {"a": 1},
        "of tensors": lambda: {"a": torch.zeros(2)},
        "empty": dict,
        "by int": lambda: {1: 2},
    },
}
MISFITS = [
    pytest.param(make_saved, make_here, id=f"{one} {saved} into {other} {here}")
    for one, theirs in KINDS.items()
    for other, mine in KINDS.items()
    if one != other != "value"  # a plain value is replaced, whatever it was
    for saved, make_saved in theirs.items()
    for here, make_here in mine.items()
]


@pytest.mark.parametrize(("saved", "here"), MISFITS)
def test_a_value_of_another_kind_is_refused_before_anything_is_touched(
    tmp_path: Path, saved: Callable[[], Any], here: Callable[[], Any]
) -> None:
    save(tmp_path, {"model": nn.Linear(2, 2), "v": saved(), "z": torch.ones(3)})
    refused_untouched(tmp_path, {"model": nn.Linear(2, 2), "v": here(), "z": torch.zeros(3)}, r"v +kind +")


def optimized(width: int, kind: type[torch.optim.Optimizer] = torch.optim.Adam) -> torch.optim.Optimizer:
    parameter = nn.Parameter(torch.ones(width))
    optimizer = kind([parameter])
    parameter.sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("width", [1, 2, 5])
def test_moments_of_another_shape_are_refused(tmp_path: Path, width: int) -> None:
    save(tmp_path, {"z": torch.ones(3), "optim": optimized(3)})
    refused_untouched(
        tmp_path, {"z": torch.zeros(3), "optim": optimized(width)}, r"optim\.state\.group-0-0 +shape +for \[3\]"
    )


# --- what is refused when it is saved ---------------------------------------------------------------


def refused_when_saved(tmp_path: Path, state: dict[str, Any]) -> UnsupportedStateError:
    """The error; after it the Checkpointer goes on, and nothing is at the run root."""
    with (
        pytest.raises(SaveFailedError),
        Checkpointer(tmp_path / "root", state, local=tmp_path / "local") as ckpt,
        pytest.raises(UnsupportedStateError) as caught,
    ):
        ckpt.save(1)
    assert dcpsvc.list_checkpoints(tmp_path / "root") == []
    return caught.value


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ({np.float64(1.5): 1}, "v.k[np.float64(1.5)]"),
        ({np.int64(3): 1}, "v.k[np.int64(3)]"),
        ({np.str_("a"): 1}, "v.k[np.str_('a')]"),
        ({(1, np.float64(2)): 1}, "v.k[np.float64(2.0)]"),
        ({b"raw": 1}, "v.k[b'raw']"),
        ({(torch.ones(1),): 1}, "v.k[tensor([1.])]"),
    ],
    ids=["float64", "int64", "str_", "in a tuple", "bytes", "tensor in a tuple"],
)
def test_a_dict_key_that_json_cannot_hold_is_refused_by_key(tmp_path: Path, value: Any, key: str) -> None:
    assert refused_when_saved(tmp_path, {"v": {"k": value}}).key.replace("np.", "") == key.replace("np.", "")


@pytest.mark.parametrize(
    "value",
    [
        np.ma.array([1, 2], mask=[0, 1]), np.rec.array([(1,)], dtype=[("a", "i4")]),
        np.longdouble(1), np.ones(2, np.longdouble), np.datetime64("2026-01-01"), 10**5000, -(10**5000), [10**5000],
    ],
    ids=["masked", "records", "longdouble", "longdoubles", "datetime", "huge", "-huge", "huge in a list"],
)  # fmt: skip
def test_a_value_that_would_not_come_back_as_it_was_is_refused_by_key(tmp_path: Path, value: Any) -> None:
    assert refused_when_saved(tmp_path, {"v": {"k": value}}).key.startswith("v.k")


@pytest.mark.parametrize("value", [10**3000, -(2**9999), 2**63, 1e308, {1.5: 1, (1, "a"): 2, None: 3, True: 4}])
def test_large_numbers_and_plain_keys_come_back(value: Any) -> None:
    assert told(documents.decode(documents.encode(value, "v", {}), "v", lambda _: torch.ones(1))) == told(value)


def test_optimizer_state_under_something_else_than_a_parameter_is_refused_by_key(tmp_path: Path) -> None:
    optimizer = optimized(3)
    optimizer.state["global"] = {"k": torch.tensor(7.0)}
    caught = refused_when_saved(tmp_path, {"optim": optimizer})
    assert caught.key == "optim.state"
    assert "'global'" in caught.reason


@pytest.mark.parametrize("name", ["__metadata__", "__dcpsvc__", "__x", "a.b", "a@0", "", "a/b", "a b", "ä", 3])
def test_a_reserved_name_is_refused_before_anything_is_made(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ConfigError, match="state name"):
        Checkpointer(tmp_path / "root", {name: torch.ones(2)}, local=tmp_path / "local")
    assert not (tmp_path / "root").exists()


def test_names_inside_a_component_that_are_ours_elsewhere_come_back(tmp_path: Path) -> None:
    saved = {"__metadata__": torch.ones(2), "objects": torch.ones(3), "$tensor": torch.ones(4), "x[0:2]": torch.ones(1)}
    fresh: dict[str, Any] = {}
    save(tmp_path, {"v": saved})
    resume(tmp_path, {"v": fresh})
    assert {name: bits(tensor) for name, tensor in fresh.items()} == {name: bits(t) for name, t in saved.items()}

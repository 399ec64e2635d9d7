"""What ``import dcpsvc`` offers, and what it does not drag in."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import dcpsvc

PUBLIC = {
    "Best", "Cast", "Checkpoint", "CheckpointGoneError", "Checkpointer", "ClosedError", "ConfigError", "DcpsvcError",
    "Divergence", "Event", "Every", "EveryHours", "EveryNSteps", "Everything", "FormatError", "Latest", "Observers",
    "OneRank", "Options", "Part", "PendingSave", "PerGroup", "PerRank", "Pinned", "Point", "PrometheusMetrics",
    "Replicated", "RestoreError", "Rng", "RootError", "RunLog", "SaveError", "Spans", "StateError", "Statistics",
    "StepOutcome", "StoreError", "Timings", "latest", "list_checkpoints", "load", "pin", "record_metrics",
    "storage_reader", "unpin",
}  # fmt: skip

LIGHT = [
    "dcpsvc",
    "dcpsvc.cli",
    "dcpsvc.reading",
    "dcpsvc.marking",
    "dcpsvc.keeping",
    "dcpsvc.sidefiles",
    "dcpsvc.divergence",
    "dcpsvc.storage.open",
    "dcpsvc.storage.shards",
    "dcpsvc.stages.discover",
    "dcpsvc.stages.retain",
    "dcpsvc.policies",
    "dcpsvc.observing.runlog",
    "dcpsvc.format.layout",
    "dcpsvc.format.shardfile",
    "dcpsvc.errors",
]


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def on_the_map(module: str) -> list[str]:
    """Names in the left columns of a package's docstring."""
    tables = re.findall(r"^(=+)  =+\n(.*?)^=+  =+$", import_module(module).__doc__ or "", re.MULTILINE | re.DOTALL)
    return [name for bar, rows in tables for row in rows.splitlines() for name in re.findall(r"\w+", row[: len(bar)])]


@pytest.mark.parametrize("package", ["dcpsvc", "dcpsvc.state", "dcpsvc.storage", "dcpsvc.tools"])
def test_every_room_is_on_the_map_of_its_house_once(package: str) -> None:
    inside = Path(import_module(package).__file__ or "").parent.iterdir()
    rooms = {path.stem for path in inside if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert sorted(on_the_map(package)) == sorted(rooms - {"__init__", "__main__"})


def test_the_public_names_are_these() -> None:
    assert set(dcpsvc.__all__) == PUBLIC
    assert len(dcpsvc.__all__) == len(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_name_can_be_imported(name: str) -> None:
    value = getattr(dcpsvc, name)
    assert value.__name__ == name
    assert value.__doc__
    assert name in dir(dcpsvc)


def test_a_star_import_brings_every_public_name() -> None:
    names = fresh("from dcpsvc import *; print(*sorted(n for n in dir() if not n.startswith('__')))")
    assert set(names.split()) == PUBLIC


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'dcpsvc' has no attribute 'nonsense'"):
        dcpsvc.nonsense  # noqa: B018


@pytest.mark.parametrize("module", LIGHT)
def test_looking_at_a_run_root_needs_neither_torch_nor_an_object_store_client(module: str) -> None:
    heavy = ["torch", "fsspec", "s3fs", "botocore", "aiobotocore", "numpy", "safetensors"]
    assert fresh(f"import sys, {module}; print(*[n for n in {heavy} if n in sys.modules])") == ""


def test_listing_a_run_on_disk_needs_no_torch(tmp_path) -> None:
    (tmp_path / "run.json").write_text('{"format": 1, "run_id": "a", "created": "now"}')
    code = f"import sys, dcpsvc; print(dcpsvc.list_checkpoints({str(tmp_path)!r}), 'torch' in sys.modules)"
    assert fresh(code) == "[] False"

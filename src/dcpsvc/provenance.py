"""What made a checkpoint: versions, ranks, mesh, commit, hash of the configuration. And what has changed since."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dcpsvc.errors import ConfigError
from dcpsvc.format.digest import digest
from dcpsvc.format.parse import compact

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_GIT_S = 5.0
_LIBRARIES = ("accelerate", "lightning", "peft", "transformers")
"""Recorded where the job has imported them."""
_QUIET = {"world", "mesh"}
"""Recorded, and no reason for a warning: any number of ranks loads."""

_WHY = {
    "config": "the configuration is another; compare the two, or start a new run",
    "git": "the code is another; check out the saved commit to continue exactly",
}


def record(values: Iterable[Any], *, world_size: int, config: Any = None) -> dict[str, str]:
    """What a manifest says about its origin, beside the state.

    Args:
        values: Of the state, without declarations; modules tell the mesh.
        world_size: Ranks of this job.
        config: The run's configuration, JSON-like; only its hash is kept.

    Raises:
        ConfigError: The configuration is not JSON-like.
    """
    found = {
        "dcpsvc": metadata.version("dcpsvc"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "world": str(world_size),
        "mesh": _mesh(values),
        "git": _commit(),
        "config": _hash(config),
    } | {name: _version(name) for name in _LIBRARIES if name in sys.modules}
    return {name: value for name, value in found.items() if value}


def changes(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What is not as it was when the checkpoint was made, a sentence each; only what both sides tell."""
    differing = [name for name in saved if name not in _QUIET and now.get(name, saved[name]) != saved[name]]
    return [
        f"{name} was {saved[name]}, is {now[name]}" + (f": {_WHY[name]}" if name in _WHY else "") for name in differing
    ]


def _mesh(values: Iterable[Any]) -> str:
    """The largest mesh that parameters are on: ``dp=4 x tp=2``."""
    parameters = (p for value in values if isinstance(value, nn.Module) for p in value.parameters())
    meshes = {parameter.device_mesh for parameter in parameters if isinstance(parameter, DTensor)}
    if not meshes:
        return ""
    mesh = max(meshes, key=lambda one: (one.size(), one.ndim))
    names = mesh.mesh_dim_names or tuple(f"dim{number}" for number in range(mesh.ndim))
    return " x ".join(f"{name}={size}" for name, size in zip(names, mesh.shape, strict=True))


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:  # a folder of that name
        return ""


def _commit() -> str:
    """Of the working directory, and whether its files are others; empty where it is not in a git checkout."""
    command = ["git", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S, check=False)  # noqa: S603 - fixed
    except (OSError, subprocess.TimeoutExpired):
        return ""
    told = done.stdout.splitlines()
    commit = next((line.split()[-1] for line in told if line.startswith("# branch.oid")), "(initial)")
    if done.returncode or commit == "(initial)":
        return ""
    return commit + (" with uncommitted changes" if any(not line.startswith("#") for line in told) else "")


def _hash(config: Any) -> str:
    if config is None:
        return ""
    try:
        return digest(compact(_sorted(config)))
    except (TypeError, ValueError) as err:
        raise ConfigError(f"config= is not JSON-like: {err}") from err


def _sorted(value: Any) -> Any:
    """The same whatever order the keys came in."""
    if isinstance(value, dict):
        return {str(key): _sorted(value[key]) for key in sorted(value, key=str)}
    return [_sorted(item) for item in value] if isinstance(value, list | tuple) else value

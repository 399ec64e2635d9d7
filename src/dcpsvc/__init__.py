"""Asynchronous distributed checkpoints for PyTorch: committed by all ranks, or not at all.

The map of the house, in the order data flows through it:

==================  =====================================================================
checkpointer        the facade a training loop talks to
config, policies    options; when to save, and the rules of what to keep: values
opening, resuming   all ranks reach the run; all ranks load one checkpoint
reader, sharing     what a rank needs of it, and who reads what for whom
assembly, closing   its parts, made and tied together; its end: all committed, every thread gone
stepping, laststep  a step is complete: saved, or remembered so that the last one is not lost
saves, saving       a save is accepted and begins on the training thread
blueprint, arenas   what a structure needs once: who writes what and where; memory to copy it into
uploader, life      the background thread; one save up to its commit: the order of the stages
contribution        what one rank does for it: what goes wrong becomes a value; ``carrying``: its files
commits, decision   a checkpoint as the rules see it; what stays and what goes, and why: pure
keeping             the same for a run root from outside, by the policy that a job has recorded
retention, catalog  a job's round of deletions after each commit; what is known to be committed
sidefiles, marking  metrics that come late, and pins: beside a checkpoint, by anybody
divergence          noticing that a training went wrong, and tagging what it saves
stages/             stage shard ack upload commit retain, discover restore; none knows another;
                    retain is the only way anything is deleted, by a job and by ``dcpsvc gc``
state/              modules, optimizers and values as named tensors and JSON, and back
ranks/              meetings on the c10d store, our own gloo group, agreed extra saves
storage/            where bytes endure: posix, memory, any fsspec URL
format/             the files of a run root: manifest, layout, shard
observing/          observers: a log of the run, Prometheus, OpenTelemetry
reading, loading    a run root from outside: list it, load from it, read it with DCP
cli, tools/, demo/  the command ``dcpsvc``
==================  =====================================================================

Nothing here imports torch until a name that needs it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcpsvc.checkpointer import Checkpointer
    from dcpsvc.config import Options
    from dcpsvc.divergence import Divergence
    from dcpsvc.errors import (
        CheckpointGoneError,
        ClosedError,
        ConfigError,
        DcpsvcError,
        FormatError,
        RestoreError,
        RootError,
        SaveError,
        StateError,
        StoreError,
    )
    from dcpsvc.events import Event, Point
    from dcpsvc.loading import load, storage_reader
    from dcpsvc.marking import pin, record_metrics, unpin
    from dcpsvc.observing import Observers
    from dcpsvc.observing.prometheus import PrometheusMetrics
    from dcpsvc.observing.runlog import RunLog
    from dcpsvc.observing.spans import Spans
    from dcpsvc.pending import PendingSave, Statistics, StepOutcome, Timings
    from dcpsvc.policies import Best, Every, EveryHours, EveryNSteps, Everything, Latest, Pinned
    from dcpsvc.reading import latest, list_checkpoints
    from dcpsvc.stages.discover import Checkpoint
    from dcpsvc.state.rng import Rng
    from dcpsvc.state.sharing import Cast, OneRank, Part, PerGroup, PerRank, Replicated

_HOMES = {
    "checkpointer": ("Checkpointer",),
    "config": ("Options",),
    "errors": (
        "CheckpointGoneError", "ClosedError", "ConfigError", "DcpsvcError", "FormatError", "RestoreError",
        "RootError", "SaveError", "StateError", "StoreError",
    ),
    "events": ("Event", "Point"),
    "observing": ("Observers",),
    "observing.prometheus": ("PrometheusMetrics",),
    "observing.runlog": ("RunLog",),
    "observing.spans": ("Spans",),
    "pending": ("PendingSave", "Statistics", "StepOutcome", "Timings"),
    "divergence": ("Divergence",),
    "policies": ("Best", "Every", "EveryHours", "EveryNSteps", "Everything", "Latest", "Pinned"),
    "marking": ("pin", "record_metrics", "unpin"),
    "loading": ("load", "storage_reader"),
    "reading": ("latest", "list_checkpoints"),
    "stages.discover": ("Checkpoint",),
    "state.rng": ("Rng",),
    "state.sharing": ("Cast", "OneRank", "Part", "PerGroup", "PerRank", "Replicated"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Best",
    "Cast",
    "Checkpoint",
    "CheckpointGoneError",
    "Checkpointer",
    "ClosedError",
    "ConfigError",
    "DcpsvcError",
    "Divergence",
    "Event",
    "Every",
    "EveryHours",
    "EveryNSteps",
    "Everything",
    "FormatError",
    "Latest",
    "Observers",
    "OneRank",
    "Options",
    "Part",
    "PendingSave",
    "PerGroup",
    "PerRank",
    "Pinned",
    "Point",
    "PrometheusMetrics",
    "Replicated",
    "RestoreError",
    "Rng",
    "RootError",
    "RunLog",
    "SaveError",
    "Spans",
    "StateError",
    "Statistics",
    "StepOutcome",
    "StoreError",
    "Timings",
    "latest",
    "list_checkpoints",
    "load",
    "pin",
    "record_metrics",
    "storage_reader",
    "unpin",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, imported or not."""
    return sorted(__all__)

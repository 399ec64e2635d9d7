"""Asynchronous distributed checkpoints for PyTorch: committed by all ranks, or not at all.

The map of the house, in the order data flows through it. What a training loop sees:

======================  =================================================================================
checkpointer, pending   the facade; what it gives back: promises, timings, counters
config, policies        options; when to save, and the rules of what to keep: values
errors, events          one tree of errors; the life of a checkpoint as events
observing               who hears them: a log of the run, Prometheus, OpenTelemetry
integrations            dcpsvc inside the trainers of others
======================  =================================================================================

A job begins and ends:

======================  =================================================================================
assembly                the parts of a Checkpointer, made and tied together
opening, placelock      all ranks reach the run; each holds its place on its node
identity, tiers         which run lies there; its two places
settling, fence         the job takes the run root over; who owns it
recovery                an upload that a dead job left unfinished is carried on
provenance, announcing  what made a checkpoint; what a job says about its own
standing                how the job is doing: counters, ``dcpsvc status``
closing, atexit         all committed, every thread gone; also if nobody closes
======================  =================================================================================

A save begins, on the training thread:

======================  =================================================================================
stepping, laststep      a step is complete: saved, or remembered so that the last one is not lost
steering, preemption    what is asked for beside the schedule; being told to end soon
stopsignals             the signals that say so
control, commands       other shells: the socket, and what a live job does for them
guarding, divergence    noticing that a training went wrong, and tagging what it saves
saves, admission        a save is accepted; or waits, or is left out: back-pressure
saving, save            references, this rank's share, hand over to DCP; a save on its way
blueprint, outline      what a structure needs once: who writes what and where; the same for one attempt
staging, arena, arenas  how a save is copied, and the memory it is copied into
copying, devicecopy     beside the training, from the host and from accelerators
holdback, witness       optimizers wait for it; who else wrote meanwhile is seen
preflight, garbage      what a save needs and the machine has; the collector kept out of the way
======================  =================================================================================

It becomes a checkpoint, on the uploader thread:

======================  =================================================================================
uploader, life          the background thread; one save up to its commit: the order of the stages
stages                  stage shard adapter ack upload commit retain, discover restore; none knows another;
                        retain is the only way anything is deleted, by a job and by ``dcpsvc gc``
contribution, outcomes  what one rank does for it: what goes wrong becomes a value, and all get one error
carrying, lateness      a rank's files on their way; whom the others waited for
catalog, retention      what is known to be committed; the round of deletions after each commit
annotating              metrics and pins that the job adds later
======================  =================================================================================

What stays, and what is noted beside it:

======================  =================================================================================
commits, decision       a checkpoint as the rules see it; what stays and what goes, and why: pure
keeping                 the same for a run root from outside, by the policy that a job has recorded
sidefiles, marking      metrics that come late, and pins: beside a checkpoint, by anybody
leases, deletions       a pin that ends by itself, for whoever reads; what goes all the same, told from damage
======================  =================================================================================

A checkpoint is read:

======================  =================================================================================
resuming, choosing      all ranks load one checkpoint; which one
intake                  what one rank does for it: looks, reads, proves; the state is as it was
listed, reading         the manifests as one LIST shows them; a run root from outside
reader, bands           one checkpoint as DCP reads it; rows on their way into another box
together, allotment     ranks read together: how, and who reads what for whom
loading, mapped         into whatever state you have; from one file that is mapped
conversion, adoption    into the formats of torch, and out of them
======================  =================================================================================

Beneath all of it:

======================  =================================================================================
state                   modules, optimizers and values as named tensors and JSON, and back
ranks                   meetings on the c10d store, our own gloo group, agreed extra saves
storage                 where bytes endure: posix, memory, any fsspec URL
format                  the files of a run root: manifest, layout, shard
deadline, progress      a deadline for what has none, and the clock; how far a long operation is
linux, whereabouts      system calls that Python lacks; which host, network and page cache this is
======================  =================================================================================

The command ``dcpsvc``:

======================  =================================================================================
cli, commandline        its commands; ``__main__``: the same as ``python -m dcpsvc``
tools                   what they do, as functions that return values
doctor, demo            examine a machine and a run root; kill a training job and see it come back
======================  =================================================================================

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

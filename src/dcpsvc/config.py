"""The options of a Checkpointer, as one frozen value that is checked when it is made."""

from __future__ import annotations

import difflib
import math
import os
import signal
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from dcpsvc.divergence import Divergence
from dcpsvc.errors import ConfigError
from dcpsvc.policies import Every, Everything, Keep, check_keeps, is_count, is_number

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dcpsvc.events import Event

LOCAL_VARIABLE = "DCPSVC_LOCAL"
"""Environment variable that names the local tier where ``local=`` does not."""

SHARERS_VARIABLE = "LOCAL_WORLD_SIZE"
"""How many ranks this node has, as torchrun says it."""

_NODE_CONCURRENCY = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one process may ask of a store."""

    concurrency: int = 8
    """Requests with data under way at once; each upload holds a part in memory."""

    nbytes_per_s: float | None = None
    """Bytes sent and received, on average over a few parts; None: no limit."""

    part_nbytes: int = 16 * 2**20
    """Size of a part of a large object. Servers refuse less than 5 MiB."""

    patience_s: float = 60.0
    """How long one request, or one part, is tried again after it first failed."""

    node_concurrency: int | None = None
    """As ``concurrency``, for all processes of this node together; None: no limit but each one's own."""

    node_folder: Path | None = None
    """Where they tell each other; needed with ``node_concurrency``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Everything about a Checkpointer except the run root and the state."""

    local: str | os.PathLike[str] | None = None
    """This node's fast tier. Default: ``$DCPSVC_LOCAL``, else a directory of this user under the system's
    temporary directory. All ranks of a node share it."""

    every: Every | None = None
    """When ``step()`` saves. None: only ``save()``, and the last step at the end."""

    keep: Keep = field(default_factory=Everything)
    """What retention keeps; the rest is deleted. Default: everything is kept. The newest commit, the one resumed from,
    and what is pinned or being read always stay."""

    deletes_per_s: float | None = None
    """How many objects retention deletes at the run root in a second. Default: one after the other, as fast as the
    store answers. After one commit it deletes for at most a quarter of ``upload_timeout_s``; the next one goes on."""

    keep_local: int = 2
    """How many of the newest checkpoints each rank leaves on its local tier, for a fast restart. At least 1."""

    storage_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Passed to fsspec: credentials, endpoint. Never logged, never written."""

    transfer_concurrency: int | None = None
    """Requests with data under way at once, to an object store, from all ranks of a node together
    (``$LOCAL_WORLD_SIZE`` of them); what an idle rank does not use a busy one has, up to 8, or to its share if that is
    more. Each upload holds 16 MiB of memory. None: 8 a rank, and 32 in all: S3 gives some 85 MB/s a connection. A store
    that asks to slow down gets fewer."""

    transfer_nbytes_per_s: float | None = None
    """Bytes a second between a node and an object store, each rank its fixed share: what an idle rank does not use
    is left. None: no limit."""

    sync_timeout_s: float = 60.0
    """Longest wait for a peer that should arrive: to save, to commit, to resume, to close."""

    upload_timeout_s: float = 1800.0
    """Longest time a shard may take to reach the local disk, and again to reach the run root. A rank that
    stops giving signs of life is noticed after ``sync_timeout_s`` all the same."""

    retry_s: float = 60.0
    """How long one request to the run root, one part of an upload or one piece that is read is tried again after it
    first failed: a server that is started again takes longer than a few tries. Small requests have 5 tries in it."""

    read_together: bool | None = None
    """Whether ranks that resume get from each other what several of them need, so that the run root gives it once.
    None: they do, but where it is a directory that all of them have behind one page cache. False, for a file system
    that is faster than the network between ranks: each reads by itself. Rank 0's counts. It changes no result."""

    backpressure: Literal["wait", "skip", "drop-oldest"] = "wait"
    """What ``save()`` does while ``max_inflight`` saves are under way: wait for the oldest, leave this one out, or
    give the oldest up. All ranks do the same. The last save and one that a stop asks for always wait."""

    max_inflight: int = 1
    """Saves under way at once. Each holds host memory of the size of this rank's shard until it is on the local disk,
    and disk space until it is committed."""

    staging: Literal["overlap", "block"] = "overlap"
    """``overlap``: large tensors that only an optimizer of the state changes are copied while the next forward and
    backward run; its ``step()`` waits for what is not copied yet. Whoever changes them otherwise waits for
    ``pending.staged``, or that save fails. ``block``: ``save()`` returns when all is copied."""

    verify_staging: bool = False
    """For debugging, with ``overlap``: ``save()`` hashes what is copied after it has returned, and the copy is compared
    with that: a single byte changed meanwhile fails the save. Takes about as long as ``block``."""

    staging_nbytes: int | None = None
    """Host memory that staging may take on this rank. A shard that does not fit is written straight from the state
    before ``save()`` returns: slower, and the same bytes. None: what the machine has free."""

    max_consecutive_failures: int = 3
    """Failed saves in a row that training survives; the next ``step()`` raises the last one."""

    on_failure: Literal["continue", "raise"] = "continue"
    """``raise``: the first failed save is raised by the next ``step()``."""

    save_last: bool = True
    """Save the last step when the Checkpointer closes, if it is not saved yet."""

    stop_signals: tuple[str, ...] = ("SIGTERM", "SIGUSR1")
    """Signals that ask the job to save and stop: on any one rank, for all. Taken only in the main thread; a handler of
    yours is called as well. A second SIGTERM, 2 s or more after the first, ends the process as it always did."""

    stop_file: str | os.PathLike[str] | None = None
    """A file whose touching, on any node, asks the same."""

    grace_s: float = 25.0
    """After a stop was asked for: time until the process must have ended. The local commit comes first; an upload that
    does not fit is finished by the next start on this disk. torchrun kills 30 s after SIGTERM, or as
    ``$TORCH_ELASTIC_SHUTDOWN_TIMEOUT`` says (torch 2.12)."""

    divergence: Divergence | None = None
    """When the training counts as diverged: saves are tagged then, and no resume takes them unless asked to. Its state
    travels with the checkpoints."""

    only: Literal["all", "trainable"] = "all"
    """``trainable``: of modules only parameters that need a gradient, or did, are saved, and buffers that training
    changes: for adapters over a frozen base, which the training script loads by itself. A fingerprint of the base is
    kept; resume compares it."""

    adapter_folder: str | None = None
    """A module of the state, or a dotted beginning below it: each checkpoint has its adapters of PEFT as a ready
    folder, too, which is part of it. Rank 0 puts it together before the first acknowledgement, in the memory of the
    adapter's largest tensor. None: no folder."""

    config: Any = None
    """The run's configuration, JSON-like. Its hash is recorded with each checkpoint; a resume under another says
    so. The values themselves are not stored."""

    total_steps: int | None = None
    """Steps the training will take, if known: to say at the start whether a save will ever be due."""

    run_log: bool = False
    """Leave a summary of each rank in the run root, every 50 saves and at the end: what every save took, and what
    failed. Until then it is on the local tier; what a killed job left there is taken along by the next start.
    ``dcpsvc report`` makes a page of it. Off, because it is one object a rank each time, which nothing deletes. See
    :class:`~dcpsvc.observing.runlog.RunLog` for more."""

    on_event: Callable[[Event], None] | None = None
    """Called with every life-cycle event of this rank, on whichever thread it happens. Must not block."""

    def __post_init__(self) -> None:
        _positive("sync_timeout_s", self.sync_timeout_s)
        _positive("upload_timeout_s", self.upload_timeout_s)
        _positive("retry_s", self.retry_s)
        _count("max_consecutive_failures", self.max_consecutive_failures)
        _count("keep_local", self.keep_local)
        _count("max_inflight", self.max_inflight)
        _one_of("on_failure", self.on_failure, ("continue", "raise"))
        _one_of("staging", self.staging, ("overlap", "block"))
        _one_of("only", self.only, ("all", "trainable"))
        _one_of("backpressure", self.backpressure, ("wait", "skip", "drop-oldest"))
        _positive("grace_s", self.grace_s)
        _instance("read_together", self.read_together, (bool, type(None)), "True, False or None")
        _count_or_none("staging_nbytes", self.staging_nbytes)
        _count_or_none("total_steps", self.total_steps)
        _count_or_none("transfer_concurrency", self.transfer_concurrency)
        if self.transfer_nbytes_per_s is not None:
            _positive("transfer_nbytes_per_s", self.transfer_nbytes_per_s, "bytes a second")
        _signals(self.stop_signals)
        _instance("every", self.every, (Every, type(None)), "an Every(...), or None")
        _instance("keep", self.keep, Keep, "a policy such as Latest(3)")
        check_keeps(self.keep)
        _instance("divergence", self.divergence, (Divergence, type(None)), "a Divergence(...), or None")
        if self.deletes_per_s is not None and not (is_number(self.deletes_per_s) and 0 < self.deletes_per_s < math.inf):
            raise ConfigError(f"deletes_per_s={self.deletes_per_s!r} must be a number above 0, or None")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """From keyword arguments as a user gave them.

        Raises:
            ConfigError: There is no such option, or it makes no sense.
        """
        known = [option.name for option in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            close = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise ConfigError(f"Checkpointer has no option {unknown[0]!r}: {hint}")
        return cls(**given)

    @property
    def local_dir(self) -> Path:
        """Where the local tier is."""
        if self.local is not None:
            return Path(self.local).absolute()
        if named := os.environ.get(LOCAL_VARIABLE):
            return Path(named).absolute()
        return Path(tempfile.gettempdir()) / f"dcpsvc-{os.getuid()}"

    @property
    def limits(self) -> Limits:
        """This rank's share of what its node may ask of the run root."""
        said = os.environ.get(SHARERS_VARIABLE, "")
        sharers = max(int(said), 1) if said.isdecimal() else 1
        alone, rate = Limits().concurrency, self.transfer_nbytes_per_s
        for_all = self.transfer_concurrency or min(alone * sharers, _NODE_CONCURRENCY)
        for_one = min(for_all, max(alone, for_all // sharers))
        nbytes_per_s = None if rate is None else rate / sharers
        if for_one * sharers <= for_all:
            return Limits(concurrency=for_one, nbytes_per_s=nbytes_per_s, patience_s=self.retry_s)
        return Limits(
            concurrency=for_one,
            nbytes_per_s=nbytes_per_s,
            patience_s=self.retry_s,
            node_concurrency=for_all,
            node_folder=self.local_dir / "turns",
        )

    @property
    def failure_budget(self) -> int:
        """Failed saves in a row before ``step()`` raises."""
        return 1 if self.on_failure == "raise" else self.max_consecutive_failures


def outside_a_job() -> Limits:
    """What ``load()`` and the command line may ask of a store: as one rank, and all of this node as its ranks."""
    return Limits(node_concurrency=_NODE_CONCURRENCY, node_folder=Options().local_dir / "turns")


def _positive(name: str, value: float, unit: str = "seconds") -> None:
    if not is_number(value) or not 0 < value < math.inf:
        raise ConfigError(f"{name}={value!r} must be a number of {unit} above 0")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r} must be {' or '.join(map(repr, known))}")


def _count(name: str, value: int) -> None:
    if not is_count(value):
        raise ConfigError(f"{name}={value!r} must be an int of at least 1")


def _count_or_none(name: str, value: int | None) -> None:
    if value is not None and not is_count(value):
        raise ConfigError(f"{name}={value!r} must be an int of at least 1, or None")


def _signals(names: object) -> None:
    if not isinstance(names, tuple) or not all(name in signal.Signals.__members__ for name in names):
        raise ConfigError(f"stop_signals={names!r} must be a tuple of names such as 'SIGTERM'")


def _instance(name: str, value: object, kind: type | tuple[type, ...], wanted: str) -> None:
    if not isinstance(value, kind):
        raise ConfigError(f"{name}={value!r} must be {wanted}")

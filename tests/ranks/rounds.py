"""One job that lives through many faults: each round a save with a fault on one rank, then one without."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

import dcpsvc
from dcpsvc.errors import RanksMissingError, RootError
from dcpsvc.format.keys import Attempt
from tests.ranks.faults import (
    Crew,
    FaultyStore,
    Trap,
    at_rest,
    debris,
    empty_folders,
    own_threads,
    rig,
    settled_difference,
    unfinished,
)
from tests.ranks.harness import Raised, raised_by
from tests.ranks.models import Training, checkpointer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

SYNC_S, UPLOAD_S = 3.0, 5.0
BOUND_S = 40.0
"""What a rank waits for an outcome at most: long past every deadline."""
_TRIES = 5


def does_not_save(rounds: Rounds, step: int) -> None:
    """This rank has forgotten."""
    del rounds, step


def saves_another_step(rounds: Rounds, step: int) -> Raised | None:
    """This rank has miscounted."""
    return rounds.attempt(step + 10_000)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong on one rank, and what all ranks are to hear.

    Attributes:
        at: A place of the life; see :class:`~tests.ranks.faults.Trap`.
        does: What happens to the rank there.
        store: Operations of its run root that go wrong all the while.
        around: Entered on that rank before the save, left when all have heard.
        calls: What that rank does instead of saving and waiting.
        ends: Called on that rank after the next save: what has hung until then may go on.
        stops: It hangs until the others have heard.
        regroups: The layout is new on all ranks, so that they exchange it.
        hears: Names of errors, one of which every rank gets; None, or none at all: the save is committed.
        blames: Phase and error that the ranks say of that rank.
        alone: What that rank's own ``save()`` raises instead.
        deadline_s: From the fault to the error.
    """

    at: str = ""
    does: Callable[[Rounds], Any] = lambda _: None
    store: dict[str, Callable[..., Any]] = field(default_factory=dict)
    around: Callable[[Rounds], AbstractContextManager[Any]] = lambda _: contextlib.nullcontext()
    calls: Callable[[Rounds, int], Raised | None] = lambda rounds, step: rounds.attempt(step)
    ends: Callable[[], None] = lambda: None
    stops: bool = False
    regroups: bool = False
    hears: tuple[str | None, ...] = ()
    blames: tuple[str, tuple[str, ...]] | None = None
    alone: str = ""
    deadline_s: float = SYNC_S


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one rank saw of one fault.

    Attributes:
        step: That was saved beside the fault; the next one was saved after it.
        error: What came of it here.
        began: The call of ``save()``, on the machine's monotonic clock.
        struck: The fault, on the rank that has it.
        heard: The error.
        returned_pending: ``save()`` returned while the outcome was open.
        then: Steps that a stranger finds committed when all have heard.
        trained: The training step after it was whole.
        afterwards: What came of the next save.
        counted: By how much the counters of committed and failed saves have grown.
        committed: Steps a stranger finds committed in the end.
        left: Files that belong to no checkpoint, on either tier, in the end.
        leaked: Threads, descriptors and groups more or less than before.
        generation: Of the group, before and in the end.
    """

    step: int
    error: Raised | None
    began: float
    struck: float | None
    heard: float
    returned_pending: bool | None
    then: list[int]
    trained: bool
    afterwards: Raised | None
    counted: tuple[int, int]
    committed: list[int]
    left: list[str]
    leaked: dict[str, int]
    generation: tuple[int, int]


class Brittle(torch.Tensor):
    """A tensor that can be described, and not copied."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in {torch.Tensor.copy_, torch._foreach_copy_}:
            raise RuntimeError("the device is gone")
        return super().__torch_function__(func, types, args, kwargs or {})


class Counters:
    """A part of the state that can refuse to be saved."""

    error: BaseException | None = None

    def state_dict(self) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return {"count": 7}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


def victim_of(role: str, world: int) -> int:
    """The rank at fault: the coordinator, or the last one."""
    return 0 if role == "coordinator" else world - 1


def patiently(call: Callable[[], Any]) -> Any:
    """All ranks again, if a busy machine has made one of them late."""
    for _ in range(_TRIES):
        with contextlib.suppress(RanksMissingError, RootError):
            return call()
    return call()


class Rounds:
    """One rank of such a job. Every rank has a disk of its own."""

    def __init__(self, rank: int, world: int, place: Path, victim: int) -> None:
        self.rank, self.world, self.place, self.victim = rank, world, place, victim
        self.crew, self.trap = Crew(rank, world), Trap()
        self.root, self.local = place / "run", place / f"node-{rank}"
        self.store = FaultyStore(self.root, self.trap)
        self.training = Training("ddp", rank)
        self.training.state["counters"] = self.counters = Counters()
        self.training.state["extra"] = dcpsvc.PerRank(torch.zeros(1))
        self.training.train(1)
        self.pending: Any = None
        self.unknown: list[Attempt] = []
        self.crew.line("begin")
        self.ckpt = patiently(self._open)
        rig(self.ckpt, self.trap)
        for self.step in (1, 2, 3):
            patiently(self._save)
        self.step -= 1
        self.before = at_rest()

    def _open(self) -> Any:
        return checkpointer(
            self.root,
            self.training.state,
            local=self.local,
            store=self.store,
            keep=dcpsvc.Latest(2),
            save_last=False,
            sync_timeout_s=SYNC_S,
            upload_timeout_s=UPLOAD_S,
            max_consecutive_failures=10**6,
            on_event=self.trap.observe,
        )

    def _save(self) -> None:
        self.ckpt.save(self.step).wait(BOUND_S)
        self.ckpt.wait(BOUND_S)

    def attempt(self, step: int) -> Raised | None:
        """Save and wait."""

        def save() -> None:
            self.pending = self.ckpt.save(step)
            self.was_pending = self.pending.state == "pending"
            self.pending.wait(BOUND_S)

        return raised_by(save)

    def live_through(self, name: str, fault: Fault) -> Round:
        """A save beside the fault, then one without. Collective."""
        step = self.step = self.step + 2
        self.crew.line(f"{name}: begin")
        self.was_pending, generation = None, self.ckpt._job.group.generation
        counted = self._counts()
        if fault.regroups:
            self.training.state["extra"] = dcpsvc.PerRank(torch.zeros(step))
        with self._armed(fault) if self.rank == self.victim else contextlib.nullcontext():
            began = time.monotonic()
            error = fault.calls(self, step) if self.rank == self.victim else self.attempt(step)
            heard = time.monotonic()
            if fault.alone and self.rank == self.victim:
                self.ckpt.wait(BOUND_S)  # nobody holds the save that its own thread was torn out of
            self._gather_after(name, fault)
            then = self._committed()
            self.crew.line(f"{name}: seen")
        struck = self.trap.struck_at if self.rank == self.victim else None
        self.crew.line(f"{name}: over")
        trained = math.isfinite(self.training.step())
        was_pending = self.was_pending
        afterwards = self.attempt(step + 1)
        self.ckpt.wait(BOUND_S)
        if self.rank == self.victim:
            fault.ends()
        self.crew.line(f"{name}: afterwards")
        now = self._counts()
        found = Round(
            step=step,
            error=error,
            began=began,
            struck=struck,
            heard=heard,
            returned_pending=was_pending,
            then=then,
            trained=trained,
            afterwards=afterwards,
            counted=(now[0] - counted[0], now[1] - counted[1]),
            committed=self._committed(),
            left=self._left(error, step),
            leaked=settled_difference(self.before),
            generation=(generation, self.ckpt._job.group.generation),
        )
        self.crew.line(f"{name}: end")
        return found

    @contextlib.contextmanager
    def _armed(self, fault: Fault) -> Iterator[None]:
        self.trap.set(fault.at, lambda: fault.does(self))
        self.store.faults |= fault.store
        with fault.around(self):
            yield
        self.store.faults.clear()
        self.trap.set_aside()

    def _gather_after(self, name: str, fault: Fault) -> None:
        """All have heard; a rank that hangs comes back when the others have."""
        if fault.stops:
            self.ckpt.wait(BOUND_S)  # it may stop after the commit, and others wait for it there, too
        if fault.stops and self.rank != self.victim:
            others = [rank for rank in range(self.world) if rank != self.victim]
            self.crew.line(f"{name}: heard", others)
            if self.rank == others[0]:
                self.crew.wake(self.victim, f"{name}: all heard")
        self.crew.line(f"{name}: all heard")

    def _counts(self) -> tuple[int, int]:
        statistics = self.ckpt.statistics()
        return statistics.committed, statistics.failed

    def _committed(self) -> list[int]:
        return [found.step for found in dcpsvc.list_checkpoints(self.root) if found.state == "committed"]

    def _left(self, error: Raised | None, step: int) -> list[str]:
        """An attempt of which nobody knows whether it is committed is not debris."""
        known = [found for found in dcpsvc.list_checkpoints(self.root) if found.state == "committed"]
        if error and error.type == "CommitUnknownError":
            self.unknown.append(Attempt(error["step"], error["attempt"]))
        attempts = [*known, *self.unknown]
        places = (self.root, self.local)
        return [
            name for place in places for name in (*debris(place, attempts), *empty_folders(place), *unfinished(place))
        ]


def live_through(
    rank: int, world: int, place: Path, role: str, faults: dict[str, Fault]
) -> tuple[dict[str, Round], Raised | None, list[str]]:
    """The life of one rank: what it saw of each fault, what ``close()`` raised, and threads that are left."""
    rounds = Rounds(rank, world, place, victim_of(role, world))
    found = {name: rounds.live_through(name, fault) for name, fault in faults.items()}
    return found, raised_by(rounds.ckpt.close), own_threads()

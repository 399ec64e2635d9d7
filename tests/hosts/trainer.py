"""One rank of a job that trains all the time, and saves when it is told to."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from tests.hosts import network
from tests.ranks import harness
from tests.ranks.models import checkpointer

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from pathlib import Path

    from dcpsvc import PendingSave

BESIDE_THE_SAVES_S = 0.01
CONNECT_S = 40.0
ALL_GATHER = "all-gather"
"""Where a rank can be held, beside the points of a checkpoint's life: just before it joins in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a process is told about its job.

    Attributes:
        rank: Global rank; None is the process that serves the store, as the agent of torchrun does.
        world: Ranks.
        namespace: Of its host.
        address: Of the store's host.
        port: Of the store.
        root: Run root, the same for all hosts.
        local: Directory on the host's own disk.
        folder: For what the process prints, and where it is stuck.
        options: For the Checkpointer.
    """

    rank: int | None
    world: int
    namespace: Path
    address: str
    port: int
    root: Path
    local: Path
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "store" if self.rank is None else f"rank-{self.rank}"


def serve(place: Place, pipe: Connection) -> None:
    """The process of the store."""
    _begin(place)
    store = dist.TCPStore(place.address, 0, is_master=True, wait_for_workers=False)
    pipe.send(("serving", {"port": store.port}))
    pipe.recv()


def train(place: Place, pipe: Connection) -> None:
    """A rank's process. What goes wrong is told; threads that are left do not keep it alive."""
    _begin(place)
    try:
        _Trainer(place, pipe).run()
    except BaseException as err:  # noqa: BLE001 - told to the test, whatever it is
        pipe.send(("broken", harness._described(err)))
    os._exit(0)


def _begin(place: Place) -> None:
    network.enter(place.namespace)  # before anything opens a socket or starts a thread
    harness._redirect(str(place.folder / f"{place.name}.log"))
    faulthandler.register(harness._DUMP, file=(place.folder / f"{place.name}.stacks").open("w"), all_threads=True)
    harness._end_with_parent()
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = network.INTERFACE


class _Trainer:
    """The training thread's loop, and a thread that listens to the test."""

    def __init__(self, place: Place, pipe: Connection) -> None:
        self._place, self._pipe = place, pipe
        self._telling = threading.Lock()
        self._wanted = 0
        self._goes_on = threading.Event()
        self._goes_on.set()
        self._ends = threading.Event()
        self._close_s: float | None = None
        self._holds: dict[str, threading.Event] = {}
        self._step, self._longest_s = 0, 0.0

    def run(self) -> None:
        self._join()
        self._model = torch.nn.Linear(256, 64)
        self._ckpt = checkpointer(
            self._place.root,
            {"model": self._model},
            local=self._place.local,
            on_event=self._observe,
            **self._place.options,
        )
        self._job = self._ckpt._job
        self._job.group = _Watched(self._job.group, self._maybe_wait)
        self._step = self._ckpt.resume()
        threading.Thread(target=self._listen, name="test-listener", daemon=True).start()
        self._tell("ready", resumed=self._step, weights=_values(self._model))
        self._train()
        began = time.monotonic()
        raised = harness.raised_by(self._ckpt.close, self._close_s)
        self._tell("closed", raised=raised, seconds=time.monotonic() - began, threads=_own_threads())
        self._pipe.recv()  # stays until it is ended, as a process with other things to do does

    def _join(self) -> None:
        rank, world = self._place.rank, self._place.world
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
        patience = timedelta(seconds=CONNECT_S)
        store = dist.TCPStore(self._place.address, self._place.port, is_master=False, timeout=patience)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=patience)
        dist.barrier()

    def _train(self) -> None:
        """No training collectives: a partition must not stop the steps by itself, so what stops them is ours."""
        while not self._ends.wait(BESIDE_THE_SAVES_S):
            began = time.monotonic()
            self._step = max(self._step + 1, self._wanted)  # ranks that were held up catch up
            _learn(self._model, self._step)
            self._ckpt.step(self._step)
            if self._step == self._wanted:
                self._save(self._step)
            self._longest_s = max(self._longest_s, time.monotonic() - began)
            if not self._goes_on.is_set():
                self._tell("stopped", step=self._step)
                self._goes_on.wait()

    def _save(self, step: int) -> None:
        began = time.monotonic()

        def ended(_: object) -> None:
            error = pending.committed.exception()
            raised = None if error is None else harness._described(error)
            self._tell("ended", step=step, raised=raised, began=began, at=time.monotonic())

        pending: PendingSave = self._ckpt.save(step)
        pending.committed.add_done_callback(ended)

    def _observe(self, event: Any) -> None:
        self._maybe_wait(str(event.name))

    def _maybe_wait(self, where: str) -> None:
        if (go := self._holds.get(where)) is not None:
            self._tell("held", where=where)
            go.wait()
            del self._holds[where]

    def _listen(self) -> None:
        while True:
            command, argument = self._pipe.recv()
            if command == "stop":
                self._goes_on.clear()
            elif command == "save":
                self._wanted = argument
                self._goes_on.set()
            elif command == "hold":
                self._holds[argument] = threading.Event()
            elif command == "release":
                self._holds[argument].set()
            elif command == "look":
                self._look()
            elif command == "close":
                self._close_s = argument
                self._ends.set()
                return

    def _look(self) -> None:
        longest_s, self._longest_s = self._longest_s, 0.0
        try:
            self._job.rendezvous.store.get("is anybody there")
            answers = True
        except RuntimeError:
            answers = False
        self._tell("seen", step=self._step, longest_s=longest_s, answers=answers, generation=self._job.group.generation)

    def _tell(self, kind: str, **details: Any) -> None:
        with self._telling:
            self._pipe.send((kind, details))


class _Watched:
    """The ranks' group, whose door can be held shut."""

    def __init__(self, group: Any, before: Any) -> None:
        self._group, self._before = group, before

    def all_gather(self, data: bytes) -> list[bytes]:
        self._before(ALL_GATHER)
        gathered: list[bytes] = self._group.all_gather(data)
        return gathered

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


def _learn(model: torch.nn.Module, step: int) -> None:
    """What was learnt is a function of the step alone: the same on all ranks, and known when it comes back."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)


def _values(model: torch.nn.Module) -> set[float]:
    return {value for parameter in model.parameters() for value in parameter.flatten().tolist()}


def _own_threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("dcpsvc"))

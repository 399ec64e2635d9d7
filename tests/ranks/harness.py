"""Real ranks for tests: processes that have joined one gloo job, bounded in time, and never left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.process import BaseProcess

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["numpy", "pytest", "torch", "torch._dynamo", "dcpsvc.checkpointer", "dcpsvc.reading", "tests.ranks.models"]
)

_DUMP = signal.SIGUSR2
_DUMP_S, _CONNECT_S = 2.0, 40.0


@dataclass(frozen=True, slots=True)
class Raised:
    """An exception as another process can look at it.

    Attributes:
        type: Name of its class.
        family: Names of the class and its bases.
        text: ``str()`` of it.
        attributes: Those that are plain values; dataclasses become dicts, tuples lists.
        trace: For people.
    """

    type: str
    family: tuple[str, ...]
    text: str
    attributes: dict[str, Any] = field(repr=False)
    trace: str = field(repr=False)

    def __getitem__(self, name: str) -> Any:
        return self.attributes[name]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one rank ended: with a value, with an exception, or by a signal.

    Attributes:
        rank: Which.
        value: What the function returned.
        raised: What it raised.
        signal: What killed it.
        log: What the process wrote to its standard output and error.
    """

    rank: int
    value: Any = None
    raised: Raised | None = None
    signal: int | None = None
    log: str = field(default="", repr=False)

    @property
    def returned(self) -> bool:
        """Whether the function came to its end."""
        return self.raised is None and self.signal is None


class StuckError(AssertionError):
    """Ranks were still running at the deadline; the text says where."""


@dataclass(frozen=True, slots=True)
class Job:
    """One job for :func:`run_jobs`; see :func:`run_ranks` for what its fields mean."""

    world: int
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    nodes: int = 1


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 50.0, nodes: int = 1
) -> list[Outcome]:
    """Call ``function(rank, world, *args)`` in ``world`` processes that have joined one gloo job.

    The store of the job lives in this process, as it does with torchrun, so any rank may die.

    Args:
        world: Processes; 0 stands for one process without a process group (``rank`` 0 of ``world`` 1).
        function: At the top level of a module. Its result must pickle.
        *args: For it.
        timeout_s: When the ranks are killed.
        nodes: ``LOCAL_RANK`` counts anew on each.

    Raises:
        StuckError: A rank had not ended by then.
    """
    (outcomes,) = run_jobs([Job(world, function, args, nodes)], timeout_s=timeout_s)
    return outcomes


def run_jobs(jobs: list[Job], *, timeout_s: float = 50.0) -> list[list[Outcome]]:
    """Several jobs side by side, each as :func:`run_ranks` runs it: for jobs that mostly wait."""
    stores = [
        dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if job.world else None for job in jobs
    ]
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory(prefix="dcpsvc-ranks-") as directory:
        ranks = [
            [_Rank(rank, Path(tempfile.mkdtemp(dir=directory))) for rank in range(max(job.world, 1))] for job in jobs
        ]
        everyone = [rank for crew in ranks for rank in crew]
        try:
            for job, store, crew in zip(jobs, stores, ranks, strict=True):
                for rank in crew:
                    rank.start(job.world, store.port if store else 0, job.nodes, job.function, job.args)
            _collect(everyone, deadline)
        finally:
            for rank in everyone:
                rank.end()
        return [[rank.outcome() for rank in crew] for crew in ranks]


def values(outcomes: list[Outcome]) -> list[Any]:
    """What each rank returned.

    Raises:
        AssertionError: One did not; says what happened instead.
    """
    for outcome in outcomes:
        if not outcome.returned:
            what = outcome.raised.trace if outcome.raised else f"killed by signal {outcome.signal}"
            raise AssertionError(f"rank {outcome.rank}: {what}\n--- its output\n{outcome.log[-4000:]}")
    return [outcome.value for outcome in outcomes]


def raised_by(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Raised | None:
    """The exception a call raises, for a rank to return; None if it raises none."""
    try:
        call(*args, **kwargs)
    except BaseException as err:  # noqa: BLE001 - told to the test, whatever it is
        return _described(err)
    return None


def die() -> None:
    """End this process as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(point: str, *, step: int | None = None) -> Callable[[Any], None]:
    """An observer for ``on_event`` that ends the process at a point of a checkpoint's life."""

    def observe(event: Any) -> None:
        if event.name == point and step in {None, event.step}:
            die()

    return observe


class _Rank:
    """One process, seen from the test."""

    def __init__(self, rank: int, directory: Path) -> None:
        self._rank, self._output = rank, directory / f"rank-{rank}.log"
        self._stacks = directory / f"rank-{rank}.stacks"
        self._process: BaseProcess | None = None
        self._results: connection.Connection | None = None
        self._said: tuple[str, Any] | None = None
        self._log = ""

    def start(self, world: int, port: int, nodes: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._results, theirs = _processes.Pipe(duplex=False)
        given = (self._rank, world, port, nodes, str(self._output), str(self._stacks), theirs, function, args)
        self._process = _processes.Process(target=_be_rank, args=given, name=f"rank {self._rank}", daemon=True)
        self._process.start()
        theirs.close()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def waited_for(self) -> list[Any]:
        """What becomes ready when this rank says something or ends."""
        assert self._process is not None
        return [self._process.sentinel] if self._results is None else [self._process.sentinel, self._results]

    def listen(self) -> None:
        if self._results is not None and self._results.poll():
            with contextlib.suppress(EOFError, OSError):
                self._said = self._results.recv()
            self._results.close()
            self._results = None

    def ask_where(self) -> None:
        """Have a rank that is stuck write its stacks."""
        assert self._process is not None
        assert self._process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, _DUMP)

    def where(self) -> str:
        stacks = self._stacks.read_text(errors="replace") if self._stacks.exists() else "it had not begun"
        return f"rank {self._rank} was still running:\n{stacks}\n{self._read_log()[-2000:]}"

    def end(self) -> None:
        if self.running:
            assert self._process is not None
            self._process.kill()
        if self._process is not None and self._process.pid is not None:
            self._process.join()
        if self._results is not None:
            self.listen()
        self._log = self._read_log()

    def outcome(self) -> Outcome:
        assert self._process is not None
        if self._said is None:
            code = self._process.exitcode or 0
            raised = Raised(
                "SystemExit", ("SystemExit",), str(code), {"code": code}, f"exited with {code} without a word"
            )
            return Outcome(
                self._rank, raised=None if code < 0 else raised, signal=-code if code < 0 else None, log=self._log
            )
        kind, content = self._said
        if kind == "raised":
            return Outcome(self._rank, raised=content, log=self._log)
        return Outcome(self._rank, value=content, log=self._log)

    def _read_log(self) -> str:
        return self._output.read_text(errors="replace") if self._output.exists() else ""


def _collect(ranks: list[_Rank], deadline: float) -> None:
    while running := [rank for rank in ranks if rank.running]:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            break
        connection.wait([thing for rank in running for thing in rank.waited_for()], timeout=left_s)
        for rank in running:
            rank.listen()
    if stuck := [rank for rank in ranks if rank.running]:
        for rank in stuck:
            rank.ask_where()
        time.sleep(_DUMP_S)
        raise StuckError("\n".join(rank.where() for rank in stuck))


def _be_rank(  # noqa: PLR0917 - as a process takes them
    rank: int,
    world: int,
    port: int,
    nodes: int,
    output: str,
    stacks: str,
    results: connection.Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """The process. Ends at once when it has said its result, whatever threads are left."""
    _redirect(output)
    with Path(stacks).open("w") as file:
        faulthandler.register(_DUMP, file=file, all_threads=True)
        faulthandler.enable()  # a rank that crashes says where, in its log
        _end_with_parent()
        torch.set_num_threads(1)
        try:
            if world:
                _join(rank, world, port, nodes)
            said = ("value", function(rank, max(world, 1), *args))
        except BaseException as err:  # noqa: BLE001 - told to the test, whatever it is
            said = ("raised", _described(err))
        results.send(said)
        results.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _join(rank: int, world: int, port: int, nodes: int) -> None:
    """Connect, and pass the start line: a rank that dies earlier would fail its peers inside gloo's connect."""
    a_node = world // nodes
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank % a_node)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(a_node), "GROUP_RANK": str(rank // a_node)}
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=_CONNECT_S))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=_CONNECT_S))
    dist.barrier()


def _redirect(output: str) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _end_with_parent() -> None:
    """A test run that is killed takes its ranks along."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="harness-parent", daemon=True).start()


def _described(err: BaseException) -> Raised:
    kinds = tuple(kind.__name__ for kind in type(err).__mro__)
    trace = "".join(traceback.format_exception(err))
    return Raised(type(err).__name__, kinds, str(err), _plain(vars(err)), trace)


def _plain(value: Any) -> Any:
    return json.loads(
        json.dumps(value, default=lambda v: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else repr(v))
    )

"""A job on several hosts, seen from a test: its processes, what they say, and how fast they heard of a fault."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.hosts import trainer
from tests.ranks import harness

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from tests.hosts.network import Hosts
    from tests.ranks.harness import Raised

SYNC_S = 3.0
"""Of every job here: short, because each test waits for it, and longer than a busy machine is silent."""
DEADLINE_S = 1.25 * SYNC_S
"""For what a heartbeat has to tell: it beats every sixth of that time, and is looked at every twentieth."""
SLACK_S = 5.0
"""How much later than at its deadline something may be heard on a machine that is busy with other things."""
PATIENCE_S = 60.0

TIMES = "DCPSVC_FAULT_TIMES"
"""Environment variable: a file that gets a line for each fault, with the time until the last rank heard of it."""


def note(fault: str, world: int, errors: dict[int, Raised], seconds: float, deadline_s: float) -> None:
    """One line about a fault, for whoever collects them."""
    kinds = ", ".join(sorted({error.type for error in errors.values()}))
    line = {"fault": fault, "world": world, "error": kinds, "seconds": round(seconds, 3), "deadline_s": deadline_s}
    if path := os.environ.get(TIMES):
        with Path(path).open("a") as file:
            file.write(json.dumps(line) + "\n")


class Process:
    """A rank, or the process of the store."""

    def __init__(self, place: trainer.Place, host: int) -> None:
        self.place, self.host = place, host
        self._said: list[tuple[str, Any]] = []
        self._pipe, theirs = harness._processes.Pipe()
        entry = trainer.serve if place.rank is None else trainer.train
        self._process: BaseProcess = harness._processes.Process(
            target=entry, args=(place, theirs), name=place.name, daemon=True
        )
        self._process.start()
        theirs.close()

    @property
    def rank(self) -> int:
        assert self.place.rank is not None
        return self.place.rank

    def tell(self, command: str, argument: Any = None) -> None:
        self._pipe.send((command, argument))

    def hear(self, kind: str, **wanted: Any) -> Any:
        """The next message of a kind; those of other kinds wait for their turn."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            for message in self._said:
                if message[0] == kind and all(message[1][name] == value for name, value in wanted.items()):
                    self._said.remove(message)
                    return message[1]
            self._listen(deadline, kind)

    def signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _listen(self, deadline: float, kind: str) -> None:
        if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
            raise AssertionError(f"{self.place.name} did not say {kind!r} in time{self._account()}")
        try:
            kind_said, details = self._pipe.recv()
        except EOFError:
            raise AssertionError(f"{self.place.name} ended instead of saying {kind!r}{self._account()}") from None
        if kind_said == "broken":
            raise AssertionError(f"{self.place.name}: {details.trace}{self._account()}")
        self._said.append((kind_said, details))

    def _account(self) -> str:
        with contextlib.suppress(ProcessLookupError):
            self.signal(harness._DUMP)
            time.sleep(harness._DUMP_S)
        files = [self.place.folder / f"{self.place.name}.{kind}" for kind in ("stacks", "log")]
        texts = [file.read_text(errors="replace")[-4000:] for file in files if file.exists()]
        return "".join(f"\n---\n{text}" for text in (str(self._said), *texts))


class Cluster:
    """A job that trains on some hosts, ranks in blocks, the store in a process of its own on the first of them.

    Args:
        hosts: All there are.
        on: Those it runs on.
        world: Ranks.
        directory: Shared by all hosts: the run root is in it.
        **options: For the Checkpointer.
    """

    def __init__(self, hosts: Hosts, on: list[int], world: int, directory: Path, **options: Any) -> None:
        self.hosts, self.world, self.root = hosts, world, directory / "run"
        self._on, self._directory = on, directory
        self._options = {"sync_timeout_s": SYNC_S, "upload_timeout_s": 60.0, "save_last": False} | options
        self._options.setdefault("max_consecutive_failures", 1000)
        self._processes: list[Process] = []
        self.store = self._start(None, on[0], 0)
        port = self.store.hear("serving")["port"]
        self.ranks = [self._start(rank, on[rank * len(on) // world], port) for rank in range(world)]
        self.began = [rank.hear("ready") for rank in self.ranks]

    def on(self, *hosts: int) -> list[Process]:
        """The ranks of these hosts."""
        return [rank for rank in self.ranks if rank.host in hosts]

    def cut_off(self, host: int) -> float:
        """Says when."""
        self.hosts.cut_off(host)
        return time.monotonic()

    def kill(self, host: int) -> float:
        """As a power cut does it: nothing is sent any more, not even that connections end. Says when."""
        at = self.cut_off(host)
        for process in self._processes:
            if process.host == host:
                process.kill()
        self.ranks = [rank for rank in self.ranks if rank.host != host]
        return at

    def close(self) -> list[dict[str, Any]]:
        """How each rank closes."""
        for rank in self.ranks:
            rank.tell("close")
        return [rank.hear("closed") for rank in self.ranks]

    def look(self) -> list[dict[str, Any]]:
        """What each rank says of itself now; its training thread is not asked."""
        for rank in self.ranks:
            rank.tell("look")
        return [rank.hear("seen") for rank in self.ranks]

    def save(self) -> int:
        """Have every rank save at the same step, the next that no rank has made yet; says which."""
        for rank in self.ranks:
            rank.tell("stop")
        step = max(rank.hear("stopped")["step"] for rank in self.ranks) + 1
        for rank in self.ranks:
            rank.tell("save", step)
        return step

    def saved(self) -> int:
        """Save, and have it committed on every rank; says which step."""
        step = self.save()
        ended = {rank.place.name: rank.hear("ended", step=step)["raised"] for rank in self.ranks}
        told = [f"{name}: {raised.text}" for name, raised in ended.items() if raised is not None]
        assert not told, "\n".join(told)
        return step

    def hold(self, ranks: list[Process], where: str) -> None:
        """Have these wait there until :meth:`release`; see :meth:`held`."""
        for rank in ranks:
            rank.tell("hold", where)

    def held(self, ranks: list[Process], where: str) -> None:
        """Once all of them are there."""
        for rank in ranks:
            rank.hear("held", where=where)

    def release(self, ranks: list[Process], where: str) -> None:
        for rank in ranks:
            rank.tell("release", where)

    def faulted(self, fault: str, at: float, step: int, deadline_s: float = DEADLINE_S) -> dict[int, Raised]:
        """The error each live rank got for a save after a fault; all of them in time.

        Args:
            fault: In words.
            at: When it happened.
            step: Of the save.
            deadline_s: By which every rank must have heard.
        """
        ended = {rank.rank: rank.hear("ended", step=step) for rank in self.ranks}
        return self.noted(fault, at, ended, deadline_s)

    def noted(self, fault: str, at: float, ended: dict[int, Any], deadline_s: float = DEADLINE_S) -> dict[int, Raised]:
        """See :meth:`faulted`; for what some ranks said already."""
        errors = {rank: end["raised"] for rank, end in ended.items()}
        assert None not in errors.values(), f"committed on some rank: {errors}"
        seconds = max(end["at"] - max(at, end["began"]) for end in ended.values())
        note(fault, self.world, errors, seconds, deadline_s)
        assert seconds < deadline_s + SLACK_S
        for rank, error in errors.items():
            assert "SaveError" in error.family
            assert error["step"] == ended[rank]["step"]
            assert error["attempt"]
        return errors

    def answered(self) -> None:
        """Once the store answers on every rank again."""
        deadline = time.monotonic() + PATIENCE_S
        while not all(seen["answers"] for seen in self.look()):
            assert time.monotonic() < deadline, "the store did not come back"
            time.sleep(0.1)

    def unanswered(self, ranks: list[Process]) -> None:
        """Once each of these has given up a call to the store."""
        deadline = time.monotonic() + PATIENCE_S
        for rank in ranks:
            answers = True
            while answers:
                assert time.monotonic() < deadline, "the store answers"
                rank.tell("look")
                answers = rank.hear("seen")["answers"]

    def trains_on(self) -> None:
        """Every rank makes steps now, and none of them has taken longer than the longest wait for the store."""
        before = self.look()
        deadline = time.monotonic() + PATIENCE_S
        while not all(now["step"] > then["step"] + 5 for now, then in zip(self.look(), before, strict=True)):
            assert time.monotonic() < deadline, "training stands still"
            time.sleep(0.05)
        assert max(seen["longest_s"] for seen in before) < SYNC_S + SLACK_S

    def end(self) -> None:
        """Kill whatever is left."""
        for process in self._processes:
            process.kill()
        self._processes = []

    def _start(self, rank: int | None, host: int, port: int) -> Process:
        folder = self._directory / "said"
        folder.mkdir(exist_ok=True)
        place = trainer.Place(
            rank=rank,
            world=self.world,
            namespace=self.hosts.namespace(host),
            address=self.hosts.address(self._on[0]),
            port=port,
            root=self.root,
            local=self.hosts.nvme(host),
            folder=folder,
            options=self._options,
        )
        self._processes.append(Process(place, host))
        return self._processes[-1]

"""The log of a run: a JSON line for each event on this machine, and a summary in the run root, in segments."""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dcpsvc import deadline
from dcpsvc.errors import StoreError
from dcpsvc.events import Event, Point
from dcpsvc.format import keys
from dcpsvc.observing import spool as spools
from dcpsvc.observing.phases import SaveTimes, Tracker
from dcpsvc.observing.spool import SEGMENT_NBYTES, Segment
from dcpsvc.storage.open import open_store
from dcpsvc.storage.threads import at_once
from dcpsvc.storage.tries import retries

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from dcpsvc.storage.base import Store

MAX_NBYTES = 64 << 20
_CLOSE_S = 30.0
"""Longest that leaving the summary behind may keep ``close()``."""

_ABOUT_THE_JOB = frozenset({Point.OPENED, Point.RECOVERED, Point.RESUMED, Point.SAVE_FAILED, Point.CLOSED})
logger = logging.getLogger("dcpsvc")


class RunLog:
    """An observer that keeps what happened: ``on_event=RunLog("runs/exp42", folder="logs")``. Every rank has its own.

    Args:
        root: The run root, which gets a side file ``events/...`` of this rank every ``segment_saves`` saves and at
            the end: a line for each save with what it took, and for what is about the job. None: none.
        folder: A directory on this machine that gets a line for each event, at once. None: none.
        spool: A directory on this machine for the lines on their way to the root; those of a process that was killed
            are taken along by the next one here. None: they are in memory.
        segment_saves: How many saves one side file tells of.
        storage_options: For the run root.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Store | None = None,
        *,
        folder: str | os.PathLike[str] | None = None,
        spool: str | os.PathLike[str] | None = None,
        segment_saves: int = 50,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._store = None if root is None else open_store(root, storage_options)
        self._folder = None if folder is None else Path(folder).absolute()
        self._spool = None if spool is None else Path(spool).absolute()
        self._segment_saves = segment_saves
        self._started = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        self._token = secrets.token_hex(4)
        self._tracker = Tracker(retries)
        self._segment: Segment | None = None
        self._segments = self._saves = 0
        self._undelivered: list[Segment] = []
        self._has_looked = False
        self._lock, self._delivering = threading.Lock(), threading.Lock()

    def __call__(self, event: Event) -> None:
        """Take an event in. Any thread; at ``closed`` waits for the run root, for 30 s at most."""
        at, now = time.time(), time.perf_counter()
        with self._lock:
            self._write(event, at)
            if event.name is Point.TRAINING_WAITED and not self._tracker.follows(event):  # it came after the commit
                self._add({"kind": "waited", "t": round(at, 3), **_about(event)}, event.rank)
            if (save := self._tracker.take(event, at, now)) is not None:
                self._saves += 1
                self._add({"kind": "save", **save.to_json()}, event.rank)
            if event.name in _ABOUT_THE_JOB:
                self._add({"kind": "event", "t": round(at, 3), **_about(event)}, event.rank)
        if event.name is Point.CLOSED:
            self._deliver()

    def flush(self) -> None:
        """Bring a segment that is long enough to the run root, and once what dead processes left. Never raises.

        Takes as long as the run root, 30 s at most: for a thread that nobody waits for.
        """
        with self._lock:
            due = self._saves >= self._segment_saves or (
                self._segment is not None and len(self._segment.data) >= SEGMENT_NBYTES
            )
        if due or not self._has_looked:
            self._deliver(whole=due)

    def _write(self, event: Event, at: float) -> None:
        if self._folder is None:
            return
        name = keys.events(self._started, self._token, event.rank, 0).removeprefix(keys.EVENTS)
        path = self._folder / name
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(_line({"t": round(at, 6), **_about(event)}))
        except OSError as err:
            logger.warning("events are no longer written to %s: %s", path, err)
            self._folder = None

    def _add(self, said: dict[str, Any], rank: int) -> None:
        if self._store is None:
            return
        if self._segment is None:
            self._segment = self._begin(keys.events(self._started, self._token, rank, self._segments))
            self._segments += 1
        try:
            self._segment.add(_line(said).encode())
        except OSError as err:
            self._in_memory(err)
            self._segment.let_go()

    def _begin(self, key: str) -> Segment:
        try:
            return spools.begin(self._spool, key)
        except OSError as err:
            self._in_memory(err)
            return spools.begin(None, key)

    def _in_memory(self, err: OSError) -> None:
        logger.warning("lines for the log of this run are kept in memory, not in %s: %s", self._spool, err)
        self._spool = None

    def _deliver(self, *, whole: bool = True) -> None:
        with self._lock:
            if whole and self._segment is not None:
                self._undelivered.append(self._segment)
                self._segment, self._saves = None, 0
            if not self._has_looked and self._spool is not None:
                self._undelivered += spools.orphans(self._spool)
            self._has_looked = True
        try:
            deadline.call(self._put, _CLOSE_S, "writing the log of the run")
        except (StoreError, TimeoutError, RuntimeError, OSError) as err:
            logger.warning("the log of this run is not at the run root: %s", err)

    def _put(self) -> None:
        with self._delivering:  # a call that hangs keeps it: the next one gives up at its deadline
            while self._undelivered and self._store is not None:
                segment = self._undelivered[0]
                self._store.put(segment.key, bytes(segment.data))
                segment.delivered()
                del self._undelivered[0]


class Told(NamedTuple):
    """What logs tell.

    Attributes:
        saves: Of all ranks, by time.
        events: About the jobs, by time.
        skipped: Files that were not read, and why.
    """

    saves: list[SaveTimes]
    events: list[dict[str, Any]]
    skipped: list[str]


def read(store: Store) -> Told:
    """What the jobs of a run have left at its root.

    A line that says something else is passed over: nothing depends on it.

    Raises:
        StoreError: The listing failed.
    """
    told = _Told()
    listed = list(store.list(keys.EVENTS))
    told.skipped += [_too_large(entry.key, entry.nbytes) for entry in listed if entry.nbytes > MAX_NBYTES]
    wanted = [entry.key for entry in listed if entry.nbytes <= MAX_NBYTES]

    def get(key: str) -> bytes | StoreError:
        try:
            return store.get(key, max_nbytes=MAX_NBYTES)
        except StoreError as err:
            return err

    with ThreadPoolExecutor(at_once(store)) as threads:
        for key, data in zip(wanted, threads.map(get, wanted), strict=True):
            if isinstance(data, StoreError):
                told.skipped.append(f"{key}: {data}")
                continue
            for said in _parse(data.splitlines()):
                told.take(said)
    return told.sorted()


def read_folder(folder: Path) -> Told:
    """The same, from the logs that ranks have written to ``folder``: of jobs that were killed, too.

    Raises:
        OSError: A file cannot be read.
    """
    told = _Told()
    for path in sorted(folder.glob("*.rank-*.jsonl")):
        if (nbytes := path.stat().st_size) > MAX_NBYTES:
            told.skipped.append(_too_large(str(path), nbytes))
            continue
        tracker = Tracker()
        for said in _parse(path.read_bytes().splitlines()):
            if "kind" in said:
                told.take(said)
            elif (event := _event(said)) is not None:
                if event.name is Point.TRAINING_WAITED and not tracker.follows(event):
                    told.take({"kind": "waited", **said})
                if (save := tracker.take(event, said["t"], said["t"])) is not None:
                    told.saves.append(save)
                if event.name in _ABOUT_THE_JOB:
                    told.events.append(said)
    return told.sorted()


def _too_large(name: str, nbytes: int) -> str:
    return f"{name}: {nbytes >> 20} MiB, more than {MAX_NBYTES >> 20}"


@dataclass(slots=True)
class _Told:
    saves: list[SaveTimes] = field(default_factory=list[SaveTimes])
    events: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    skipped: list[str] = field(default_factory=list[str])
    waited: list[Event] = field(default_factory=list[Event])

    def take(self, said: dict[str, Any]) -> None:
        """One line."""
        if said.get("kind") == "save":
            with contextlib.suppress(KeyError, TypeError, ValueError):
                self.saves.append(SaveTimes.from_json(said))
        elif (event := _event(said)) is not None:
            if event.name is Point.TRAINING_WAITED:
                self.waited.append(event)
            else:
                self.events.append(said)

    def sorted(self) -> Told:
        """With what was told after the end of a save added to it."""
        by_key = {(save.step, save.attempt, save.rank): save.waited for save in self.saves}
        for event in self.waited:
            waited = by_key.get((event.step or 0, event.attempt, event.rank), {})
            waited[event.phase] = waited.get(event.phase, 0.0) + (event.seconds or 0.0)
        events = sorted(self.events, key=lambda event: event["t"])
        return Told(sorted(self.saves, key=lambda save: save.began), events, self.skipped)


def _event(said: dict[str, Any]) -> Event | None:
    try:
        about = {name: said.get(name) for name in ("step", "nbytes", "seconds")}
        texts = {name: str(said.get(name) or "") for name in ("attempt", "phase", "detail")}
        said["t"] = float(said["t"])
        return Event(name=Point(said["event"]), rank=int(said["rank"]), **about, **texts)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError):
        return None


def _parse(lines: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):  # the last line of a killed process
            continue
        if isinstance(said, dict):
            yield said


def _about(event: Event) -> dict[str, Any]:
    said = {name: value for name, value in asdict(event).items() if value not in {None, ""}}
    return {"event": str(said.pop("name")), **said}


def _line(document: dict[str, Any]) -> str:
    return json.dumps(document, separators=(",", ":"), allow_nan=False) + "\n"

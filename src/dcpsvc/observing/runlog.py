"""The log of a run: a JSON line for each event on this machine, and a summary in the run root when the job closes."""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcpsvc import deadline
from dcpsvc.errors import StoreError
from dcpsvc.events import Event, Point
from dcpsvc.format import keys
from dcpsvc.observing.phases import SaveTimes, Tracker
from dcpsvc.reading import at_once
from dcpsvc.storage.open import open_store
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
        root: The run root, which gets one side file ``events/...`` for this rank when the Checkpointer closes: a line
            for each save with the seconds of its phases, and those about the job. None: none.
        folder: A directory on this machine that gets a line for each event, at once. None: none.
        storage_options: For the run root.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Store | None = None,
        *,
        folder: str | os.PathLike[str] | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._store = None if root is None else open_store(root, storage_options)
        self._folder = None if folder is None else Path(folder).absolute()
        self._started = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        self._token = secrets.token_hex(4)
        self._tracker = Tracker(retries)
        self._lines: list[str] = []
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Take an event in. Any thread; at ``closed`` waits for the run root, for 30 s at most."""
        at, now = time.time(), time.perf_counter()
        with self._lock:
            self._write(event, at)
            if (save := self._tracker.take(event, at, now)) is not None:
                self._lines.append(_line({"kind": "save", **save.to_json()}))
            if event.name in _ABOUT_THE_JOB:
                self._lines.append(_line({"kind": "event", "t": round(at, 3), **_about(event)}))
            summary = "".join(self._lines)
        if event.name is Point.CLOSED and self._store is not None:
            self._leave(self._store, keys.events(self._started, self._token, event.rank), summary)

    def _write(self, event: Event, at: float) -> None:
        if self._folder is None:
            return
        path = self._folder / keys.events(self._started, self._token, event.rank).removeprefix(keys.EVENTS)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(_line({"t": round(at, 6), **_about(event)}))
        except OSError as err:
            logger.warning("events are no longer written to %s: %s", path, err)
            self._folder = None

    def _leave(self, store: Store, key: str, summary: str) -> None:
        def put() -> None:
            store.put(key, summary.encode())

        try:
            deadline.call(put, _CLOSE_S, "writing the log of the run")
        except (StoreError, TimeoutError, RuntimeError) as err:
            logger.warning("the log of this run is not at the run root: %s", err)


def read(store: Store) -> tuple[list[SaveTimes], list[dict[str, Any]]]:
    """What the jobs of a run have left at its root: saves of all ranks, and events about the jobs, by time.

    A line that says something else is passed over: nothing depends on it.

    Raises:
        StoreError: The listing failed.
    """
    saves: list[SaveTimes] = []
    events: list[dict[str, Any]] = []
    wanted = [entry.key for entry in store.list(keys.EVENTS) if entry.nbytes <= MAX_NBYTES]
    with ThreadPoolExecutor(at_once(store)) as threads:
        for data in threads.map(lambda key: store.get(key, max_nbytes=MAX_NBYTES), wanted):
            for said in _parse(data.splitlines()):
                _sort_in(said, saves, events)
    return _by_time(saves, events)


def read_folder(folder: Path) -> tuple[list[SaveTimes], list[dict[str, Any]]]:
    """The same, from the logs that ranks have written to ``folder``: of jobs that were killed, too.

    Raises:
        OSError: A file cannot be read.
    """
    saves: list[SaveTimes] = []
    events: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.rank-*.jsonl")):
        tracker = Tracker()
        for said in _parse(path.read_bytes().splitlines()):
            event = _event(said)
            if event is not None:
                if (save := tracker.take(event, said["t"], said["t"])) is not None:
                    saves.append(save)
                if event.name in _ABOUT_THE_JOB:
                    events.append(said)
    return _by_time(saves, events)


def _by_time(saves: list[SaveTimes], events: list[dict[str, Any]]) -> tuple[list[SaveTimes], list[dict[str, Any]]]:
    return sorted(saves, key=lambda save: save.began), sorted(events, key=lambda event: event["t"])


def _sort_in(said: dict[str, Any], saves: list[SaveTimes], events: list[dict[str, Any]]) -> None:
    if said.get("kind") == "event":
        if _event(said) is not None:
            events.append(said)
        return
    try:
        saves.append(SaveTimes.from_json(said))
    except (KeyError, TypeError, ValueError):
        return


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

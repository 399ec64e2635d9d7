"""Prometheus metrics of one rank: a text file for the node exporter, or an endpoint on this machine alone."""

from __future__ import annotations

import os
import threading
import time
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import ConfigError
from dcpsvc.events import Event, Point
from dcpsvc.observing.phases import Tracker
from dcpsvc.storage.tries import retries

if TYPE_CHECKING:
    from dcpsvc.observing.phases import SaveTimes

_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)
_WRITES_AT = frozenset(
    {Point.OPENED, Point.RESUMED, Point.COMMITTED, Point.SAVE_FAILED, Point.SAVE_SKIPPED, Point.CLOSED}
)


class PrometheusMetrics:
    """An observer that counts: ``on_event=PrometheusMetrics(path="/var/lib/node_exporter/exp42-{rank}.prom")``.

    Needs the package ``prometheus-client`` (``pip install dcpsvc[prometheus]``).

    Args:
        path: A file that is replaced as a whole at each save; ``{rank}`` stands for the rank.
        port: An endpoint on 127.0.0.1 instead, until the Checkpointer closes; 0 takes a free one, see :attr:`port`.

    Raises:
        ConfigError: Neither or both are given, or the package is missing.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, port: int | None = None) -> None:
        if (path is None) == (port is None):
            raise ConfigError("PrometheusMetrics: give one of path= and port=")
        try:
            self._client: Any = import_module("prometheus_client")
        except ImportError as err:
            raise ConfigError("PrometheusMetrics needs the package prometheus-client: dcpsvc[prometheus]") from err
        self._path = None if path is None else os.fspath(path)
        self._lock = threading.Lock()
        self._tracker = Tracker(retries)
        self._retried = retries()
        gauge, of_rank = self._client.Gauge, ["rank"]
        self._registry = registry = self._client.CollectorRegistry()
        self._saves = self._client.Counter("dcpsvc_saves", "Saves that ended", ["rank", "outcome"], registry=registry)
        self._seconds = self._client.Histogram(
            "dcpsvc_phase_seconds", "Seconds of each phase", ["rank", "phase"], registry=registry, buckets=_BUCKETS
        )
        self._step = gauge("dcpsvc_committed_step", "Newest commit", of_rank, registry=registry)
        self._time = gauge("dcpsvc_committed_timestamp_seconds", "When it was committed", of_rank, registry=registry)
        self._nbytes = gauge("dcpsvc_checkpoint_bytes", "Size of the newest commit", of_rank, registry=registry)
        self._under_way = gauge("dcpsvc_saves_under_way", "Saves begun and not ended", of_rank, registry=registry)
        self._retries = self._client.Counter(
            "dcpsvc_store_retries", "Calls to stores that were made again", of_rank, registry=registry
        )
        self._server: Any = (
            None if port is None else self._client.start_http_server(port, addr="127.0.0.1", registry=registry)
        )

    @property
    def port(self) -> int | None:
        """Of the endpoint."""
        return None if self._server is None else int(self._server[0].server_port)

    def __call__(self, event: Event) -> None:
        """Count an event. Any thread."""
        rank = str(event.rank)
        with self._lock:
            save = self._tracker.take(event, time.time(), time.perf_counter())
            self._under_way.labels(rank).set(self._tracker.open_attempts())
            before, self._retried = self._retried, retries()
            self._retries.labels(rank).inc(self._retried - before)
        if save is not None:
            self._count(save, rank)
        if event.name is Point.COMMITTED:
            self._step.labels(rank).set(event.step or 0)
            self._time.labels(rank).set_to_current_time()
            self._nbytes.labels(rank).set(event.nbytes or 0)
        if self._path is not None and event.name in _WRITES_AT:
            self._write(self._path.replace("{rank}", rank))
        if event.name is Point.CLOSED:
            self.close()

    def close(self) -> None:
        """Close the endpoint. Happens by itself when the Checkpointer closes."""
        if self._server is not None:
            (server, thread), self._server = self._server, None
            server.shutdown()
            server.server_close()
            thread.join()

    def _count(self, save: SaveTimes, rank: str) -> None:
        self._saves.labels(rank, save.outcome).inc()
        for phase, seconds in save.seconds.items():
            self._seconds.labels(rank, phase).observe(seconds)

    def _write(self, path: str) -> None:
        with self._lock:
            self._client.write_to_textfile(path, self._registry)

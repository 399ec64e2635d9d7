"""OpenTelemetry: a span for each save of this rank, and one inside it for each of its phases."""

from __future__ import annotations

import threading
import time
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dcpsvc.errors import ConfigError
from dcpsvc.observing.phases import Tracker

if TYPE_CHECKING:
    from dcpsvc.events import Event
    from dcpsvc.observing.phases import SaveTimes


class Spans:
    """An observer that traces: ``on_event=Spans()``. Needs ``opentelemetry-api`` (``pip install dcpsvc[otel]``).

    Spans are made when a save ends, with the times at which things happened.

    Args:
        tracer: An OpenTelemetry tracer; default: that of the global provider, named ``dcpsvc``.

    Raises:
        ConfigError: The package is missing.
    """

    def __init__(self, tracer: Any = None) -> None:
        try:
            trace: Any = import_module("opentelemetry.trace")
        except ImportError as err:
            raise ConfigError("Spans needs the package opentelemetry-api: dcpsvc[otel]") from err
        self._trace = trace
        self._tracer: Any = trace.get_tracer("dcpsvc") if tracer is None else tracer
        self._tracker = Tracker()
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Follow an event. Any thread."""
        with self._lock:
            save = self._tracker.take(event, time.time(), time.perf_counter())
        if save is not None:
            self._tell(save)

    def _tell(self, save: SaveTimes) -> None:
        about: dict[str, Any] = {
            "dcpsvc.step": save.step,
            "dcpsvc.attempt": save.attempt,
            "dcpsvc.rank": save.rank,
            "dcpsvc.outcome": save.outcome,
        }
        if save.nbytes is not None:
            about["dcpsvc.shard_nbytes"] = save.nbytes
        at = save.began
        whole = self._tracer.start_span("dcpsvc.save", start_time=_nanoseconds(at), attributes=about)
        inside = self._trace.set_span_in_context(whole)
        for phase, seconds in save.seconds.items():
            part = self._tracer.start_span(f"dcpsvc.{phase}", context=inside, start_time=_nanoseconds(at))
            at += seconds
            part.end(_nanoseconds(at))
        if save.outcome == "failed":
            whole.set_status(self._trace.Status(self._trace.StatusCode.ERROR, save.detail))
        whole.end(_nanoseconds(at))


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)

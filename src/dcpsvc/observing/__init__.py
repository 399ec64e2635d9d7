"""Observers for ``on_event``: a log per run, Prometheus metrics, OpenTelemetry spans. Needs no torch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.events import Event


class Observers:
    """Several observers as one: ``on_event=Observers(RunLog("runs/exp42"), PrometheusMetrics(port=9400))``.

    One that raises is logged and keeps nothing from the others.
    """

    def __init__(self, *observers: Callable[[Event], None]) -> None:
        self._observers = observers

    def flush(self) -> None:
        """Have those that keep something for later bring it where it belongs."""
        for observer in self._observers:
            flush(observer)

    def __call__(self, event: Event) -> None:
        """Tell all of them."""
        for observer in self._observers:
            try:
                observer(event)
            except Exception:  # a stranger's code; the others still want to hear
                logging.getLogger("dcpsvc").exception("an observer raised at %s", event.name)


def flush(observer: object) -> None:
    """Have an observer bring what it keeps for later where it belongs, if it is one that does. Never raises."""
    work = getattr(observer, "flush", None)
    if callable(work):
        try:
            work()
        except Exception:  # a stranger's code; the next save wants its uploader
            logging.getLogger("dcpsvc").exception("an observer raised at its flush")

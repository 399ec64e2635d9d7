"""Watching for divergence beside a training: tags what is saved, and asks all ranks to stop. Rank 0 decides."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dcpsvc.commits import DIVERGED
from dcpsvc.divergence import Detector

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dcpsvc.annotating import Annotator
    from dcpsvc.divergence import Divergence
    from dcpsvc.ranks.job import Job

logger = logging.getLogger("dcpsvc")


class Guard:
    """One job's detector. Training thread.

    Args:
        policy: None: nothing is watched.
        job: The ranks.
        annotator: Tags checkpoints that are there already.
        ask_to_stop: Has all ranks stop.
    """

    def __init__(
        self, policy: Divergence | None, job: Job, annotator: Annotator, ask_to_stop: Callable[[str], None]
    ) -> None:
        self._detector = Detector(policy) if policy is not None and job.coordinates else None
        self._annotator, self._ask_to_stop = annotator, ask_to_stop
        self._has_warned = False

    def watch(self, step: int, metrics: Mapping[str, float] | None) -> Mapping[str, float]:
        """Look at a step's metrics; gives what belongs into a manifest of this step."""
        metrics = metrics or {}
        detector = self._detector
        if detector is None:
            return metrics
        value = self._number(metrics.get(detector.policy.metric))
        if value is not None and detector.observe(step, value):
            self._begun(step, detector)
        tag = {DIVERGED: 1.0} if detector.why else {}
        return {**metrics, **tag, **detector.state()}

    def resumed(self, metrics: Mapping[str, float]) -> None:
        """Go on as it was when a checkpoint was saved.

        Args:
            metrics: Of its manifest.
        """
        if self._detector is not None:
            self._detector.restore(metrics)

    def _begun(self, step: int, detector: Detector) -> None:
        since = step if detector.since is None else detector.since
        tainted = sorted(one for one in self._annotator.steps() if since <= one < step)
        logger.warning(
            "step %s: diverged: %s; saves from step %s on are tagged, and no resume takes them unless asked to%s", step,
            detector.why, since, "; all ranks are asked to stop" if detector.policy.stop else "",
        )  # fmt: skip
        for one in tainted:
            self._annotator.record(one, {DIVERGED: 1.0})
        if detector.policy.stop:
            self._ask_to_stop(f"divergence at step {step}: {detector.why}")

    def _number(self, value: object) -> float | None:
        """What is no number says nothing; it is warned of once."""
        if value is None:
            return None
        try:
            return float(value)  # type: ignore[arg-type]
        except Exception:  # noqa: BLE001 - a metric never costs a step, whatever it is
            if not self._has_warned:
                self._has_warned = True
                logger.warning("divergence is not noticed: the metric is no number but %s", type(value).__name__)
            return None

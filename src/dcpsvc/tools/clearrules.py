"""What ``dcpsvc gc`` may remove. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcpsvc.errors import ConfigError
from dcpsvc.policies import Best, check_keeps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dcpsvc.format.keys import Attempt
    from dcpsvc.policies import Keep


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What may go.

    Attributes:
        keep: None: what the newest start of the job has recorded.
        steps: Go, whatever the policy says.
        attempt: Of that step, where only one attempt goes.
        older_than_s: Age in seconds from which things go that somebody may still be about to use: attempts without a
            manifest (a copy under way, an upload that a start on their nodes would finish), layouts, probes.
        damaged: Damaged checkpoints go too.
        force_last: So may the last checkpoint.
        typed: A person has typed ``keep``: a metric that no checkpoint has is a slip of the pen then.
        waiting: Attempts that a start on this node would finish: they stay.
    """

    keep: Keep | None = None
    steps: tuple[int, ...] = ()
    attempt: str | None = None
    older_than_s: float = 86400.0
    typed: bool = False
    damaged: bool = False
    force_last: bool = False
    waiting: frozenset[Attempt] = frozenset()

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keeps(self.keep)
        if self.older_than_s < 0:
            raise ConfigError(f"older_than_s={self.older_than_s!r} must be at least 0")

    def check_metrics(self, metrics: Sequence[Mapping[str, float]]) -> None:
        """Refuse to rank by a metric that nobody has recorded: the recorded policy's best would go without a word.

        Args:
            metrics: Those of each checkpoint.

        Raises:
            ConfigError: None has it.
        """
        known = {name for one in metrics for name in one}
        for rule in self.keep.parts() if self.keep is not None and self.typed and metrics else ():
            if isinstance(rule, Best) and rule.metric not in known:
                have = f"they have {', '.join(sorted(known))}" if known else "they have no metrics at all"
                raise ConfigError(f"{rule}: no checkpoint has {rule.metric!r}; {have}; nothing was deleted")

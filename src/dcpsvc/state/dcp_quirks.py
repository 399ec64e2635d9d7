"""What torch.distributed.checkpoint does to its callers, undone in one place."""

from __future__ import annotations

import warnings


def cause(error: BaseException) -> BaseException:
    """What really happened inside DCP, which wraps it in a BaseException of its own."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        inner = next(iter(failures.values()))
        return inner[0] if isinstance(inner, tuple) else inner
    return error


def quiet() -> None:
    """Silence DCP's warning that it runs without collectives: that is on purpose."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

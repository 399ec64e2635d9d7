"""What torch.distributed.checkpoint does to its callers, undone in one place."""

from __future__ import annotations

import warnings

from torch.distributed.checkpoint.api import CheckpointException


def cause(error: BaseException) -> BaseException:
    """What really happened inside DCP, which wraps it in a BaseException of its own."""
    if not isinstance(error, CheckpointException):
        return error
    exception, _ = next(iter(error.failures.values()))
    return exception


def quiet() -> None:
    """Silence DCP's warning that it runs without collectives: that is on purpose."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

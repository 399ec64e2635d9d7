"""Taking a run root over as a job does, for a command that changes it: no job may be alive, and later ones see it."""

from __future__ import annotations

import os
import secrets
import socket
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from dcpsvc import fence
from dcpsvc.errors import FormatError, RunBusyError, StoreNotFoundError
from dcpsvc.format import epochs, keys
from dcpsvc.format.epochs import Claim
from dcpsvc.format.keys import Epoch
from dcpsvc.stages import discover
from dcpsvc.tools import live

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dcpsvc.format.keys import Attempt
    from dcpsvc.storage.base import Store


def check_idle(store: Store, run_id: str, *, take_over: bool) -> None:
    """Whoever claims a run root ends the job that owns it: that must be meant.

    Args:
        store: The run root.
        run_id: Of the run.
        take_over: Also if the last job ran on another host, where nobody can see from here whether it lives.

    Raises:
        RunBusyError: A job of the run lives, or may live.
    """
    if here := live.ranks(run_id):
        raise RunBusyError(store.url, f"process {here[0].pid} of a live job writes this run: dcpsvc stop {store.url}")
    newest = newest_claim(store)
    if take_over or newest is None:
        return
    try:
        said = epochs.load_claim(newest.claim, store.get(newest.claim, max_nbytes=epochs.MAX_CLAIM_NBYTES))
    except (FormatError, StoreNotFoundError):
        return  # nobody can say who it was
    if said.host != socket.gethostname():
        raise RunBusyError(store.url, f"{said} may be alive; if it has ended: --take-over")


def newest_claim(store: Store) -> Epoch | None:
    """Who owns a run root; None if nobody ever claimed it. One LIST."""
    named = (keys.epoch_of(entry.key) for entry in store.list(keys.EPOCHS))
    return max((epoch[0] for epoch in named if epoch and not epoch[1]), default=None)


def claim(store: Store, more: Iterable[Attempt] = (), token: str = "") -> Epoch:
    """Own the run root: what counts now goes on counting, and nothing else that older jobs write will.

    Args:
        store: The run root.
        more: Attempts that count from now on, too.
        token: Names the claim, 8 hexadecimal digits; empty: a random one.

    Raises:
        RunBusyError: A job claims it at this moment.
        StoreError: It cannot be written.
    """
    epoch = fence.claim(store, make_claim(token or secrets.token_hex(4))).epoch
    fence.inherit(store, epoch, {*discover.committed(store), *more})
    return epoch


def make_claim(token: str) -> Callable[[int], Claim]:
    """Makes claims of this process, with a number."""
    return lambda number: Claim(
        epoch=Epoch(number, token), host=socket.gethostname(), pid=os.getpid(), created=utc_now()
    )


def utc_now() -> str:
    """As manifests write it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

"""Another try for what may pass: a store around a store."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import tenacity

from dcpsvc.errors import StoreError, StoreUnavailableError
from dcpsvc.storage.base import (
    SigningStore,
    carry,
    copies,
    create_fleeting,
    delete_fleeting,
    read_into,
    read_rest,
    stream,
    stream_into,
    written_s,
)
from dcpsvc.storage.cargo import Cargo
from dcpsvc.storage.conflict import holds
from dcpsvc.storage.paging import list_page
from dcpsvc.storage.patience import Patience, log_retry
from dcpsvc.storage.placed import is_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from dcpsvc.storage.base import Credentials, Entry, Store
    from dcpsvc.storage.cargo import Carried
    from dcpsvc.storage.paging import Page

T = TypeVar("T")
_FIRST_WAIT_S = 0.5
_ENDLESS = 10**9


class Retry:
    """Calls again what fails with an error that is :attr:`transient <dcpsvc.errors.StoreError.transient>`.

    Waits grow exponentially with full jitter, so that many ranks turned away together do not come back together.

    Args:
        tries: At most so many calls for one operation.
        deadline_s: No new try begins later than this after the first one failed. The first try is not counted: the
            upload of a large shard may rightly take longer.
        wait_max_s: Longest pause between two tries.
        stop: Once set, no further try begins, and a pause ends at once; the last error is raised.
        clock: Seconds that only grow.
        pause: Waits so many seconds and says whether to stop; by default waits for ``stop``.
    """

    def __init__(
        self,
        *,
        tries: int = 5,
        deadline_s: float = 60.0,
        wait_max_s: float = 10.0,
        stop: threading.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], bool] | None = None,
    ) -> None:
        self._tries, self._deadline_s = tries, deadline_s
        self._stop = stop or threading.Event()
        self._clock, self._pause = clock, pause or self._stop.wait
        self._wait = tenacity.wait_random_exponential(multiplier=_FIRST_WAIT_S, max=wait_max_s)

    def run(self, call: Callable[[], T]) -> T:
        """What ``call`` gives in the end; its last error if there is no end, and how long it was tried."""
        try:  # by far the most calls succeed, and many of them cost less than making ready for another try
            return call()
        except StoreError as err:
            if not err.transient:
                raise
            first = [err]

        def once_more() -> T:
            if first:
                raise first.pop()
            return call()

        return self._patiently(once_more)

    def _patiently(self, call: Callable[[], T]) -> T:
        patience = Patience(self._clock, self._tries, self._deadline_s, self._stop)

        def pause(seconds: float) -> None:
            # Raising here is the only way to make no further try: tenacity tries once more after every pause.
            if self._pause(seconds) and patience.last:
                raise patience.last

        try:
            return tenacity.Retrying(
                retry=tenacity.retry_if_exception(patience.forgives),
                stop=patience.is_over,
                wait=self._wait,
                sleep=pause,
                before_sleep=log_retry,
                reraise=True,
            )(call)
        except StoreError as err:
            if self._stop.is_set() or (told := patience.told(err)) is err:
                raise
            raise told from err


class RetryingStore:
    """A store that tries again. What the inner store can do beyond the contract, this one can too.

    Reading the bytes of a large object is bounded by time only: a job that resumes has nothing else, and a server that
    is started again takes longer than a few tries.

    Args:
        store: Does the work.
        how: See :class:`Retry`.
    """

    def __init__(self, store: Store, **how: Any) -> None:
        patient: dict[str, Any] = {"tries": _ENDLESS, **how}
        self._store, self._retry, self._reading = store, Retry(**how), Retry(**patient)

    def __repr__(self) -> str:
        return f"RetryingStore({self._store!r})"

    @property
    def url(self) -> str:
        """The inner store's."""
        return self._store.url

    @property
    def atomic_create(self) -> bool:
        """The inner store's."""
        return self._store.atomic_create

    @property
    def cached(self) -> bool:
        """The inner store's, if it has such a thing."""
        return bool(getattr(self._store, "cached", False))

    @property
    def page_cache(self) -> str:
        """Likewise; empty if it has none."""
        return str(getattr(self._store, "page_cache", ""))

    @property
    def distant(self) -> bool:
        """Likewise."""
        return bool(getattr(self._store, "distant", False))

    @property
    def copies(self) -> bool:
        """Likewise."""
        return copies(self._store)

    def create(self, key: str, data: bytes) -> bool:
        """See :meth:`Store.create <dcpsvc.storage.base.Store.create>`.

        After a try whose answer was lost, an object that holds exactly ``data`` counts as created by this call.
        """
        unsure = False

        def attempt() -> bool:
            nonlocal unsure
            try:
                return self._store.create(key, data) or (unsure and holds(self._store, key, data))
            except StoreUnavailableError:
                unsure = True
                raise

        return self._retry.run(attempt)

    def put(self, key: str, data: bytes) -> None:
        """See :meth:`Store.put <dcpsvc.storage.base.Store.put>`."""
        self._retry.run(lambda: self._store.put(key, data))

    def put_file(self, key: str, path: Path, *, progress: Callable[[int], None] | None = None) -> None:
        """See :meth:`Store.put_file <dcpsvc.storage.base.Store.put_file>`; no byte is reported twice."""
        self.carry(key, Cargo(path=path, progress=progress))

    def carry(self, key: str, cargo: Cargo) -> Carried:
        """See :meth:`ProvingStore.carry <dcpsvc.storage.base.ProvingStore.carry>`."""
        reported = _Reported(cargo.progress)
        return self._retry.run(lambda: carry(self._store, key, replace(cargo, progress=reported.attempt())))

    def get(self, key: str, *, max_nbytes: int) -> bytes:
        """See :meth:`Store.get <dcpsvc.storage.base.Store.get>`."""
        return self._retry.run(lambda: self._store.get(key, max_nbytes=max_nbytes))

    def read(self, key: str, begin: int, end: int) -> bytes:
        """See :meth:`Store.read <dcpsvc.storage.base.Store.read>`."""
        return self._retry.run(lambda: self._store.read(key, begin, end))

    def read_into(self, key: str, begin: int, views: Sequence[memoryview]) -> None:
        """See :meth:`ScatteringStore.read_into <dcpsvc.storage.base.ScatteringStore.read_into>`."""
        self._reading.run(lambda: read_into(self._store, key, begin, views))

    def stream(self, key: str, begin: int, end: int, look: Callable[[Iterator[memoryview]], T]) -> T:
        """See :class:`StreamingStore <dcpsvc.storage.base.StreamingStore>`; after a failure ``look`` sees all anew."""
        return self._reading.run(lambda: stream(self._store, key, begin, end, look))

    def stream_into(
        self,
        key: str,
        begin: int,
        views: Sequence[memoryview],
        look: Callable[[Iterator[memoryview]], T],
        *,
        once: bool = False,
    ) -> T:
        """Likewise."""
        return self._reading.run(lambda: stream_into(self._store, key, begin, views, look, once=once))

    def read_rest(self, key: str, begin: int, *, max_nbytes: int) -> tuple[int, bytes]:
        """See :class:`RestReadingStore <dcpsvc.storage.base.RestReadingStore>`."""
        return self._reading.run(lambda: read_rest(self._store, key, begin, max_nbytes=max_nbytes))

    def list(self, prefix: str) -> list[Entry]:
        """See :meth:`Store.list <dcpsvc.storage.base.Store.list>`."""
        return self._retry.run(lambda: self._store.list(prefix))

    def list_page(self, prefix: str, after: str) -> Page:
        """See :meth:`PagingStore.list_page <dcpsvc.storage.paging.PagingStore.list_page>`."""
        return self._retry.run(lambda: list_page(self._store, prefix, after))

    def size(self, key: str) -> int:
        """See :meth:`Store.size <dcpsvc.storage.base.Store.size>`."""
        return self._retry.run(lambda: self._store.size(key))

    def delete(self, key: str) -> None:
        """See :meth:`Store.delete <dcpsvc.storage.base.Store.delete>`."""
        self._retry.run(lambda: self._store.delete(key))

    def create_fleeting(self, key: str, data: bytes) -> bool:
        """See :meth:`FleetingStore.create_fleeting <dcpsvc.storage.base.FleetingStore.create_fleeting>`."""
        return self._retry.run(lambda: create_fleeting(self._store, key, data))

    def delete_fleeting(self, key: str) -> None:
        """See :meth:`FleetingStore.delete_fleeting <dcpsvc.storage.base.FleetingStore.delete_fleeting>`."""
        self._retry.run(lambda: delete_fleeting(self._store, key))

    def is_file(self) -> bool:
        """See :class:`PlacedStore <dcpsvc.storage.placed.PlacedStore>`; False if it is no such store."""
        return self._retry.run(lambda: is_file(self._store))

    def credentials(self) -> Credentials | None:
        """See :meth:`SigningStore.credentials <dcpsvc.storage.base.SigningStore.credentials>`; None if it has none."""
        return self._store.credentials() if isinstance(self._store, SigningStore) else None

    def written_s(self, key: str) -> float | None:
        """See :meth:`DatingStore.written_s <dcpsvc.storage.base.DatingStore.written_s>`; None if it cannot tell."""
        return self._retry.run(lambda: written_s(self._store, key))

    def remove_unfinished(self, before: str | float, *, dry_run: bool = False) -> int:
        """See :meth:`Store.remove_unfinished <dcpsvc.storage.base.Store.remove_unfinished>`."""
        return self._retry.run(lambda: self._store.remove_unfinished(before, dry_run=dry_run))


class _Reported:
    """The progress of several tries as one: only what goes beyond the best try so far."""

    def __init__(self, progress: Callable[[int], None] | None) -> None:
        self._progress, self._best, self._lock = progress, 0, threading.Lock()

    def attempt(self) -> Callable[[int], None] | None:
        """The progress callback for one try."""
        progress = self._progress
        if progress is None:
            return None
        sent = 0

        def more(nbytes: int) -> None:
            nonlocal sent
            with self._lock:
                sent += nbytes
                news = sent - self._best
                self._best = max(sent, self._best)
            if news > 0:
                progress(news)

        return more

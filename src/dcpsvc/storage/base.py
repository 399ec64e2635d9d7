"""The Store contract: what every durable place offers, and what both sides may rely on.

A store holds immutable objects under run-relative keys (``data/step-.../rank-00003.safetensors``).
Callers never write one key twice; stores never show half an object. Every method is blocking, may be
called from any thread, and raises only :class:`~dcpsvc.errors.StoreError` and its children.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar, runtime_checkable

from dcpsvc.errors import StoreNotFoundError
from dcpsvc.storage.cargo import Carried

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from dcpsvc.storage.cargo import Cargo
T = TypeVar("T")

STREAM_NBYTES = 1 << 20


class Entry(NamedTuple):
    """One object as a listing shows it."""

    key: str
    nbytes: int


class Credentials(NamedTuple):
    """How a client of a store proves who it is, as far as it says.

    Attributes:
        kind: Where they come from, such as ``env`` or ``iam-role``.
        ends_s: When they end, in seconds since 1970; None if they do not, or do not say.
        renewed: The client gets new ones by itself.
        temporary: They end some time.
    """

    kind: str
    ends_s: float | None
    renewed: bool
    temporary: bool


class ReadableStore(Protocol):
    """What whoever only reads needs of a store."""

    @property
    def url(self) -> str:
        """Where this is, for people; never holds credentials."""
        ...

    def read(self, key: str, begin: int, end: int) -> bytes:
        """Read bytes ``[begin, end)``; an object shorter than ``end`` is a StoreError, never a short answer."""
        ...

    def size(self, key: str) -> int:
        """Bytes of an object; StoreNotFoundError where there is none."""
        ...


class Store(ReadableStore, Protocol):
    """A durable place for one run root."""

    @property
    def atomic_create(self) -> bool:
        """Whether :meth:`create` lets exactly one of several racing writers win."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write ``data`` if no object has that key; say whether this call did.

        For small objects. Where an answer can be lost, an object that already holds exactly ``data`` counts as
        created by this call, so give each attempt bytes of its own. Durable when it returns True. Where
        :attr:`atomic_create` is False two racing callers may both
        be told True; the protocol must be right without it and uses it as a fence where it works.
        """
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write a small object, durable when this returns. All or nothing."""
        ...

    def put_file(self, key: str, path: Path, *, progress: Callable[[int], None] | None = None) -> None:
        """Carry a finished local file to ``key``, durable when this returns. All or nothing.

        Args:
            key: Where to.
            path: A file that nobody changes meanwhile.
            progress: Called with the number of bytes just sent, from any thread.
        """
        ...

    def get(self, key: str, *, max_nbytes: int) -> bytes:
        """Read a whole small object. One larger than ``max_nbytes`` is refused before it is read."""
        ...

    def list(self, prefix: str) -> list[Entry]:
        """All objects whose key starts with ``prefix`` (a folder: ``"manifests/"``; ``""`` is all), sorted by key.

        A failure raises. It is never an empty list. A prefix nobody has written is an empty list.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove an object, durably; no error where there is none."""
        ...

    def remove_unfinished(self, before: str | float, *, dry_run: bool = False) -> int:
        """Remove what writers that were killed left invisible; says how many such things there were.

        The store's own clock counts. Whoever still writes such a thing gets an error.

        Args:
            before: Only what is older than the object of this key, or than this time, in seconds since 1970.
            dry_run: Only count.
        """
        ...


@runtime_checkable
class ProvingStore(Protocol):
    """A store whose server may compare checksums of its own with those that came with the bytes."""

    def carry(self, key: str, cargo: Cargo) -> Carried:
        """Like :meth:`Store.put_file`, and says how it got there and whether that is proven."""
        ...


@runtime_checkable
class SigningStore(Protocol):
    """A store whose requests are signed."""

    def credentials(self) -> Credentials | None:
        """What with; None if it does not say. Asks nobody but the client."""
        ...


@runtime_checkable
class DatingStore(Protocol):
    """A store that knows when an object was written."""

    def written_s(self, key: str) -> float | None:
        """Seconds since 1970, by the store's clock; None if it cannot tell. StoreNotFoundError where there is none."""
        ...


@runtime_checkable
class FleetingStore(Protocol):
    """A store that need not wait for its disk where nothing is lost if the machine crashes."""

    def create_fleeting(self, key: str, data: bytes) -> bool:
        """Like :meth:`Store.create`, and gone, perhaps, after a crash of the machine."""
        ...

    def delete_fleeting(self, key: str) -> None:
        """Like :meth:`Store.delete`, and there again, perhaps, after a crash of the machine."""
        ...


@runtime_checkable
class ScatteringStore(Protocol):
    """A store that reads straight into memory of the caller."""

    def read_into(self, key: str, begin: int, views: Sequence[memoryview]) -> None:
        """Fill ``views``, one after the other, with the bytes from ``begin`` on; see :meth:`Store.read`."""
        ...


@runtime_checkable
class StreamingStore(Protocol):
    """A store whose bytes can be looked at as they come, while they are in the processor's cache."""

    def stream(self, key: str, begin: int, end: int, look: Callable[[Iterator[memoryview]], T]) -> T:
        """What ``look`` says about bytes ``[begin, end)``; each view is void when the next one is asked for."""
        ...

    def stream_into(
        self,
        key: str,
        begin: int,
        views: Sequence[memoryview],
        look: Callable[[Iterator[memoryview]], T],
        *,
        once: bool = False,
    ) -> T:
        """Fill ``views`` as :meth:`ScatteringStore.read_into` does; what ``look`` says about the same bytes.

        Args:
            key: Of the object.
            begin: Its first byte that is wanted.
            views: Where to; filled when ``look`` has seen everything.
            look: As for :meth:`stream`.
            once: Nobody on this machine is going to read these bytes again soon.
        """
        ...


def stream_into(
    store: ReadableStore,
    key: str,
    begin: int,
    views: Sequence[memoryview],
    look: Callable[[Iterator[memoryview]], T],
    *,
    once: bool = False,
) -> T:
    """See :class:`StreamingStore`; on a store that cannot, when all is there."""
    if isinstance(store, StreamingStore):
        return store.stream_into(key, begin, views, look, once=once)
    read_into(store, key, begin, views)
    return look(iter(views))


def stream(store: ReadableStore, key: str, begin: int, end: int, look: Callable[[Iterator[memoryview]], T]) -> T:
    """See :class:`StreamingStore`; on a store that cannot, piece by piece."""
    if isinstance(store, StreamingStore):
        return store.stream(key, begin, end, look)
    steps = range(begin, end, STREAM_NBYTES)
    return look(memoryview(store.read(key, at, min(at + STREAM_NBYTES, end))) for at in steps)


@runtime_checkable
class RestReadingStore(Protocol):
    """A store that needs one request for what :meth:`Store.size` and :meth:`Store.read` need two."""

    def read_rest(self, key: str, begin: int, *, max_nbytes: int) -> tuple[int, bytes]:
        """The size of an object, and its bytes from ``begin`` to its end; no bytes if they are more than max_nbytes."""
        ...


def read_rest(store: ReadableStore, key: str, begin: int, *, max_nbytes: int) -> tuple[int, bytes]:
    """See :class:`RestReadingStore`; on a store that cannot, in two requests."""
    if isinstance(store, RestReadingStore):
        return store.read_rest(key, begin, max_nbytes=max_nbytes)
    nbytes = store.size(key)
    return nbytes, store.read(key, begin, nbytes) if 0 < nbytes - begin <= max_nbytes else b""


def carry(store: Store, key: str, cargo: Cargo) -> Carried:
    """See :class:`ProvingStore`; on a store that proves nothing, :meth:`Store.put_file`."""
    if isinstance(store, ProvingStore):
        return store.carry(key, cargo)
    store.put_file(key, cargo.path, progress=cargo.progress)
    return Carried(proven=False)


def is_there(store: Store, key: str) -> bool:
    """Whether an object has that key; raises where the store cannot say."""
    try:
        store.size(key)
    except StoreNotFoundError:
        return False
    return True


def copies(store: Store) -> bool:
    """Whether :class:`~dcpsvc.storage.cargo.Earlier` objects are of any use to it."""
    return bool(getattr(store, "copies", False))


def read_into(store: ReadableStore, key: str, begin: int, views: Sequence[memoryview]) -> None:
    """See :class:`ScatteringStore`; on a store that cannot, by a copy."""
    if isinstance(store, ScatteringStore):
        store.read_into(key, begin, views)
        return
    data = memoryview(store.read(key, begin, begin + sum(map(len, views))))
    for view in views:
        view[:] = data[: len(view)]
        data = data[len(view) :]


def create_fleeting(store: Store, key: str, data: bytes) -> bool:
    """See :class:`FleetingStore`; on a store that makes no difference, :meth:`Store.create`."""
    return store.create_fleeting(key, data) if isinstance(store, FleetingStore) else store.create(key, data)


def delete_fleeting(store: Store, key: str) -> None:
    """See :class:`FleetingStore`; on a store that makes no difference, :meth:`Store.delete`."""
    if isinstance(store, FleetingStore):
        store.delete_fleeting(key)
    else:
        store.delete(key)


def written_s(store: Store, key: str) -> float | None:
    """See :class:`DatingStore`; None on a store that cannot tell."""
    return store.written_s(key) if isinstance(store, DatingStore) else None

"""Our own connection to the job: a key-value store over c10d, and a gloo group nobody else talks on."""

from __future__ import annotations

import contextlib
import threading
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from dcpsvc import deadline
from dcpsvc.ranks.line import Exchange, own
from dcpsvc.ranks.messages import LostPeerError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

_FEW = 16
"""One rank in that many may have so much more to say than the rest that it is told by itself."""


class C10dStore:
    """A c10d store as :class:`~dcpsvc.ranks.rendezvous.KeyValue`, in which no call hangs: see :class:`Exchange`.

    Works on connections of its own where the store can be cloned, so that our polling never stands in the way
    of the training's. Every call raises RuntimeError when the store does not answer within ``timeout_s``.
    """

    def __init__(self, store: Store, timeout_s: float) -> None:
        self._exchange = Exchange(PrefixStore("dcpsvc", store), timeout_s)

    @classmethod
    def of_default_group(cls, timeout_s: float) -> C10dStore:
        """The store behind ``init_process_group``.

        Raises:
            RuntimeError: It cannot be reached within ``timeout_s``.
        """
        return cls(_default_store(), timeout_s)

    def set(self, key: str, value: str) -> None:
        """Write a key."""
        self._exchange.call(partial(_write, key, value), f"set {key}")

    def get(self, key: str) -> str | None:
        """Read a key without waiting for it to be written."""
        data = self._exchange.call(partial(_read, key), f"get {key}")
        return None if data is None else data.decode()

    def compare_set(self, key: str, desired: str) -> str:
        """Write a key nobody has written; say what stands there now."""
        return self._exchange.call(lambda store: store.compare_set(key, "", desired), f"compare_set {key}").decode()

    def delete(self, key: str) -> None:
        """Forget a key, where the store can."""
        with contextlib.suppress(RuntimeError, NotImplementedError):  # a PrefixStore over a store without deletion
            self._exchange.call(lambda store: store.delete_key(key), f"delete {key}")

    def close(self) -> None:
        """Hang up; further calls raise RuntimeError. Waits for nobody."""
        self._exchange.close()


def _write(key: str, value: str, store: Store) -> None:
    """``TCPStore`` only sends a ``set``: the answer to the ``check`` behind it says that it has arrived."""
    store.set(key, value)
    store.check([key])


def _read(key: str, store: Store) -> bytes | None:
    """``check`` first, because ``get`` waits for the key."""
    return store.get(key) if store.check([key]) else None


def _default_store() -> Store:
    return dist.distributed_c10d._get_default_store()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - no public way


class SoloStore:
    """The key-value store of a job with one process."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._lock = threading.Lock()

    def set(self, key: str, value: str) -> None:
        """Write a key."""
        with self._lock:
            self._values[key] = value

    def get(self, key: str) -> str | None:
        """Read a key."""
        with self._lock:
            return self._values.get(key)

    def compare_set(self, key: str, desired: str) -> str:
        """Write a key nobody has written; say what stands there now."""
        with self._lock:
            return self._values.setdefault(key, desired)

    def delete(self, key: str) -> None:
        """Forget a key."""
        with self._lock:
            self._values.pop(key, None)

    def close(self) -> None:
        """Nothing to end."""


def group_for_dcp(timeout_s: float) -> dist.ProcessGroup | None:
    """The group to name to ``async_save``, which only asks that it has a CPU backend and communicates on none.

    None stands for the default group, where that has one. Collective otherwise; call it where all ranks arrived.

    Raises:
        LostPeerError: Not all ranks could be connected in time.
    """
    if not dist.is_initialized() or "cpu" in dist.get_backend_config():
        return None
    make = partial(dist.new_group, backend="gloo", timeout=timedelta(seconds=timeout_s))
    group = _in_time(make, timeout_s)
    return group if isinstance(group, dist.ProcessGroup) else None


class Group:
    """A gloo group of all ranks, for one thread of ours. Made without a collective on any other group.

    A group in which an operation timed out is poisoned; :meth:`renew` makes the next generation.
    """

    def __init__(self, *, rank: int, world_size: int, namespace: str, timeout_s: float) -> None:
        self._rank, self._world_size, self._namespace = rank, world_size, namespace
        self._timeout_s = timeout_s
        self._group: dist.ProcessGroup | None = None
        self.generation = -1
        self.poisoned = False

    def renew(self, generation: int) -> None:
        """Be in the given generation; every rank calls it, after a meeting in which all arrived.

        Raises:
            LostPeerError: Not all ranks could be connected in time.
        """
        if not dist.is_initialized() or (generation == self.generation and not self.poisoned):
            return
        self.generation, self.poisoned = generation, True  # until it stands: a failure here asks for the next one
        self._group = _in_time(partial(self._connected, generation), self._timeout_s)
        self.poisoned = False

    def _connected(self, generation: int) -> dist.ProcessGroup:
        """A new group, over a connection of its own: gloo waits for peers inside the store's client."""
        parent = own(_default_store(), self._timeout_s)
        store = PrefixStore(f"dcpsvc/{self._namespace}/group-{generation}", parent)
        group = dist.ProcessGroup(store, self._rank, self._world_size)
        group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)  # noqa: SLF001 - as new_group does it
        timeout = timedelta(seconds=self._timeout_s)
        backend = dist.ProcessGroupGloo(store, self._rank, self._world_size, timeout)
        backend._set_sequence_number_for_group()  # noqa: SLF001
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)  # noqa: SLF001
        return group

    def all_gather(self, data: bytes) -> list[bytes]:
        """What every rank gave, in rank order. Bytes, never pickled objects.

        Raises:
            LostPeerError: A peer did not answer in time; the group is poisoned from then on.
        """
        if self._group is None:
            if self._world_size > 1:
                raise LostPeerError("the group is closed")
            return [data]
        try:
            return self._all_gather(self._group, data)
        except RuntimeError as err:
            self.poisoned = True
            raise LostPeerError(str(err)) from None

    def _all_gather(self, group: dist.ProcessGroup, data: bytes) -> list[bytes]:
        """All at once, padded to one length; then, one after the other, the few that have more to say than the rest."""
        sizes = [int(size) for size in self._gather(group, torch.tensor([len(data)], dtype=torch.int64))]
        usual = sorted(sizes)[-1 - len(sizes) // _FEW]
        parts = self._gather(group, _tensor(data, usual))
        said = [_bytes(part)[: min(size, usual)] for part, size in zip(parts, sizes, strict=True)]
        for rank, size in enumerate(sizes):
            if size > usual:
                rest = _tensor(data[usual:], size - usual)
                group.broadcast(rest, rank).wait()
                said[rank] += _bytes(rest)
        return said

    def broadcast(self, data: torch.Tensor) -> torch.Tensor:
        """What rank 0 gave: a new tensor, but on rank 0. All give tensors of one size and dtype.

        Raises:
            LostPeerError: A peer did not answer in time; the group is poisoned from then on.
        """
        if self._group is None:
            if self._world_size > 1:
                raise LostPeerError("the group is closed")
            return data
        given = data if self._rank == 0 else torch.empty_like(data)
        try:
            self._group.broadcast(given, 0).wait()
        except RuntimeError as err:
            self.poisoned = True
            raise LostPeerError(str(err)) from None
        return given

    def _gather(self, group: dist.ProcessGroup, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        outputs = [torch.empty_like(tensor) for _ in range(self._world_size)]
        group.allgather([outputs], [tensor]).wait()
        return outputs

    def close(self) -> None:
        """Leave; peers are not waited for."""
        self._group = None


def _tensor(data: bytes, length: int) -> torch.Tensor:
    """The first bytes, or as many with zeros behind them."""
    return torch.frombuffer(bytearray(data[:length].ljust(max(length, 1), b"\0")), dtype=torch.uint8)


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.numpy())


def _in_time(connect: Callable[[], T], timeout_s: float) -> T:
    """Gloo takes five times its timeout to give up on an address that does not answer, and for ever on the store."""
    try:
        return deadline.call(connect, timeout_s, "connecting a gloo group of all ranks")
    except TimeoutError as err:
        raise LostPeerError(str(err)) from None

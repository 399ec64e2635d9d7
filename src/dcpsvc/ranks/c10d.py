"""Our own connection to the job: a key-value store over c10d, and a gloo group nobody else talks on."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

if TYPE_CHECKING:
    from collections.abc import Sequence


class C10dStore:
    """A c10d store as :class:`~dcpsvc.ranks.rendezvous.KeyValue`.

    Works on a clone of the job's store where it can be cloned, so that our polling never stands in the way
    of the training's own connection.
    """

    def __init__(self, store: Store) -> None:
        self._store = PrefixStore("dcpsvc", store)

    @classmethod
    def of_default_group(cls) -> C10dStore:
        """The store behind ``init_process_group``."""
        store = dist.distributed_c10d._get_default_store()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - no public way
        try:
            return cls(store.clone())  # type: ignore[attr-defined]
        except (AttributeError, RuntimeError, NotImplementedError):  # HashStore and custom stores
            return cls(store)

    def set(self, key: str, value: str) -> None:
        """Write a key."""
        self._store.set(key, value)

    def get(self, key: str) -> str | None:
        """Read a key without waiting for it: ``check`` first, because ``get`` blocks."""
        if not self._store.check([key]):
            return None
        return self._store.get(key).decode()

    def compare_set(self, key: str, desired: str) -> str:
        """Write a key nobody has written; say what stands there now."""
        return self._store.compare_set(key, "", desired).decode()

    def delete(self, key: str) -> None:
        """Forget a key, where the store can."""
        try:
            self._store.delete_key(key)
        except (RuntimeError, NotImplementedError):  # a PrefixStore over a store without deletion
            return


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


def group_for_dcp(timeout_s: float) -> dist.ProcessGroup | None:
    """The group to name to ``async_save``, which only asks that it has a CPU backend and communicates on none.

    None stands for the default group, where that has one. Collective otherwise; call it where all ranks arrived.
    """
    if not dist.is_initialized() or "cpu" in dist.get_backend_config():
        return None
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return group if isinstance(group, dist.ProcessGroup) else None


class Group:
    """A gloo group of all ranks, for one thread of ours. Made without a collective on any other group.

    A group in which an operation timed out is poisoned; :meth:`renew` makes the next generation.
    """

    def __init__(self, *, rank: int, world_size: int, namespace: str, timeout_s: float) -> None:
        self._rank, self._world_size, self._namespace = rank, world_size, namespace
        self._timeout = timedelta(seconds=timeout_s)
        self._group: dist.ProcessGroup | None = None
        self.generation = -1
        self.poisoned = False

    def renew(self, generation: int) -> None:
        """Be in the given generation; every rank calls it, after a meeting in which all arrived."""
        if not dist.is_initialized() or (generation == self.generation and not self.poisoned):
            return
        self.generation, self.poisoned = generation, True  # until it stands: a failure here asks for the next one
        parent = dist.distributed_c10d._get_default_store()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - no public way
        store = PrefixStore(f"dcpsvc/{self._namespace}/group-{generation}", parent)
        group = dist.ProcessGroup(store, self._rank, self._world_size)
        group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)  # noqa: SLF001 - as new_group does it
        backend = dist.ProcessGroupGloo(store, self._rank, self._world_size, self._timeout)
        backend._set_sequence_number_for_group()  # noqa: SLF001
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)  # noqa: SLF001
        self._group, self.poisoned = group, False

    def all_gather(self, data: bytes) -> list[bytes]:
        """What every rank gave, in rank order. Bytes, never pickled objects.

        Raises:
            RuntimeError: A peer did not answer in time; the group is poisoned from then on.
        """
        if self._group is None:
            if self._world_size > 1:
                raise RuntimeError("the group is closed")
            return [data]
        try:
            sizes = self._gather(self._group, torch.tensor([len(data)], dtype=torch.int64))
            longest = max(int(size) for size in sizes)
            padded = torch.zeros(max(longest, 1), dtype=torch.uint8)
            if data:
                padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            parts = self._gather(self._group, padded)
        except RuntimeError:
            self.poisoned = True
            raise
        return [bytes(part[: int(size)].numpy()) for part, size in zip(parts, sizes, strict=True)]

    def _gather(self, group: dist.ProcessGroup, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        outputs = [torch.empty_like(tensor) for _ in range(self._world_size)]
        group.allgather([outputs], [tensor]).wait()
        return outputs

    def close(self) -> None:
        """Leave; peers are not waited for."""
        self._group = None

"""What FullyShardedDataParallel (FSDP1) leaves on this rank, without a word to the others.

torch's own state dicts of FSDP1 gather each parameter over the training group, on the training thread: a rank that
does not come would hang the others there. So its flat parameters are read where they lie, one by one. Everything here
that is private to torch is in this module, and is looked for before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel

from dcpsvc.errors import UnsupportedStateError
from dcpsvc.state.ragged import Holders, Ragged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

_NEEDED = (
    "_fqns",
    "_shapes",
    "_contiguities",
    "_param_extensions",
    "_param_infos",
    "_shared_param_infos",
    "_shard_param_infos",
    "_params",
)


class Member(NamedTuple):
    """A parameter of the model, and what the optimizer has in its place.

    Attributes:
        name: In the model, without what wrappers put into it.
        ragged: What of it is here.
        given: The original parameter, or the flat one (``use_orig_params=False``).
        at: Where in ``given``, flat, it begins.
    """

    name: str
    ragged: Ragged
    given: torch.Tensor
    at: int


class Sharded:
    """The parameters that FSDP1 manages in a module.

    Args:
        component: What the state calls the module, for errors.
        module: May have none.
        fqn: Gives a name without what wrappers put into it.

    Raises:
        UnsupportedStateError: This torch keeps them in another way, or they are tensor-parallel too.
    """

    def __init__(self, component: str, module: nn.Module, fqn: Callable[[str], str]) -> None:
        self._fqn = fqn
        self._units = {
            path: child
            for path, child in module.named_modules()
            if isinstance(child, FullyShardedDataParallel) and _handle(child) is not None
        }
        self._known: tuple[tuple[int, ...], list[Member], dict[str, str]] = ((), [], {})
        for path, unit in self._units.items():
            _check(f"{component}.{fqn(f'{path}.')}".rstrip("."), _handle(unit))

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._units)

    @property
    def members(self) -> list[Member]:
        """Every parameter; the same objects as long as FSDP1 keeps them where they are."""
        return self._current()[1]

    @property
    def aliases(self) -> dict[str, str]:
        """Further names of tied parameters."""
        return self._current()[2]

    def reshard(self) -> None:
        """Have the next forward pass gather anew: what is left of the last one will be out of date. No collective."""
        for unit in self._units.values():
            handle = _handle(unit)
            if handle.uses_sharded_strategy and hasattr(handle.flat_param, "_full_param_padded"):
                handle.reshard(free_unsharded_flat_param=True)
                handle.post_reshard()

    def _current(self) -> tuple[tuple[int, ...], list[Member], dict[str, str]]:
        places = tuple(_local(_handle(unit).flat_param).data_ptr() for unit in self._units.values())
        if self._known[0] != places or not self._known[1]:
            members = [member for path, unit in self._units.items() for member in self._of(path, unit)]
            aliases = {a: b for path, unit in self._units.items() for a, b in self._tied(path, unit)}
            self._known = (places, members, aliases)
        return self._known

    def _of(self, path: str, unit: FullyShardedDataParallel) -> Iterator[Member]:
        flat, holders = _handle(unit).flat_param, _holders(unit)
        local = _local(flat).detach().view(-1)
        for number, (name, shape, info) in enumerate(
            zip(flat._fqns, flat._shapes, flat._shard_param_infos, strict=True)  # noqa: SLF001 - see the module
        ):
            at, numel = (info.offset_in_shard, info.numel_in_shard) if info.in_shard else (0, 0)
            origin = flat if flat._params is None else flat._params[number]  # noqa: SLF001
            ragged = Ragged(local[at : at + numel], shape, info.intra_param_start_idx or 0, origin, holders)
            yield Member(self._named(path, name), ragged, origin, at if origin is flat else 0)

    def _tied(self, path: str, unit: FullyShardedDataParallel) -> Iterator[tuple[str, str]]:
        flat = _handle(unit).flat_param
        named = zip(flat._param_infos, flat._fqns, strict=True)  # noqa: SLF001
        first = {(info.param_name, id(info.module)): name for info, name in named}
        for info in flat._shared_param_infos:  # noqa: SLF001
            name = f"{info.module_name}.{info.param_name}" if info.module_name else info.param_name
            prime = first[info.prim_param_name, id(info.prim_module)]
            yield self._named(path, name), self._named(path, prime)

    def _named(self, path: str, name: str) -> str:
        return self._fqn(f"{path}.{name}" if path else name)


def is_flat(parameter: torch.Tensor) -> bool:
    """Whether it is FSDP1's own, of which the model's are parts."""
    return bool(getattr(parameter, "_is_flat_param", False))


def _handle(unit: FullyShardedDataParallel) -> Any:
    return cast("Any", unit)._handle  # noqa: SLF001 - see the module


def _local(flat: Any) -> torch.Tensor:
    """What this rank holds; there is no such attribute before the first forward pass, when nothing is gathered."""
    found: torch.Tensor = getattr(flat, "_local_shard", flat)
    return found


def _holders(unit: Any) -> Holders:
    """Who shards with whom, and who has the same shard: all, where nothing is sharded."""
    group = _ranks(unit.process_group)
    alike = (dist.get_rank(),) if _handle(unit).uses_sharded_strategy else group
    if (across := getattr(unit, "_inter_node_pg", None)) is not None:
        return Holders(tuple(sorted({*alike, *_ranks(across)})))
    return Holders(alike, group)


def _ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(sorted(dist.get_process_group_ranks(group)))


def _check(where: str, handle: Any) -> None:
    flat = handle.flat_param
    if lacking := [name for name in _NEEDED if not hasattr(flat, name)]:
        reason = f"torch {torch.__version__} keeps FSDP1's parameters in a way unknown here (no {lacking[0]})"
        raise UnsupportedStateError(where, f"{reason}; use fully_shard (FSDP2)")
    if any(extension is not None for extension in flat._param_extensions):  # noqa: SLF001
        raise UnsupportedStateError(where, "FSDP1 around tensor parallelism is not supported; use fully_shard (FSDP2)")
    if not all(flat._contiguities):  # noqa: SLF001
        raise UnsupportedStateError(where, "FSDP1 has flattened a parameter that is not contiguous; make it so before")

"""Restore: verified bytes of a checkpoint into whatever boxes this rank needs, on any world size.

Nothing in the model is touched until everything has been read and proven.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import torch

from dcpsvc.format.shardfile import INNER
from dcpsvc.progress import unseen
from dcpsvc.reader import fill, plan, prove, read_again
from dcpsvc.state.saved import Want, copy_into, own_name
from dcpsvc.storage.aside import Aside
from dcpsvc.storage.fetch import FILES_AT_ONCE
from dcpsvc.storage.scatter import Needs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from dcpsvc.progress import Watch
    from dcpsvc.reader import CheckpointReader
    from dcpsvc.state.saved import Component, Saved
    from dcpsvc.state.sharing import Resize
    from dcpsvc.storage.aside import Blocks
    from dcpsvc.storage.scatter import Range


FEW_NBYTES = 64 << 20
"""So much may wait in memory without a word."""

Bring = Callable[[dict[int, Needs]], None]


class Ready(NamedTuple):
    """Everything that is wanted, proven.

    Attributes:
        wants: Filled when :func:`finish` is done; until then those that are memory of the state are as they were.
        again: What of each shard it reads once more, into memory of the state.
        held: What waits in memory of its own instead, by key.
        why: Why it does not wait on this node's disk; empty where it is not much.
    """

    wants: list[Want]
    again: Mapping[int, Needs] = {}
    held: Mapping[str, torch.Tensor] = {}
    why: str = ""

    @property
    def held_nbytes(self) -> int:
        """How much memory that takes."""
        return sum(waiting.nbytes for waiting in self.held.values())

    @property
    def pending(self) -> list[Want]:
        """Those that go to memory of the state, and wait in none."""
        return [want for want in self.wants if want.live and want.key not in self.held]


def prepare(
    reader: CheckpointReader,
    wants: Sequence[Want],
    folder: Path | None = None,
    watch: Watch = unseen,
    bring: Bring | None = None,
) -> Ready:
    """Read everything that is wanted and prove it, changing nothing of the state. Any world size.

    What goes to memory of the state itself is read once more by :func:`finish`: where it is, if that is cheap, else
    from this node's disk. So there is no second copy of it in memory, unless there is no room on that disk.

    Args:
        reader: Of the checkpoint.
        wants: What.
        folder: On a disk of this node; None: there is none.
        watch: How far it is.
        bring: Fills what is needed; called once, and first. Without it no collective is entered.

    Raises:
        CorruptShardError: A needed block is missing or not what was written; names the file.
        StoreError: The store did not answer.
    """
    alone = functools.partial(fill, reader, watch=watch)
    ready = Ready(list(wants))
    ready = ready._replace(again=plan(reader, ready.pending))
    dear = reader.dear(ready.again)
    rest = plan(reader, [want for want in wants if not want.live])
    ready = _brought(reader, ready, dear, folder, lambda needs: (bring or alone)(_joined(rest, needs)))
    near = {rank: needed for rank, needed in ready.again.items() if rank not in dear}
    prove(reader, near, watch)
    if late := reader.dear(near):  # a file near by was damaged, and what replaces it is far
        ready = _brought(reader, ready, late, folder, alone)
    return ready


def finish(reader: CheckpointReader, ready: Ready) -> None:
    """What :func:`prepare` has proven, into the memory of the state. Same errors; the state may be changed then."""
    read_again(reader, ready.again)
    with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="dcpsvc-copy") as pool:
        held = [(want.out, ready.held[want.key]) for want in ready.wants if want.key in ready.held]
        list(pool.map(lambda pair: copy_into(*pair), held))


def _brought(reader: CheckpointReader, ready: Ready, dear: Collection[int], folder: Path | None, bring: Bring) -> Ready:
    """What is dear to read again is somewhere near."""
    blocks, why = _room({rank: ready.again[rank].runs() for rank in sorted(dear)}, folder)
    if dear and not blocks:
        waiting = [_waiting(want) for want in ready.pending if reader.needs(want, dear)]
        bring(plan(reader, waiting))
        ready = ready._replace(held={**ready.held, **{want.key: want.out for want in waiting}}, why=ready.why or why)
        return ready._replace(again=plan(reader, ready.pending))
    bring({rank: Needs(found.sinks(), ready.again[rank].body_nbytes) for rank, found in blocks.items()})
    for rank, found in blocks.items():
        reader.shards[rank].prefer(found)
    return ready


def _room(runs: Mapping[int, Sequence[Range]], folder: Path | None) -> tuple[dict[int, Blocks], str]:
    """Room on the disk for what is much; else nothing, and why."""
    if sum(high - low for each in runs.values() for low, high in each) <= FEW_NBYTES:
        return {}, ""
    if folder is None:
        return {}, "there is no local tier"
    try:
        aside = Aside(folder)
        return {rank: aside.reserve(each) for rank, each in runs.items()}, ""
    except OSError as err:
        return {}, f"{folder}: {err.strerror}"


def _waiting(want: Want) -> Want:
    """The same, into memory of its own."""
    return Want(want.key, want.offsets, torch.empty(want.out.shape, dtype=want.out.dtype, device="cpu"))


def _joined(one: Mapping[int, Needs], other: Mapping[int, Needs]) -> dict[int, Needs]:
    """Both, so that a block that both need is read once."""
    found = {**one, **other}
    for rank in one.keys() & other.keys():
        found[rank] = Needs([*one[rank].sinks(), *other[rank].sinks()], one[rank].body_nbytes)
    return found


def summary(saved: Saved, loaded: Mapping[str, Component], skipped: Sequence[str]) -> str:
    """One line on what was taken over, what was not, and what became of per-rank values."""
    parts = [f"loaded: {', '.join(loaded)}"]
    if skipped:
        parts.append(f"skipped: {', '.join(skipped)}")
    names = {name.split("@", 1)[0].split(".", 1)[0] for name in saved.documents} - {INNER}
    if left := sorted(names - {saved.saved_name(name) for name in loaded} - set(skipped)):
        parts.append(f"in the checkpoint but not in the state: {', '.join(left)}")
    if told := saved.drift.summary():
        parts.append(told)
    own = [name for name in loaded if own_name(saved.saved_name(name), saved.source_rank) in saved.documents]
    if saved.resized and own:
        resized = "; ".join(_resized(saved, {name: getattr(loaded[name], "resize", None) for name in own}))
        parts.append(f"{saved.world_size} -> {saved.ranks} ranks: {resized}")
    return "; ".join(parts)


def _resized(saved: Saved, policies: Mapping[str, Resize | None]) -> Iterator[str]:
    """What became of the values of each rank."""
    reseeded = [name for name, policy in policies.items() if policy == "reseed"]
    computed = [name for name, policy in policies.items() if callable(policy)]
    if len(reseeded) + len(computed) < len(policies):
        grown = "ranks beyond the saved ones start from rank % saved, their generators reseeded"
        yield grown if saved.ranks > saved.world_size else "values of ranks that are gone are left out"
    if reseeded:
        yield f"{', '.join(reseeded)}: as here, reseeded"
    if computed:
        yield f"{', '.join(computed)}: by its own function"

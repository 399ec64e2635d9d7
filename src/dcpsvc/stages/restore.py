"""Restore: verified bytes of a checkpoint into whatever boxes this rank needs, on any world size.

Nothing in the model is touched until everything has been read and proven.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from dcpsvc.progress import unseen
from dcpsvc.reader import plan, prove, read, read_again
from dcpsvc.state.saved import Want, own_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dcpsvc.progress import Watch
    from dcpsvc.reader import CheckpointReader
    from dcpsvc.state.saved import Component, Saved
    from dcpsvc.state.sharing import Resize
    from dcpsvc.storage.scatter import Needs


class Ready(NamedTuple):
    """Everything that is wanted, proven.

    Attributes:
        wants: As they are now.
        again: What of each shard :func:`finish` reads once more, into memory of the state itself.
    """

    wants: list[Want]
    again: Mapping[int, Needs] = {}


def prepare(reader: CheckpointReader, wants: Sequence[Want], watch: Watch = unseen) -> Ready:
    """Read everything that is wanted and prove it, changing nothing of the state. Any world size; no collective.

    What goes to memory of the state itself is read once more by :func:`finish`, if that is cheap: so there is no second
    copy of it in memory. Elsewhere it waits in memory of its own.

    Raises:
        CorruptShardError: A needed block is missing or not what was written; names the file.
        StoreError: The store did not answer.
    """
    wants = _staged_where_dear(reader, wants)
    again = plan(reader, _live(wants))
    prove(reader, again, watch)
    if reader.dear(_live(wants)):  # a file near by was damaged, and what replaces it is far
        wants = _staged_where_dear(reader, wants)
        again = plan(reader, _live(wants))
    read(reader, [want for want in wants if not want.live], watch)
    return Ready(list(wants), again)


def staged(wants: Sequence[Want]) -> list[Want]:
    """The same, none of them into memory of the state itself."""
    return [
        Want(want.key, want.offsets, torch.empty(want.out.shape, dtype=want.out.dtype, device="cpu"))
        if want.live
        else want
        for want in wants
    ]


def finish(reader: CheckpointReader, ready: Ready) -> None:
    """What :func:`prepare` has proven, into the memory of the state. Same errors; the state may be changed then."""
    read_again(reader, ready.again)


def _live(wants: Sequence[Want]) -> list[Want]:
    return [want for want in wants if want.live]


def _staged_where_dear(reader: CheckpointReader, wants: Sequence[Want]) -> list[Want]:
    dear = {want.key for want in reader.dear(_live(wants))}
    return [staged([want])[0] if want.key in dear else want for want in wants]


def summary(saved: Saved, loaded: Mapping[str, Component], skipped: Sequence[str]) -> str:
    """One line on what was taken over, what was not, and what became of per-rank values."""
    parts = [f"loaded: {', '.join(loaded)}"]
    if skipped:
        parts.append(f"skipped: {', '.join(skipped)}")
    names = {name.split("@", 1)[0].split(".", 1)[0] for name in saved.documents}
    if left := sorted(names - set(loaded) - set(skipped)):
        parts.append(f"in the checkpoint but not in the state: {', '.join(left)}")
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

"""What one rank writes, as far as it stays the same while the structure of the state does: worked out once.

Structure is everything but values: names, dtypes, shapes, how tensors are sharded and shared, and who is who. What is
worked out for one structure is never used for another, nor by another Checkpointer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcpsvc.format import parts, peft, shardfile
from dcpsvc.format.digest import digest
from dcpsvc.outline import Large
from dcpsvc.state import claims, division
from dcpsvc.state.division import Structure
from dcpsvc.state.replicas import LARGE_NBYTES
from dcpsvc.state.saveplan import ShardPlan

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from dcpsvc.format.parts import Part
    from dcpsvc.format.shardfile import Piece
    from dcpsvc.state.collected import Collected


STRUCTURES = 2
"""Remembered at a time."""


class Blueprint:
    """One rank's part of one structure.

    Attributes:
        placement: Where each piece lies in the file.
        plan: What DCP is told.
        part: This rank's part of the layout, as the ranks exchange it.
        said: What this rank says of its tensors, for comparison.
        folder_nbytes: See :func:`folder_nbytes`.
    """

    def __init__(self, collected: Collected, rank: int, world_size: int, folder: str | None = None) -> None:
        self._structure, self._aliases = Structure(collected), dict(collected.aliases)
        shares = division.shares(collected, rank, world_size)
        self.said = claims.of_tensors(collected)
        self.placement = shardfile.place(share.piece for share in shares)
        self.plan = ShardPlan(self.placement)
        self.part = parts.part(self.placement, rank, collected.aliases)
        self.folder_nbytes = folder_nbytes(folder, collected, self.placement.pieces)
        by_name = {share.piece.name: share for share in shares}
        self._shares = [by_name[name] for name in self.placement.names]
        self._keys = [share.piece.key for share in self._shares]
        self._partial = [n for n, share in enumerate(self._shares) if not share.is_whole]
        self._large = [n for n, share in enumerate(self._shares) if share.piece.nbytes >= LARGE_NBYTES]

    def fits(self, collected: Collected) -> bool:
        """Whether the state still has this structure."""
        return self._aliases == collected.aliases and self._structure.is_of(collected)

    def sources(self, collected: Collected) -> list[torch.Tensor]:
        """The tensors, or views of them, in the order of the file."""
        items = collected.items
        found = [items[key].tensor for key in self._keys]
        for number in self._partial:
            found[number] = self._shares[number].source(found[number])
        return found

    def large(self, collected: Collected, *, guarded: bool) -> list[Large]:
        """Those that take their time to copy.

        Args:
            collected: The state as of now.
            guarded: Whether the optimizers wait for that.
        """
        items = [(n, collected.items[self._shares[n].piece.key]) for n in self._large]
        return [Large(n, item.origin, item.owner if guarded else None) for n, item in items]


class Blueprints:
    """The last few: a state that changes its structure now and again mostly has one that it had. One thread at a time.

    Args:
        rank: This one.
        world_size: Ranks in the job.
        folder: Of which module there is a folder of PEFT; None: of none.

    Attributes:
        made: How many there were.
    """

    def __init__(self, rank: int, world_size: int, folder: str | None = None) -> None:
        self._rank, self._world_size, self._folder = rank, world_size, folder
        self._recent: list[Blueprint] = []
        self.made = 0

    def of(self, collected: Collected) -> Blueprint:
        """The blueprint for this structure: one of the last, or a new one."""
        for number, known in enumerate(self._recent):
            if known.fits(collected):
                self._recent.insert(0, self._recent.pop(number))
                return known
        del self._recent[STRUCTURES - 1 :]  # first: it takes memory for nothing
        self._recent.insert(0, Blueprint(collected, self._rank, self._world_size, self._folder))
        self.made += 1
        return self._recent[0]


def folder_nbytes(component: str | None, collected: Collected, pieces: Iterable[Piece]) -> int:
    """What of one rank's shard becomes part of the folder of PEFT, if one is asked for."""
    if component is None:
        return 0
    about = peft.description(component, collected.documents | collected.own_documents, collected.rank)
    return peft.held_nbytes(component, about, pieces)


class Layouts:
    """What the ranks made together of the parts of each, for the last few structures. Uploader and training thread."""

    def __init__(self) -> None:
        self._of: dict[str, bytes] = {}

    def known(self, part: Part) -> str:
        """Digest of the layout made when this rank brought this very part; empty if there is none."""
        known = self._of.get(part.digest)
        return digest(known) if known else ""

    def of(self, part: Part) -> bytes:
        """The layout itself."""
        return self._of[part.digest]

    def add(self, part: Part, layout: bytes) -> None:
        """The newest: another one of this part is forgotten, or the oldest."""
        kept = [(name, known) for name, known in self._of.items() if name != part.digest]
        self._of = dict([*kept[1 - STRUCTURES :], (part.digest, layout)])

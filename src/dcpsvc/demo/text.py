"""The corpus every Python has, its own standard library, and a loader that can say where it is."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

CORPUS_BYTES = 4 << 20

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def read_corpus(limit_bytes: int = CORPUS_BYTES) -> npt.NDArray[np.uint8]:
    """The first ``limit_bytes`` of the standard library's sources, in path order: the same on every rank of a host."""
    library = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(library.rglob("*.py")):
        if _SKIPPED.isdisjoint(path.relative_to(library).parts):
            text += path.read_bytes()
        if len(text) >= limit_bytes:
            break
    return np.frombuffer(bytes(text[:limit_bytes]), dtype=np.uint8)


class TextLoader:
    """Shuffled windows of a corpus, each exactly once an epoch over all ranks together.

    The world reads one endless stream, epoch after epoch, each a permutation drawn from the seed and the epoch's
    number; a rank takes its slice of every global batch. So a few integers are the loader's whole state.
    """

    def __init__(
        self, corpus: npt.NDArray[np.uint8], batch: int, block: int, *, rank: int, world: int, seed: int
    ) -> None:
        """Take ``batch`` windows of ``block`` tokens at a time for this ``rank`` of ``world``."""
        self.windows = (len(corpus) - 1) // block
        if self.windows < 1:
            msg = f"a corpus of {len(corpus)} bytes has no window of {block} tokens"
            raise ValueError(msg)
        self._corpus, self._batch, self._block = corpus, batch, block
        self._rank, self._world, self._seed = rank, world, seed
        self._epoch = self._position = 0
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    def next_windows(self) -> list[int]:
        """This rank's next window numbers; advances the loader."""
        first = self._position + self._rank * self._batch
        windows = [self._window(first + i) for i in range(self._batch)]
        epochs, self._position = divmod(self._position + self._world * self._batch, self.windows)
        self._epoch += epochs
        return windows

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and their targets (the same text, one token later), each (batch, block) int64."""
        starts = (window * self._block for window in self.next_windows())
        rows = np.stack([self._corpus[start : start + self._block + 1] for start in starts])
        tokens = torch.from_numpy(rows.astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]

    def state_dict(self) -> dict[str, int]:
        """Where the loader is: JSON values only."""
        return {"epoch": self._epoch, "position": self._position, "seed": self._seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where ``state`` was taken, in its order of windows."""
        self._epoch, self._position, self._seed = state["epoch"], state["position"], state["seed"]
        self._orders.clear()

    def _window(self, index: int) -> int:
        """Window at ``index`` of the stream, counted from the start of the current epoch."""
        epochs, offset = divmod(index, self.windows)
        return int(self._order(self._epoch + epochs)[offset])

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e >= self._epoch}
            self._orders[epoch] = np.random.default_rng([self._seed, epoch]).permutation(self.windows)
        return self._orders[epoch]

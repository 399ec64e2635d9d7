"""The random number generators of one process: torch, CUDA, NumPy's global one, and Python's."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dcpsvc.state.sharing import checked_resize

if TYPE_CHECKING:
    from dcpsvc.state.sharing import Resize


class Rng:
    """Saves and restores every global generator of this process. Per rank by nature.

    A rank that did not exist when the checkpoint was written is reseeded from the step and its number.

    Args:
        resize: See :class:`~dcpsvc.PerRank`; ``"reseed"`` seeds all ranks so when their number has changed.
    """

    def __init__(self, resize: Resize = "by-rank") -> None:
        self.resize: Resize = checked_resize("Rng", resize)

    def state_dict(self) -> dict[str, Any]:
        """The generators' states as tensors and numbers."""
        kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - the global one
        version, words, pending = random.getstate()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            "numpy": [str(kind), np.asarray(keys).astype(np.int64), int(position), int(has_gauss), float(gauss)],
            "python": [version, np.array(words, dtype=np.int64), pending],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where the saved process was."""
        torch.set_rng_state(state["torch"])
        if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
            torch.cuda.set_rng_state_all(state["cuda"])
        kind, keys, position, has_gauss, gauss = state["numpy"]
        np.random.set_state((kind, keys.astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
        version, words, pending = state["python"]
        random.setstate((version, tuple(words.tolist()), pending))

    def reseed(self, step: int, rank: int) -> None:
        """Seed for a rank without a saved state: different for every rank and step, and repeatable."""
        seed = int.from_bytes(hashlib.sha256(f"dcpsvc {step} {rank}".encode()).digest()[:8], "big")
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)

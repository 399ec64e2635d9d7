"""The random number generators of one process: the global ones of torch, CUDA, NumPy and Python, and your own."""

from __future__ import annotations

import hashlib
import logging
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dcpsvc.errors import ConfigError
from dcpsvc.state.sharing import checked_resize

if TYPE_CHECKING:
    from dcpsvc.state.sharing import Resize

logger = logging.getLogger(__name__)

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
"""One of your own."""


class Rng:
    """Saves and restores every global generator of this process, and those it is given. Per rank by nature.

    A rank that did not exist when the checkpoint was written is reseeded from the step and its number.

    Args:
        resize: See :class:`~dcpsvc.PerRank`; ``"reseed"`` seeds all ranks so when their number has changed.
        **own: Generators of your own by name: ``Rng(shuffle=torch.Generator(), noise=np.random.default_rng())``.
            They are set in place, so whoever holds them draws on.

    Raises:
        ConfigError: Something else was given.
    """

    def __init__(self, resize: Resize = "by-rank", **own: Generator) -> None:
        self.resize: Resize = checked_resize("Rng", resize)
        self._own = own
        given: dict[str, object] = {**own}
        for name, generator in given.items():
            if not isinstance(generator, Generator):
                kinds = "a torch.Generator, numpy.random.Generator or RandomState, or random.Random"
                raise ConfigError(f"Rng({name}=...): {kinds} is expected, not {type(generator).__name__}")

    @property
    def kinds(self) -> dict[str, str]:
        """What your own are, by name: a state fits the same kind only."""
        return {name: _kind_of(generator) for name, generator in self._own.items()}

    def state_dict(self) -> dict[str, Any]:
        """The generators' states as tensors and numbers."""
        found: dict[str, Any] = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            "numpy": _of_numpy(np.random),
            "python": _of_python(random),
        }
        if self._own:
            found["own"] = {name: _state_of(generator) for name, generator in self._own.items()}
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where the saved process was."""
        torch.set_rng_state(state["torch"])
        _set_cuda(state["cuda"])
        _set_numpy(np.random, state["numpy"])
        _set_python(random, state["python"])
        for name, saved in state.get("own", {}).items():
            if name in self._own:  # else the resume has let it pass, or refused
                _set(self._own[name], saved["state"])

    def reseed(self, step: int, rank: int) -> None:
        """Seed for a rank without a saved state: different for every rank and step, and repeatable."""
        seed = int.from_bytes(hashlib.sha256(f"dcpsvc {step} {rank}".encode()).digest()[:8], "big")
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        for name, generator in self._own.items():
            _seed(generator, int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big"))


def _kind_of(generator: Any) -> str:
    match generator:
        case torch.Generator():
            return f"torch {generator.device.type}"
        case np.random.Generator():
            return type(generator.bit_generator).__name__
        case _:
            return type(generator).__name__


def _state_of(generator: Any) -> dict[str, Any]:
    match generator:
        case torch.Generator():
            state: Any = generator.get_state()
        case np.random.Generator():
            state = generator.bit_generator.state
        case np.random.RandomState():
            state = _of_numpy(generator)
        case _:
            state = _of_python(generator)
    return {"kind": _kind_of(generator), "state": state}


def _set(generator: Any, state: Any) -> None:
    match generator:
        case torch.Generator():
            generator.set_state(state)
        case np.random.Generator():
            generator.bit_generator.state = state
        case np.random.RandomState():
            _set_numpy(generator, state)
        case _:
            _set_python(generator, state)


def _seed(generator: Any, seed: int) -> None:
    match generator:
        case torch.Generator():
            generator.manual_seed(seed)
        case np.random.Generator():
            generator.bit_generator.state = type(generator.bit_generator)(seed).state
        case np.random.RandomState():
            generator.seed(seed % 2**32)
        case _:
            generator.seed(seed)


def _set_cuda(states: list[torch.Tensor]) -> None:
    if not states:
        return
    if (here := torch.cuda.device_count()) == len(states):
        torch.cuda.set_rng_state_all(states)
    else:
        logger.warning(
            "the generators of %s CUDA devices were saved, and there are %s here: theirs are left as they are",
            len(states),
            here,
        )


def _of_numpy(source: Any) -> list[Any]:
    kind, keys, position, has_gauss, gauss = source.get_state(legacy=True)
    return [str(kind), np.asarray(keys).astype(np.int64), int(position), int(has_gauss), float(gauss)]


def _set_numpy(target: Any, state: list[Any]) -> None:
    kind, keys, position, has_gauss, gauss = state
    target.set_state((kind, keys.astype(np.uint32), position, has_gauss, gauss))


def _of_python(source: Any) -> list[Any]:
    version, words, pending = source.getstate()
    return [version, np.array(words, dtype=np.int64), pending]


def _set_python(target: Any, state: list[Any]) -> None:
    version, words, pending = state
    target.setstate((version, tuple(words.tolist()), pending))

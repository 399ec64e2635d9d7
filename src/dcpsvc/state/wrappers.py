"""What stands around a model or a part of it, and leaves its mark on names: none of it is of the model."""

from __future__ import annotations

import re
from typing import cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_MARKS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
"""Nobody else uses these names."""
_INNER = "module."
"""Anybody may call a part so: of these types alone it is a mark."""
_TYPES = (DistributedDataParallel, DataParallel, AveragedModel)


def unwrap(module: nn.Module) -> nn.Module:
    """The user's model inside DDP, DataParallel and torch.compile. An AveragedModel has a buffer of its own."""
    while True:
        if isinstance(module, DistributedDataParallel | DataParallel):
            module = cast("nn.Module", module.module)
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


class Names:
    """Names in a module without what wrappers put into them.

    Args:
        module: Its wrappers are looked for now.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = module.named_modules(remove_duplicate=False)
        found = {_unmarked(f"{path}." if path else "") for path, child in modules if isinstance(child, _TYPES)}
        self._wrappers = sorted(found, key=len, reverse=True)  # the inner ones first

    def __call__(self, name: str) -> str:
        """The model's own name of a parameter or buffer, or of a part that ends with a dot."""
        name = _unmarked(name)
        for path in self._wrappers:
            if name.startswith(path + _INNER):
                name = path + name[len(path + _INNER) :]
        return name

    def of(self, path: str) -> str:
        """The model's own name of a part."""
        return self(f"{path}.").rstrip(".")


def _unmarked(name: str) -> str:
    return _MARKS.sub("", name)

"""Control of a live job from another shell: a Unix socket in every training process. Needs no torch.

The training side gives :class:`Control` its :class:`Commands`; the clients are ``dcpsvc status``, ``save``, ``stop``.
"""

from __future__ import annotations

from dcpsvc.control.request import Commands, Request
from dcpsvc.control.server import Control

__all__ = ["Commands", "Control", "Request"]

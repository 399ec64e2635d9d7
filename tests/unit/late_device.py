"""A device without the hardware: streams that do what they are given in order, late, and on threads of their own.

It keeps to what torch promises of streams and events, and copies real bytes; so a wrong order shows in them.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from dcpsvc.devicecopy import Devices

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

SECONDS = 30


class Mark:
    """An event."""

    def __init__(self) -> None:
        self._passed = threading.Event()

    def query(self) -> bool:
        return self._passed.is_set()

    def set(self) -> None:
        self._passed.set()

    def wait(self) -> None:
        assert self._passed.wait(SECONDS)


class LateStream:
    """Whoever gives it something goes on at once."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)

    def do(self, work: Callable[[], Any]) -> None:
        self._thread.submit(work)

    def record_event(self) -> Mark:
        mark = Mark()
        self.do(mark.set)
        return mark

    def wait_event(self, mark: Mark) -> None:
        self.do(mark.wait)

    def end(self) -> None:
        self._thread.shutdown()


class PromptStream(LateStream):
    """What it is given is done at once, as training on the host is: so to wait is to stand still."""

    def do(self, work: Callable[[], Any]) -> None:
        work()

    def record_event(self) -> Mark:
        mark = Mark()
        mark.set()
        return mark


class LateDevice:
    """Copies when it is let.

    Attributes:
        side: On which it copies.
        free: It may.
        at_most: How many copies it may begin before :attr:`rest` is set.
        rest: It may begin the others, too.
        order: What was done, in order.
        capturing: Of its current stream.
    """

    def __init__(self, current: LateStream | None = None) -> None:
        self.side, self._current = LateStream(), current or LateStream()
        self.free, self.order, self.capturing = threading.Event(), list[str](), False
        self.at_most, self.rest = 1 << 30, threading.Event()

    def current(self) -> LateStream:
        assert not self.capturing, "an event from outside would get into the graph"
        return self._current

    def is_capturing(self) -> bool:
        return self.capturing

    def copy(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        self.side.do(lambda: self._copy(targets, sources))

    def train(self, name: str, work: Callable[[], Any]) -> None:
        """Give the current stream something that changes tensors."""

        def act() -> None:
            self.order.append(name)
            work()

        self._current.do(act)

    def end(self) -> None:
        self.free.set()
        self.rest.set()
        self.side.end()
        self._current.end()

    def _copy(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        assert self.free.wait(SECONDS)
        if self.order.count("copy") >= self.at_most:
            assert self.rest.wait(SECONDS)
        self.order.append("copy")
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


class LateDevices(Devices):
    """All tensors of some sizes are on one device."""

    def __init__(self, device: LateDevice, holds: Callable[[torch.Tensor], bool] = lambda _: True) -> None:
        super().__init__()
        self._device, self._holds = device, holds

    def of(self, tensor: torch.Tensor) -> LateDevice | None:
        return self._device if self._holds(tensor) else None

"""Copying from accelerators: beside the training on a stream of its own, and without the host waiting for it.

All copies are enqueued when ``save()`` is called, behind what the current stream has been given by then. Before an
optimizer steps, the current stream is told to wait for those of its tensors; a thread waits for the others' sake, batch
by batch. Nothing is allocated on the device, and what is read is held until it has arrived.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dcpsvc import copying
from dcpsvc.errors import TornSnapshotError
from dcpsvc.state.replicas import UNHURRIED, await_event
from dcpsvc.witness import TORN, Extent, Watch, flat, is_plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dcpsvc.outline import Outline

ROWS_NBYTES = 16 << 20
"""What torch has to convert or gather on a device goes through so much of its memory at a time, or one row."""

# Private in name, and what torch's own optimizers and FSDP2 are made of.
_copy = torch._foreach_copy_  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


class Event(Protocol):
    """A place in a stream."""

    def query(self) -> bool:
        """Whether all before it is done."""
        ...


class Stream(Protocol):
    """What a device does one after the other: as much of ``torch.Stream`` as is needed."""

    def record_event(self) -> Any:
        """The :class:`Event` behind all that it was given so far."""
        ...

    def wait_event(self, event: Any) -> None:
        """What it is given from now on comes after the event. The host does not wait."""
        ...


class Device(Protocol):
    """An accelerator.

    Attributes:
        side: The stream on which is copied.
    """

    side: Stream

    def current(self) -> Stream:
        """The stream that training uses now, on this thread."""
        ...

    def is_capturing(self) -> bool:
        """Whether that stream is being captured: what it is given is not done now, and perhaps many times later."""
        ...

    def copy(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        """Enqueue a copy to the host on :attr:`side`; returns at once where the targets are pinned."""
        ...


class Accelerator:
    """One of torch's, whichever it is.

    Args:
        device: With its number.

    Attributes:
        side: See :class:`Device`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.side: Any = torch.Stream(device)

    def current(self) -> Any:
        """See :class:`Device`."""
        return torch.accelerator.current_stream(self._device)

    def is_capturing(self) -> bool:
        """See :class:`Device`."""
        asked = getattr(torch.get_device_module(self._device), "is_current_stream_capturing", None)
        return asked is not None and bool(asked())

    def copy(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        """See :class:`Device`."""
        with self.side, torch.no_grad():
            _copy(targets, sources, non_blocking=True)


class Devices:
    """The accelerators that tensors were found on, each with its stream. Training thread."""

    def __init__(self) -> None:
        self._known: dict[torch.device, Device | None] = {}

    def of(self, tensor: torch.Tensor) -> Device | None:
        """Where a tensor is; None: in the host's memory, or where torch has no streams."""
        if tensor.is_cpu:
            return None
        if tensor.device not in self._known:
            try:
                self._known[tensor.device] = Accelerator(tensor.device)
            except RuntimeError:  # copied by torch, while the host waits
                self._known[tensor.device] = None
        return self._known[tensor.device]


class Landing:
    """Some bytes on their way to the host: a :class:`~dcpsvc.copying.Task` that waits until they are there.

    Args:
        begin: Where in the file the first of them goes.
        changer: ``id`` of the optimizer that alone changes what is read; None: anybody may.
        extents: At most :data:`~dcpsvc.copying.BATCH_NBYTES`.
        watch: How closely. Short of every byte only torch's counters are looked at: the values are on the device.
        waits: Whether the host is to wait for it before ``save()`` returns.

    Attributes:
        begin: As above.
        changer: As above.
        owner: Whoever waits on the host.
    """

    def __init__(self, begin: int, changer: int | None, extents: list[Extent], watch: Watch, *, waits: bool) -> None:
        self.begin, self.changer = begin, changer
        self.owner = None if waits else UNHURRIED
        self._key, self._is_let_go = extents[0].key, False
        self._held = [(each, each.origin._version) for each in extents]  # noqa: SLF001 - torch's only counter
        closely = watch is Watch.EVERY_BYTE
        self._sums = torch.stack([_sum(each, each.source) for each in extents]) if closely else None
        self._event: Event | None = None

    @property
    def has_landed(self) -> bool:
        """Nothing is read or written any more."""
        return self._event is None or self._event.query()

    def enqueue(self, device: Device) -> None:
        """Begin to copy."""
        device.copy([each.target for each, _ in self._held], [each.source for each, _ in self._held])
        self._event = device.side.record_event()

    def let_go(self) -> Event | None:
        """Behind what may the tensors be changed; None if that was asked before.

        Raises:
            TornSnapshotError: They have been changed already.
        """
        if self._is_let_go:
            return None
        self._check_versions()
        self._is_let_go = True
        return self._event

    def run(self) -> None:
        """Wait until all is there. Any thread.

        Raises:
            TimeoutError: The device does not get there.
        """
        if self._event is not None:
            await_event(self._event)

    def check(self) -> None:
        """Raises TornSnapshotError if they were changed before they were let go; from now on they are not held."""
        try:
            self._check_versions()
        except TornSnapshotError:
            if not self._is_let_go:  # looked at afterwards: whoever lets go changes them after that
                raise
        if self._sums is not None:
            arrived = torch.stack([_sum(each, each.target) for each, _ in self._held])
            if not torch.equal(arrived, self._sums.to(arrived.device)):
                raise TornSnapshotError(self._key, TORN)
        self._held = []  # at once: another thread may be about to let them go

    def _check_versions(self) -> None:
        for each, version in self._held:
            if each.origin._version != version:  # noqa: SLF001
                raise TornSnapshotError(each.key, TORN)


class SideCopy:
    """What one save copies from one device: a :class:`~dcpsvc.copying.Beside`. Training thread.

    Args:
        device: Which.
        landings: All there are.

    Attributes:
        landings: What anybody may change comes first.
    """

    def __init__(self, device: Device, landings: Iterable[Landing]) -> None:
        self._device = device
        self.landings = sorted(landings, key=lambda each: each.changer is not None)

    @property
    def idle(self) -> bool:
        """Nothing is under way."""
        return all(each.has_landed for each in reversed(self.landings))

    def begin(self) -> None:
        """Enqueue everything, behind what training has given the device by now."""
        self._device.side.wait_event(self._device.current().record_event())
        for each in self.landings:
            each.enqueue(self._device)

    def order(self, owner: int | None) -> None:
        """Have the current stream wait before it changes what this optimizer owns, or what nobody does.

        Raises:
            TornSnapshotError: It was changed already.
        """
        if self._device.is_capturing():
            return  # nothing is changed now, and an event of before must not get into the graph
        events = [each.let_go() for each in self.landings if each.changer == owner]
        for event in [event for event in events if event is not None][-1:]:  # the others come before it
            self._device.current().wait_event(event)


def side_copies(
    outline: Outline, views: Sequence[torch.Tensor], devices: Devices, watch: Watch, *, waits: bool
) -> tuple[list[SideCopy], list[int]]:
    """Take out of an outline what lies on devices as it is to be in the file, if any large tensor does.

    Args:
        outline: Loses the large ones that are taken.
        views: Where each goes.
        devices: All there are.
        watch: How closely.
        waits: Whether the host is to wait before ``save()`` returns.

    Returns:
        A copy for each device, and the numbers of what is left.
    """
    everything = list(range(len(views)))
    if all(devices.of(outline.sources[large.number]) is None for large in outline.large):
        return [], everything
    large = {each.number: each for each in outline.large}
    found: dict[Device, list[tuple[int, int | None, Extent]]] = defaultdict(list)
    for number, (source, view) in enumerate(zip(outline.sources, views, strict=True)):
        device = devices.of(source)
        if device is not None and is_plain(source, view):
            owner, origin = (large[number].owner, large[number].origin) if number in large else (None, source)
            extent = Extent(outline.placement.names[number], origin, flat(source), flat(view))
            found[device].append((outline.placement.begins[number], owner, extent))
            everything[number] = -1
    left = [number for number in everything if number >= 0]
    outline.large = [each for each in outline.large if everything[each.number] >= 0]
    return [SideCopy(device, _landings(each, watch, waits=waits)) for device, each in found.items()], left


def _landings(extents: list[tuple[int, int | None, Extent]], watch: Watch, *, waits: bool) -> Iterable[Landing]:
    ordered = sorted(extents, key=lambda each: each[1] or 0)
    return (Landing(begin, owner, batch, watch, waits=waits) for begin, owner, batch in copying.grouped(ordered))


def copy_by_rows(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy what has to be converted or gathered on its device first, with little of its memory; waits for it."""
    if source.dim() == 0 or source.nbytes <= ROWS_NBYTES:
        target.copy_(source)
        return
    rows = max(1, ROWS_NBYTES * source.shape[0] // source.nbytes)
    for to, of in zip(target.split(rows), source.split(rows), strict=True):
        to.copy_(of)


def _sum(extent: Extent, part: torch.Tensor) -> torch.Tensor:
    """Of the bits, in words as long as they can be."""
    places = (extent.source.numel(), extent.source.storage_offset(), extent.target.storage_offset())
    words = (torch.int64, torch.int32, torch.int16, torch.uint8)
    word = next(each for each in words if not any(place % each.itemsize for place in places))
    return torch.hash_tensor(part.view(word))

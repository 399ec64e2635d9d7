"""A file on its way to a store, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Earlier(NamedTuple):
    """An object of the same store that holds bytes of a file already.

    Attributes:
        key: Its key.
        runs: Ranges ``[begin, end)`` that are the same in the file, at the same place; ascending, of whole MiB.
    """

    key: str
    runs: tuple[tuple[int, int], ...]


def unchecked(begin: int, view: memoryview) -> None:
    """Any bytes will do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cargo:
    """What to carry to a key.

    Attributes:
        path: A file that nobody changes meanwhile.
        check: Called with the offset and the bytes of each part before they are believed to be there, from any thread;
            raises if they are not what they should be. Parts begin at multiples of a MiB.
        image: The file's first bytes in memory, perhaps: what of it does not pass ``check`` is read from the file.
        progress: Called with the number of bytes that have just arrived, from any thread.
        earlier: The store may copy from it what is the same, instead of having it sent; the copy stands by itself.
        may_have_begun: An upload to this very key may have been cut short: what of it has arrived need not be sent.
    """

    path: Path
    check: Callable[[int, memoryview], None] = unchecked
    image: memoryview | None = None
    progress: Callable[[int], None] | None = None
    earlier: Earlier | None = None
    may_have_begun: bool = False


class Carried(NamedTuple):
    """How a file got to its key.

    Attributes:
        proven: The server has compared checksums of its own with those of the bytes that ``check`` has seen. If not,
            nothing is known: read it back.
        copied_nbytes: Not sent, but taken by the server from an earlier object.
        found_nbytes: Not sent, for they were there, from an upload that was cut short.
    """

    proven: bool
    copied_nbytes: int = 0
    found_nbytes: int = 0

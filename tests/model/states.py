"""How much was visited: distinct global states, counted by hash, in bounded memory."""

from __future__ import annotations

import xxhash

_MOST = 1 << 20


class Distinct:
    """Counts distinct hashes: exactly while they are few, then by a growing sample of them."""

    def __init__(self) -> None:
        self.mask = 0
        self.seen: set[int] = set()

    def add(self, code: int) -> None:
        """One more state."""
        if not code & self.mask:
            self.seen.add(code)
            if len(self.seen) > _MOST:
                self._thin(2 * self.mask + 1)

    def merge(self, other: Distinct) -> None:
        """What another process has visited."""
        self._thin(max(self.mask, other.mask))
        self.seen |= {code for code in other.seen if not code & self.mask}

    def count(self) -> int:
        """How many; an estimate once there are more than a million."""
        return len(self.seen) * (self.mask + 1)

    def _thin(self, mask: int) -> None:
        self.mask = mask
        self.seen = {code for code in self.seen if not code & mask}


_codes: dict[object, int] = {}


def code(part: object) -> int:
    """A hash that is the same in every process, of something small."""
    found = _codes.get(part)
    if found is None:
        if len(_codes) > _MOST:
            _codes.clear()
        found = _codes[part] = xxhash.xxh3_64_intdigest(repr(part).encode())
    return found


class GlobalState:
    """The abstract state of one history: where each process is, and what objects there are; without time and names."""

    def __init__(self, distinct: Distinct) -> None:
        self._distinct = distinct
        self._whole = 0
        self._parts: dict[object, int] = {}

    def put(self, place: object, value: object) -> None:
        """Something is now so."""
        part = (place, value)
        new = _codes.get(part) or code(part)
        parts = self._parts
        self._whole = whole = self._whole ^ parts.get(place, 0) ^ new
        parts[place] = new
        distinct = self._distinct
        if not whole & distinct.mask:
            distinct.add(whole)

    def drop(self, place: object) -> None:
        """Something is no more."""
        self._whole ^= self._parts.pop(place, 0)
        self._distinct.add(self._whole)

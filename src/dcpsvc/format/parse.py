"""Reading JSON that somebody else may have written: bounded, typed, and nothing is executed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcpsvc.errors import FormatError

T = TypeVar("T")

_COMPACT = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode
"""Made once: that takes longer than to write a small value."""


class Fields:
    """The fields of one JSON object; every access says the type it needs.

    Args:
        path: Where the object came from, for the error.
        values: The parsed JSON.
        error: What to raise for a field that is missing or of another type.
    """

    def __init__(self, path: str, values: Any, error: type[FormatError]) -> None:
        if not isinstance(values, dict):
            raise error(path, f"expected a JSON object, found {type(values).__name__}")
        self._path, self._values, self._error = path, values, error

    @classmethod
    def parse(cls, path: str, data: bytes, error: type[FormatError]) -> Fields:
        """Parse bytes; malformed text is ``error``."""
        try:
            return cls(path, json.loads(data), error)
        except (ValueError, RecursionError) as err:
            raise error(path, f"not JSON ({len(data)} bytes): {err}") from err

    def fail(self, reason: str) -> FormatError:
        """The error to raise for a value that has the right type and makes no sense."""
        return self._error(self._path, reason)

    def get(self, name: str, kind: type[T]) -> T:
        """The field ``name``, which must be exactly of ``kind`` (a bool is no int)."""
        if name not in self._values:
            raise self.fail(f"field {name!r} is missing")
        value = self._values[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.fail(f"field {name!r} must be {kind.__name__}, found {type(value).__name__}")
        return value

    def count(self, name: str, maximum: int) -> int:
        """A field that is an int in ``[0, maximum]``."""
        value = self.get(name, int)
        if not 0 <= value <= maximum:
            raise self.fail(f"field {name!r} is {value}, outside 0..{maximum}")
        return value

    def text(self, name: str, accept: Callable[[str], object]) -> str:
        """A string field that ``accept`` approves of."""
        value = self.get(name, str)
        if not accept(value):
            raise self.fail(f"field {name!r} is not acceptable: {value[:200]!r}")
        return value

    def child(self, name: str) -> Fields:
        """A field that is an object."""
        return Fields(self._path, self.get(name, dict), self._error)

    def child_or_null(self, name: str) -> Fields | None:
        """A field that is an object, or null."""
        return None if name in self._values and self._values[name] is None else self.child(name)

    def children(self, name: str) -> list[Fields]:
        """A field that is a list of objects."""
        items: list[Any] = self.get(name, list)
        return [Fields(self._path, item, self._error) for item in items]

    def items(self) -> list[tuple[str, Any]]:
        """Every field, unchecked."""
        return list(self._values.items())


def dump(value: Any) -> bytes:
    """JSON as people can read it, one line per top-level entry kept short by the caller."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def compact(value: Any) -> bytes:
    """JSON without spaces; equal values give equal bytes."""
    return _COMPACT(value).encode()

"""What every store says, in the same words, about byte ranges and sizes that do not fit."""

from __future__ import annotations

from dcpsvc.errors import StoreError, StoreObjectError


def check_range(where: str, begin: int, end: int) -> None:
    """Refuse a range that every library reads differently.

    Raises:
        StoreError: Not ``0 <= begin <= end``.
    """
    if not 0 <= begin <= end:
        raise StoreError("read", where, f"bytes [{begin}, {end}) are not a range")


def check_end(where: str, nbytes: int, end: int) -> None:
    """Refuse a range that goes past the end of an object.

    Raises:
        StoreObjectError: ``end`` is more than the object's ``nbytes``.
    """
    if end > nbytes:
        raise StoreObjectError("read", where, f"bytes up to {end} were asked for and the object has {nbytes}")


def check_limit(where: str, nbytes: int, max_nbytes: int) -> None:
    """Refuse an object that is larger than its reader is ready for.

    Raises:
        StoreObjectError: ``nbytes`` is more than ``max_nbytes``.
    """
    if nbytes > max_nbytes:
        raise StoreObjectError("get", where, f"the object has {nbytes} bytes and at most {max_nbytes} were expected")


def check_length(operation: str, where: str, nbytes: int, expected: int) -> None:
    """Refuse an answer that is shorter or longer than what was asked for.

    Raises:
        StoreError: It is.
    """
    if nbytes != expected:
        raise StoreError(operation, where, f"{nbytes} bytes went over where {expected} were expected")

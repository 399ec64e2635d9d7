"""Checksums that travel with the bytes, for the server to compare with its own."""

from __future__ import annotations

import base64
import hashlib
import zlib
from importlib import import_module, util
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from typing_extensions import Buffer


class BodySum(Protocol):
    """One kind of checksum."""

    field: str
    """Where answers have it, in botocore's words; empty: nowhere."""

    upload: Mapping[str, str]
    """What to say about it when a multipart upload begins, likewise."""

    def of(self, body: Buffer) -> str:
        """The checksum, as the server wants to hear it."""
        ...

    def parameters(self, value: str) -> dict[str, str]:
        """To send with a body, in botocore's words."""
        ...

    def headers(self, value: str) -> dict[str, str]:
        """The same, as HTTP headers."""
        ...

    def listed(self, value: str) -> dict[str, str]:
        """What the list of finished parts says about one."""
        ...

    def whole(self, parts: Sequence[tuple[str, int]]) -> Mapping[str, frozenset[str]]:
        """What the server may say about an object made of parts of such checksums and sizes."""
        ...


class Md5:
    """``Content-MD5``: checked by every server, and half a core for each 300 MiB/s."""

    field = ""
    upload: Mapping[str, str] = {}

    def of(self, body: Buffer) -> str:
        """See :class:`BodySum`."""
        return _text(hashlib.md5(body, usedforsecurity=False).digest())

    def parameters(self, value: str) -> dict[str, str]:
        """See :class:`BodySum`."""
        return {"ContentMD5": value}

    def headers(self, value: str) -> dict[str, str]:
        """See :class:`BodySum`."""
        return {"Content-MD5": value}

    def listed(self, value: str) -> dict[str, str]:
        """See :class:`BodySum`."""
        del value
        return {}

    def whole(self, parts: Sequence[tuple[str, int]]) -> Mapping[str, frozenset[str]]:
        """See :class:`BodySum`; an ETag is no checksum where the server encrypts."""
        del parts
        return {}


class Crc:
    """``x-amz-checksum-crc32`` and its kin: cheap here, where the server compares it (AWS, Ceph from 20 on).

    Args:
        name: As S3 calls it.
        crc: Of bytes, continued from that of the bytes before.
    """

    def __init__(self, name: str, crc: Callable[[Buffer, int], int]) -> None:
        self.field, self._name, self._crc = f"Checksum{name}", name, crc
        self.upload: Mapping[str, str] = {"ChecksumAlgorithm": name}
        self._shifts: dict[int, list[int]] = {}

    def of(self, body: Buffer) -> str:
        """See :class:`BodySum`."""
        return _text(self._crc(body, 0).to_bytes(4, "big"))

    def parameters(self, value: str) -> dict[str, str]:
        """See :class:`BodySum`."""
        return {**self.upload, **self.listed(value)}

    def headers(self, value: str) -> dict[str, str]:
        """See :class:`BodySum`."""
        return {f"x-amz-checksum-{self._name.lower()}": value, "x-amz-sdk-checksum-algorithm": self._name}

    def listed(self, value: str) -> dict[str, str]:
        """See :class:`BodySum`."""
        return {self.field: value}

    def whole(self, parts: Sequence[tuple[str, int]]) -> Mapping[str, frozenset[str]]:
        """See :class:`BodySum`: of all bytes, or of the checksums of the parts. Servers differ."""
        values = [base64.b64decode(value) for value, _ in parts]
        composite = f"{_text(self._crc(b''.join(values), 0).to_bytes(4, 'big'))}-{len(parts)}"
        total = 0
        for value, (_, nbytes) in zip(values, parts, strict=True):
            total = self._append(total, int.from_bytes(value, "big"), nbytes)
        return {self.field: frozenset({composite, _text(total.to_bytes(4, "big"))})}

    def _append(self, first: int, second: int, nbytes: int) -> int:
        """The checksum of two pieces from those of each, where the second has ``nbytes``."""
        if nbytes not in self._shifts:
            self._shifts[nbytes] = self._shift(nbytes)
        return _times(self._shifts[nbytes], first) ^ second

    def _shift(self, nbytes: int) -> list[int]:
        """What that many zeros do to a checksum: linear, so a matrix of bits, one number a column."""
        result = [1 << bit for bit in range(32)]
        power = [self._crc(b"\0", column) ^ self._crc(b"\0", 0) for column in result]
        while nbytes:
            if nbytes & 1:
                result = [_times(power, column) for column in result]
            power = [_times(power, column) for column in power]
            nbytes >>= 1
        return result


def _times(matrix: list[int], vector: int) -> int:
    total = 0
    for column in matrix:
        if vector & 1:
            total ^= column
        vector >>= 1
    return total


def crc32() -> Crc:
    """Of the standard library."""
    return Crc("CRC32", zlib.crc32)


def crc32c() -> Crc:
    """By an instruction of the processor; the package is an extra, and published without types."""
    module: Any = import_module("crc32c")
    return Crc("CRC32C", module.crc32c)


def candidates() -> list[BodySum]:
    """Kinds that can be computed here, cheapest first: for this machine, which trains, not for the server."""
    return [crc32c() if util.find_spec("crc32c") else crc32(), Md5()]


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()

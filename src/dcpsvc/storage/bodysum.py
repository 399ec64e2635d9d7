"""Checksums that travel with the bytes, for the server to compare with its own."""

from __future__ import annotations

import base64
import hashlib
from importlib import import_module, util
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Buffer


class BodySum(Protocol):
    """One kind of checksum."""

    upload: Mapping[str, str]
    """What to say about it when a multipart upload begins, in botocore's words."""

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


class Crc32c:
    """``x-amz-checksum-crc32c``: costs next to nothing, where the server compares it (AWS, Ceph from 20 on)."""

    upload: Mapping[str, str] = {"ChecksumAlgorithm": "CRC32C"}

    def __init__(self) -> None:
        # By name: it is an extra, and published without types.
        self._crc: Any = import_module("crc32c").crc32c
        self._shifts: dict[int, list[int]] = {}

    def of(self, body: Buffer) -> str:
        """See :class:`BodySum`."""
        return _text(int(self._crc(body)).to_bytes(4, "big"))

    def parameters(self, value: str) -> dict[str, str]:
        """See :class:`BodySum`."""
        return {**self.upload, **self.listed(value)}

    def headers(self, value: str) -> dict[str, str]:
        """See :class:`BodySum`."""
        return {"x-amz-checksum-crc32c": value, "x-amz-sdk-checksum-algorithm": "CRC32C"}

    def listed(self, value: str) -> dict[str, str]:
        """See :class:`BodySum`."""
        return {"ChecksumCRC32C": value}

    def whole(self, parts: Sequence[tuple[str, int]]) -> Mapping[str, frozenset[str]]:
        """See :class:`BodySum`: of all bytes, or of the checksums of the parts. Servers differ."""
        values = [base64.b64decode(value) for value, _ in parts]
        composite = f"{_text(int(self._crc(b''.join(values))).to_bytes(4, 'big'))}-{len(parts)}"
        total = 0
        for value, (_, nbytes) in zip(values, parts, strict=True):
            total = self._append(total, int.from_bytes(value, "big"), nbytes)
        return {"ChecksumCRC32C": frozenset({composite, _text(total.to_bytes(4, "big"))})}

    def _append(self, first: int, second: int, nbytes: int) -> int:
        """The checksum of two pieces from those of each, where the second has ``nbytes``."""
        if nbytes not in self._shifts:
            self._shifts[nbytes] = self._shift(nbytes)
        return _times(self._shifts[nbytes], first) ^ second

    def _shift(self, nbytes: int) -> list[int]:
        """What that many zeros do to a checksum: linear, so a matrix of bits, one number a column."""
        result = [1 << bit for bit in range(32)]
        power = [int(self._crc(b"\0", column)) ^ int(self._crc(b"\0", 0)) for column in result]
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


def candidates() -> list[BodySum]:
    """Kinds that can be computed here, cheapest first."""
    return [Crc32c(), Md5()] if util.find_spec("crc32c") else [Md5()]


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()

"""A local file, read part by part to be sent."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from dcpsvc.errors import CorruptShardError, StoreUnavailableError
from dcpsvc.storage.oserror import local_file_error

if TYPE_CHECKING:
    from collections.abc import Generator

    from dcpsvc.storage.cargo import Cargo
    from dcpsvc.storage.parts import Span


class Outgoing:
    """An open file, and what its bytes should be. Any thread."""

    def __init__(self, path: str, cargo: Cargo, descriptor: int) -> None:
        self._path, self._cargo, self._descriptor = path, cargo, descriptor

    def part(self, span: Span, buffer: bytearray) -> memoryview:
        """The bytes of a part, checked; ``buffer`` has room for them.

        Raises:
            DcpsvcError: They are not what they should be.
            StoreUnavailableError: There are fewer.
        """
        body = memoryview(buffer)[: span.end - span.begin]
        if not self._is_in_memory(span, body):
            self._read(span, body)
            self._cargo.check(span.begin, body)
        return body

    def _is_in_memory(self, span: Span, body: memoryview) -> bool:
        """Whether the bytes could be had without the disk; others may have come in their place meanwhile."""
        image = self._cargo.image
        if image is None or span.end > len(image):
            return False
        import numpy as np

        # Other threads run meanwhile, which they would not if one view was assigned to the other.
        np.copyto(np.frombuffer(body, np.uint8), np.frombuffer(image[span.begin : span.end], np.uint8))
        try:
            self._cargo.check(span.begin, body)
        except CorruptShardError:
            return False
        return True

    def _read(self, span: Span, body: memoryview) -> None:
        at = 0
        while at < len(body):
            try:
                count = os.preadv(self._descriptor, [body[at:]], span.begin + at)
            except OSError as err:
                raise local_file_error(self._path, self._cargo.path, err) from err
            if not count:
                raise StoreUnavailableError("put_file", f"s3://{self._path}", f"{self._cargo.path} became shorter")
            at += count


@contextlib.contextmanager
def outgoing(path: str, cargo: Cargo) -> Generator[Outgoing]:
    """The local file of ``cargo``, opened to be sent to ``path``."""
    try:
        descriptor = os.open(cargo.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as err:
        raise local_file_error(path, cargo.path, err) from err
    try:
        yield Outgoing(path, cargo, descriptor)
    finally:
        os.close(descriptor)

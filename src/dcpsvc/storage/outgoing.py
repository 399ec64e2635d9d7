"""A local file, read part by part to be sent."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from dcpsvc.errors import StoreUnavailableError
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
        body, at = memoryview(buffer)[: span.end - span.begin], 0
        while at < len(body):
            try:
                count = os.preadv(self._descriptor, [body[at:]], span.begin + at)
            except OSError as err:
                raise local_file_error(self._path, self._cargo.path, err) from err
            if not count:
                raise StoreUnavailableError("put_file", f"s3://{self._path}", f"{self._cargo.path} became shorter")
            at += count
        self._cargo.check(span.begin, body)
        return body


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

"""What a checkpoint consists of, as the bytes at the run root say, read by nobody's code but the formats'."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcpsvc.format import digest, manifest

if TYPE_CHECKING:
    from dcpsvc.format.keys import Attempt
    from dcpsvc.format.manifest import Manifest
    from tests.model.stores import Space


class TornError(Exception):
    """A checkpoint is not whole: why."""


def is_whole(space: Space, attempt: Attempt) -> bool:
    """Whether all its files are there, with the bytes that its manifest says."""
    try:
        files_of(space, attempt)
    except TornError:
        return False
    return True


def files_of(space: Space, attempt: Attempt) -> list[str]:
    """Its files, proven.

    Raises:
        TornError: Not all of them are there, or they have other bytes.
    """
    found = manifest.loads(attempt.manifest, space.objects[attempt.manifest])
    files = [found.layout.path, *(attempt.shard(rank) for rank in range(found.world_size))]
    if [shard.path for shard in found.shards] != files[1:]:
        raise TornError("it names the shards of another")
    files += [file.path for file in found.adapter.files] if found.adapter else []
    for path in files:
        if path not in space.objects:
            raise TornError(f"{path} is not there")
    _check_bytes(space, found)
    return files


def _check_bytes(space: Space, found: Manifest) -> None:
    for shard in found.shards:
        data = space.objects[shard.path]
        body, table = data[: shard.body_nbytes], data[shard.body_nbytes :]
        whole = len(data) == shard.nbytes and digest.digest(table) == shard.digest
        if not whole or digest.table(memoryview(body)) != table:
            raise TornError(f"{shard.path} has not the bytes it says")
    for file in found.adapter.files if found.adapter else ():
        if digest.digest(space.objects[file.path]) != file.digest:
            raise TornError(f"{file.path} has not the bytes it says")
    if digest.digest(space.objects[found.layout.path]) != found.layout.digest:
        raise TornError(f"{found.layout.path} has not the bytes it says")

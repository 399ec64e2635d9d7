"""Aborting what dead writers left half sent takes a right that nothing else takes: without it retention goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import dcpsvc
from dcpsvc.errors import StoreAccessError
from dcpsvc.storage.posix import PosixStore

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


class NoRightToAbort(PosixStore):
    def remove_unfinished(self, before: str | float, *, dry_run: bool = False) -> int:
        raise StoreAccessError("remove_unfinished", str(before), "AccessDenied")


def test_without_the_right_to_list_unfinished_uploads_old_checkpoints_go_all_the_same_and_it_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "root").mkdir()
    state: dict[str, Any] = {"w": torch.ones(3)}
    with dcpsvc.Checkpointer(
        NoRightToAbort(tmp_path / "root"), state, local=tmp_path / "local", keep=dcpsvc.Latest(1), save_last=False
    ) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step).wait(30)
        ckpt.wait(30)
    assert [found.step for found in dcpsvc.list_checkpoints(tmp_path / "root")] == [3]
    assert any((tmp_path / "root" / "policies").iterdir())
    said = [record.getMessage() for record in caplog.records if "left unfinished stay" in record.msg]
    assert len(said) == 1
    assert not [record for record in caplog.records if "debris stays" in record.getMessage()]

"""The rank that a save waited for is named, from what the ranks' own logs say."""

import re
import time

import dcpsvc
from dcpsvc.observing import runlog
from dcpsvc.observing.phases import stragglers
from dcpsvc.reading import open_root
from dcpsvc.storage.posix import PosixStore
from tests.ranks.harness import run_ranks, values
from tests.ranks.models import Training, checkpointer

LATE_S = 3.0


class Slow(PosixStore):
    """The network of one rank."""

    def put_file(self, key, path, *, progress=None):
        ends = time.monotonic() + LATE_S
        while time.monotonic() < ends:
            time.sleep(0.05)
        super().put_file(key, path, progress=progress)


def save_with_a_log(rank, world, root, slow):
    training = Training("ddp", rank)
    store = (Slow if rank == slow else PosixStore)(root)
    seen = []
    observer = dcpsvc.Observers(dcpsvc.RunLog(root), seen.append)
    with checkpointer(root, training.state, store=store, on_event=observer) as ckpt:
        training.step()
        ckpt.save(1).wait(40)
        committed = next(event.detail for event in seen if event.name is dcpsvc.Point.COMMITTED)
        return committed, ckpt.statistics().slowest, ckpt._standing.status()["slowest"]


def test_the_rank_with_the_slow_network_is_named_and_its_phase_too(tmp_path):
    root = tmp_path / "run"
    values(run_ranks(3, save_with_a_log, root, 1))
    saves, events, _ = runlog.read(open_root(root))
    assert sorted(save.rank for save in saves) == [0, 1, 2]
    assert [event["event"] for event in events].count("closed") == 3
    (found,) = stragglers(saves)
    assert (found.step, found.who.rank, found.who.phase) == (1, 1, "upload")
    waiting = {save.rank: save.seconds["ack-remote"] for save in saves}
    assert min(waiting[0], waiting[2]) > waiting[1]


def test_the_slow_rank_is_named_at_the_commit_in_the_statistics_and_in_the_status_of_every_rank(tmp_path):
    for committed, counted, status in values(run_ranks(3, save_with_a_log, tmp_path / "run", 1)):
        assert re.search(r"slowest=rank 1 upload [34]\.\d s \(median 0\.\d\)$", committed)
        assert counted == status == committed.partition("slowest=")[2]


def test_ranks_that_are_alike_leave_the_commit_line_as_it_is(tmp_path):
    for committed, counted, status in values(run_ranks(3, save_with_a_log, tmp_path / "run", None)):
        assert counted == status
        assert ("slowest" in committed) == bool(counted)
        assert "upload" not in counted or float(re.search(r"upload ([0-9.]+)", counted)[1]) < LATE_S

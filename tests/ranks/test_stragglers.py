"""The rank that a save waited for is named, from what the ranks' own logs say."""

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
    with checkpointer(root, training.state, store=store, on_event=dcpsvc.RunLog(root)) as ckpt:
        training.step()
        ckpt.save(1).wait(40)
    return True


def test_the_rank_with_the_slow_network_is_named_and_its_phase_too(tmp_path):
    root = tmp_path / "run"
    assert all(values(run_ranks(3, save_with_a_log, root, 1)))
    saves, events = runlog.read(open_root(root))
    assert sorted(save.rank for save in saves) == [0, 1, 2]
    assert [event["event"] for event in events].count("closed") == 3
    (found,) = stragglers(saves)
    assert (found.step, found.rank, found.phase) == (1, 1, "upload")
    waiting = {save.rank: save.seconds["ack-remote"] for save in saves}
    assert min(waiting[0], waiting[2]) > waiting[1]

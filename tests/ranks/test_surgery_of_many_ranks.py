"""A checkpoint of several ranks is edited by one process without them, and they resume it."""

import dcpsvc
from dcpsvc.reading import open_root
from dcpsvc.tools import showing, surgery, verifying
from dcpsvc.tools.changes import setting
from tests.ranks.harness import run_ranks, values
from tests.ranks.models import Training, checkpointer


def save(rank, world, root):
    training = Training("fsdp", rank)
    with checkpointer(root, training.state | {"own": dcpsvc.PerRank({"epoch": rank})}) as ckpt:
        training.step()
        ckpt.save(1).wait(40)
        return training.fingerprint()


def resume(rank, world, root):
    training = Training("fsdp", rank)
    state = training.state | {"own": dcpsvc.PerRank({"epoch": -1})}
    with checkpointer(root, state, save_last=False) as ckpt:
        assert ckpt.resume() == 1
        return training.fingerprint(), ckpt.state["own"]


def test_each_rank_resumes_its_part_of_the_edited_checkpoint(tmp_path):
    root = tmp_path / "run"
    before = values(run_ranks(3, save, root))
    store = open_root(root)
    operation = surgery.Operation(source=store, manifest=showing.find(store, 1), settings=(setting("own.epoch=9"),))
    made = surgery.edit(operation, lambda _: None)
    assert len(made.lineage.changes) == 3
    assert all(finding.intact for finding in verifying.verify(store, verifying.commits(store, None)))
    after = values(run_ranks(3, resume, root))
    assert [digest for digest, _ in after] == before
    assert [getattr(own, "value", own) for _, own in after] == [{"epoch": 9}] * 3

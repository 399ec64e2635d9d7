"""R35, L8: nothing is unpickled to list, verify, load or resume."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.ranks.harness import run_ranks, values
from tests.ranks.models import Training, checkpointer

SCRIPT = """
    import pickle, sys
    import torch
    import dcpsvc
    from dcpsvc.reading import open_root
    from dcpsvc.stages import discover
    from dcpsvc.storage.shards import VerifiedShard
    from tests.ranks.models import Training, checkpointer

    training = Training("plain", 0, seed=5)
    armed, seen = False, []

    def refuse(event, args):
        if armed and event == "pickle.find_class":
            seen.append((event, args))
            raise RuntimeError(f"unpickled {args}")

    def never(*args, **kwargs):
        seen.append("called")
        raise RuntimeError("unpickled")

    root, what = sys.argv[1:]
    sys.addaudithook(refuse)
    pickle.loads = pickle.load = torch.load = never
    pickle.Unpickler = type("Unpickler", (), {"__init__": never})
    armed = True
    match what:
        case "list":
            assert [found.step for found in dcpsvc.list_checkpoints(root)] == [2]
            assert dcpsvc.latest(root).step == 2
        case "verify":
            store = open_root(root)
            (attempt,) = discover.committed(store)
            for record in discover.valid(store, attempt).shards:
                VerifiedShard([store], record).verify()
        case "load":
            assert dcpsvc.load(root, training.state) == 2
            assert training.trainer["steps"] == 2
        case "resume":
            with checkpointer(root, training.state) as ckpt:
                assert ckpt.resume() == 2
    armed = False
    assert seen == [], seen
    print("done")
"""


def save(rank, world, root):
    training = Training("fsdp", rank)
    training.train(2)
    with checkpointer(root, training.state) as ckpt:
        ckpt.save(2).wait()


@pytest.mark.parametrize("what", ["list", "verify", "load", "resume"])
def test_nothing_is_unpickled(tmp_path, what):
    values(run_ranks(2, save, tmp_path / "run"))
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / "run"), what],
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert finished.stdout == "done\n", finished.stderr

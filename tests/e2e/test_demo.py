"""The demo as a user runs it, and the pieces its verdict rests on."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from dcpsvc.demo.journal import Story
from dcpsvc.demo.text import TextLoader
from dcpsvc.demo.verdict import Difference, compare, rows

STEPS, EVERY = 15, 5
DEMO = (sys.executable, "-m", "dcpsvc", "demo", f"--steps={STEPS}", f"--every={EVERY}")


def play(directory, *options):
    """Run the demo to its end; returns the finished process and its JSON document."""
    command = [*DEMO, "--json", f"--dir={directory}", *options]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert finished.stdout, finished.stderr
    return finished, json.loads(finished.stdout)


def ranks_alive(directory):
    journals = [line for path in directory.glob("*.jsonl") for line in path.read_text().splitlines()]
    started = [line["pid"] for line in map(json.loads, journals) if line["kind"] == "started"]
    assert started
    return [pid for pid in started if is_alive(pid)]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("parallel", "ranks"), [("fsdp", 2), ("ddp", 2), ("none", 1)])
def test_a_job_killed_in_the_middle_of_a_save_comes_back_bit_for_bit(tmp_path, parallel, ranks):
    finished, outcome = play(tmp_path, f"--parallel={parallel}")

    assert outcome["error"] is None
    assert finished.returncode == 0
    assert outcome["ok"]
    assert outcome["killed"] == {"phase": "shard-written", "step": 2 * EVERY, "rank": ranks - 1}
    assert outcome["resumed_from"] == EVERY
    assert outcome["identical"] == outcome["steps"] == STEPS
    assert outcome["newest"] == STEPS
    assert [row["step"] for row in outcome["checkpoints"] if row["state"] == "committed"] == [5, 10, 15]
    assert ranks_alive(tmp_path) == []


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_resumed_run_with_other_settings_is_found_out_at_its_first_step(tmp_path):
    finished, outcome = play(tmp_path, "--parallel=none", "--tamper")

    assert finished.returncode == 1
    assert not outcome["ok"]
    assert outcome["identical"] == EVERY
    assert outcome["first_difference"]["step"] == EVERY + 1
    assert f"step {EVERY + 1} differs" in outcome["error"]


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_process_behind(tmp_path, signum):
    command = [*DEMO, f"--dir={tmp_path}", "--parallel=fsdp"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        said = next((line for line in demo.stdout if "committed" in line), None)
        demo.send_signal(signum)
        _, errors = demo.communicate(timeout=60)

    assert said, errors
    assert demo.returncode != 0
    assert ranks_alive(tmp_path) == []


@pytest.mark.slow
def test_a_directory_in_use_is_refused(tmp_path):
    (tmp_path / "mine").touch()

    finished, outcome = play(tmp_path)

    assert finished.returncode == 1
    assert "is not empty" in outcome["error"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def story(**losses):
    return Story(losses={int(step[1:]): loss.hex() for step, loss in losses.items()})


def test_steps_computed_twice_must_agree_both_times():
    reference = story(s1=1.0, s2=2.0, s3=3.0)
    killed, resumed = story(s1=1.0, s2=2.0 + 2**-51), story(s2=2.0, s3=3.0)

    identical, first = compare(reference, {"killed": killed, "resumed": resumed}, 3)

    assert identical == 2
    assert first == Difference(2, "killed", (2.0 + 2**-51).hex(), (2.0).hex())
    assert "2.0000000000000004" in str(first)


def test_a_step_nobody_computed_is_a_difference():
    identical, first = compare(story(s1=1.0, s2=2.0), {"killed": story(s1=1.0), "resumed": story()}, 2)

    assert identical == 1
    assert str(first).startswith("step 2 differs: loss missing")


def test_a_commit_the_root_no_longer_lists_is_shown_as_deleted():
    save = {"kind": "save", "nbytes": 1, "blocked_ms": 1.0, "local_s": 1.0, "commit_lag_s": 1.0, "state": "committed"}
    run = Story(saves=[save | {"step": 5, "attempt": "a"}])

    (row,) = rows([run], [])

    assert (row.step, row.state) == (5, "deleted")


@pytest.mark.parametrize(("world", "batch"), [(1, 3), (2, 4), (3, 5), (4, 40)])
def test_every_window_is_read_exactly_once_an_epoch(world, batch):
    windows, epochs = 50, 4
    corpus = np.zeros(windows * 8 + 1, dtype=np.uint8)
    loaders = [TextLoader(corpus, batch, 8, rank=rank, world=world, seed=7) for rank in range(world)]

    rounds = -(-windows * epochs // (world * batch))
    read = [window for _ in range(rounds) for loader in loaders for window in loader.next_windows()]

    orders = [read[epoch * windows : (epoch + 1) * windows] for epoch in range(epochs)]
    assert all(sorted(order) == list(range(windows)) for order in orders)
    assert orders[0] != orders[1]


def test_a_loader_goes_on_where_its_saved_state_was():
    corpus = np.arange(200, dtype=np.uint8)
    first = TextLoader(corpus, 3, 8, rank=1, world=2, seed=7)
    for _ in range(9):
        first.next_windows()

    second = TextLoader(corpus, 3, 8, rank=1, world=2, seed=8)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))

    assert [second.next_windows() for _ in range(9)] == [first.next_windows() for _ in range(9)]


def test_targets_are_the_text_one_token_later():
    tokens, targets = TextLoader(np.arange(200, dtype=np.uint8), 4, 8, rank=0, world=1, seed=7).next_batch()

    assert tokens.shape == targets.shape == (4, 8)
    assert targets.tolist() == (tokens + 1).tolist()


def test_the_demo_command_starts_without_torch():
    code = "import sys, dcpsvc.demo.run; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

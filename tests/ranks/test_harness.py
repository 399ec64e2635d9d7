"""The harness itself: it tells how a rank ended, and never hangs or leaves a process behind."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks.harness import StuckError, die, run_ranks, values


def sum_of_ranks(rank, world):
    total = torch.tensor([rank])
    dist.all_reduce(total)
    return [int(total), os.environ["LOCAL_RANK"], torch.get_num_threads()]


def end_differently(rank, world):
    if rank == 0:
        raise LookupError("not here")
    if rank == 1:
        die()
    return rank


def sleep_on_rank_1(rank, world, path):
    Path(path, str(rank)).write_text(str(os.getpid()))
    if rank == 1:
        time.sleep(600)


def test_ranks_form_one_job_over_two_nodes():
    assert values(run_ranks(4, sum_of_ranks, nodes=2)) == [[6, "0", 1], [6, "1", 1], [6, "0", 1], [6, "1", 1]]


def test_an_exception_a_signal_and_a_value_are_told_apart():
    first, second, third = run_ranks(3, end_differently)

    assert first.raised.type == "LookupError"
    assert first.raised.text == "not here"
    assert second.signal == signal.SIGKILL
    assert third.value == 2
    with pytest.raises(AssertionError, match=r"rank 0: (.|\n)*LookupError: not here"):
        values([first, second, third])


def test_a_stuck_rank_is_named_with_its_stack_and_killed(tmp_path):
    with pytest.raises(StuckError, match=r"rank 1 was still running:(.|\n)*in sleep_on_rank_1"):
        run_ranks(2, sleep_on_rank_1, str(tmp_path), timeout_s=12)

    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)

"""The uploader outlives whatever happens in it, close() keeps to its time, and a restore error says what it touched."""

import functools
import threading

import pytest
import torch

import dcpsvc
from dcpsvc.errors import RankFailure, RestoreFailedError, WaitTimeoutError
from dcpsvc.policies import Keep
from dcpsvc.storage.posix import PosixStore

BOUND_S = 20.0


class BrokenRule(Keep):
    """A policy of the user's that raises what no store would."""

    def reasons(self, commits):
        raise OSError("no such policy today")


def save_twice(tmp_path, **options):
    """Two saves in a row; on a thread, because a wait without a deadline would hang the suite."""
    states = []

    def body():
        with dcpsvc.Checkpointer(
            tmp_path / "root", {"n": 1}, local=tmp_path / "local", save_last=False, **options
        ) as c:
            for step in (1, 2):
                pending = c.save(step)
                pending.wait(BOUND_S)
                states.append(pending.state)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(BOUND_S)
    return states


def test_a_policy_that_raises_costs_no_commit_and_no_later_save(tmp_path):
    assert save_twice(tmp_path, keep=BrokenRule()) == ["committed"] * 2


@pytest.mark.parametrize("point", [dcpsvc.Point.MANIFEST_CREATED, dcpsvc.Point.COMMITTED, dcpsvc.Point.RETAINED])
def test_an_observer_that_exits_costs_no_commit_and_no_later_save(tmp_path, point):
    def leave(event):
        if event.name == point:
            raise SystemExit(3)

    assert save_twice(tmp_path, on_event=leave, keep=dcpsvc.Latest(1)) == ["committed"] * 2


def test_close_keeps_to_its_time_although_the_last_step_is_not_saved_yet(tmp_path):
    reached, let_go = threading.Event(), threading.Event()

    def hold(event):
        if event.name == dcpsvc.Point.UPLOADED:
            reached.set()
            let_go.wait(BOUND_S)

    checkpointer = dcpsvc.Checkpointer(tmp_path / "root", {"n": 1}, local=tmp_path / "local", on_event=hold)
    checkpointer.save(1)
    assert reached.wait(BOUND_S)
    checkpointer.step(2)
    with pytest.raises(WaitTimeoutError, match="step 1"):
        checkpointer.close(timeout_s=0.2)
    let_go.set()


def test_a_file_server_that_does_not_say_which_one_it_is_holds_a_load_up_for_half_its_patience(tmp_path):
    answers = threading.Event()

    class Mute(PosixStore):
        @property
        def page_cache(self):
            answers.wait()

    with dcpsvc.Checkpointer(tmp_path / "root", {"n": 1}, local=tmp_path / "local") as checkpointer:
        checkpointer.save(1)
    loaded = []
    load = functools.partial(dcpsvc.load, Mute(tmp_path / "root"), {"n": 0}, sync_timeout_s=0.4)
    thread = threading.Thread(target=lambda: loaded.append(load()), daemon=True)
    thread.start()
    thread.join(BOUND_S)
    answers.set()
    assert loaded == [1]


def test_a_restore_that_failed_says_that_memory_is_untouched(tmp_path):
    with dcpsvc.Checkpointer(tmp_path / "root", {"w": torch.zeros(3)}, local=tmp_path / "local") as checkpointer:
        checkpointer.save(1)
    with pytest.raises(RestoreFailedError, match="nothing in memory was changed"):
        dcpsvc.load(tmp_path / "root", {"w": torch.zeros(4)})


def test_a_restore_that_failed_while_it_was_applied_says_so(tmp_path):
    class Picky:
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            raise ValueError("not this one")

    with dcpsvc.Checkpointer(tmp_path / "root", {"p": Picky()}, local=tmp_path / "local") as checkpointer:
        checkpointer.save(1)
    with pytest.raises(RestoreFailedError, match="may be partly changed") as caught:
        dcpsvc.load(tmp_path / "root", {"p": Picky()})
    assert caught.value.failures == (RankFailure(0, "apply", "ValueError", "not this one"),)

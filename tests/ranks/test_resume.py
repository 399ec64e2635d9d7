"""R9 R10 R17 R27 R28 R30: what comes back is what was there, bit for bit, and the last step is never lost."""

import contextlib
import copy
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist

import dcpsvc
from dcpsvc import Every, Point
from dcpsvc.errors import StepDeletedError
from dcpsvc.stages import discover, retain
from dcpsvc.storage.posix import PosixStore
from tests.ranks.harness import raised_by, run_ranks, values
from tests.ranks.models import Training, checkpointer, committed

KINDS = [("plain", 0), ("ddp", 2), ("fsdp", 2)]
"""How the model is wrapped, and on how many ranks; 0: without a process group."""


# --- a step that was deleted ----------------------------------------------------------------------


def ask_for_step_10(rank, world, root):
    with checkpointer(root, Training("ddp", rank).state) as ckpt, pytest.raises(StepDeletedError) as caught:
        ckpt.resume(10)
    return str(caught.value)


def test_all_ranks_hear_that_the_step_they_ask_for_was_deleted(tmp_path):
    with checkpointer(tmp_path / "run", {"n": [1]}) as ckpt:
        for step in (10, 20):
            ckpt.save(step).wait(30)
    store = PosixStore(tmp_path / "run")
    condemned = discover.committed(store)[0]
    assert retain.condemn(store, condemned, lambda: True)
    store.delete(condemned.manifest)
    first, second = values(run_ranks(2, ask_for_step_10, tmp_path / "run"))
    assert first == second
    assert "or was deleted meanwhile by the policy of its job" in first


# --- R27 R28: the same run, in two pieces ---------------------------------------------------------


def train_20(rank, world, kind):
    training = Training(kind, rank)
    losses = training.train(20)
    return {
        "losses": losses[10:],
        "prints": training.fingerprint(),
        "own": training.own(),
        "buffers": training.buffers(),
    }


def train_10_and_save(rank, world, root, kind):
    training = Training(kind, rank)
    with checkpointer(root, training.state, every=Every(steps=10)) as ckpt:
        for step in range(1, 11):
            training.step()
            ckpt.step(step)


def resume_and_train_10(rank, world, root, kind):
    training = Training(kind, rank, seed=5)  # nothing may survive of how it began
    training.train(3)
    with checkpointer(root, training.state) as ckpt:
        assert ckpt.resume() == 10
        losses = training.train(10)
    return {"losses": losses, "prints": training.fingerprint(), "own": training.own(), "buffers": training.buffers()}


@pytest.mark.parametrize(("kind", "world"), KINDS)
def test_20_steps_are_10_and_a_resume_and_10_bit_for_bit(tmp_path, kind, world):
    whole = values(run_ranks(world, train_20, kind))
    values(run_ranks(world, train_10_and_save, tmp_path / "run", kind))
    pieces = values(run_ranks(world, resume_and_train_10, tmp_path / "run", kind))

    for rank, (one, two) in enumerate(zip(whole, pieces, strict=True)):
        assert two["losses"] == one["losses"]
        assert two["prints"] == one["prints"]
        assert two["own"] == one["own"]  # loader, counters, schedule, and the next number of each generator
        assert two["own"]["owner"] == rank
        if rank == 0:  # the buffers that count are rank 0's
            assert two["buffers"] == one["buffers"]


# --- R10: one consistent step ---------------------------------------------------------------------


def mutate_after_save(rank, world, root, kind):
    training = Training(kind, rank)
    training.train(3)
    before = training.fingerprint(), training.own()
    torch.manual_seed(7 + rank)  # own() drew numbers
    numbers = torch.get_rng_state()
    with checkpointer(root, training.state) as ckpt:
        pending = ckpt.save(3)
        with torch.no_grad():
            for parameter in training.core.parameters():
                parameter.zero_()
                for entry in training.optimizer.state[parameter].values():
                    entry.fill_(77)
            for buffer in training.core.buffers():
                buffer.fill_(77)
        training.optimizer.param_groups[0]["lr"] = 77.0
        training.trainer["steps"] = 77
        training.trainer["history"].append(77)
        training.loader.position = 77
        torch.manual_seed(77)
        pending.wait()
        ckpt.wait()
    again = Training(kind, rank, seed=5)
    with checkpointer(root, again.state) as ckpt:
        ckpt.resume()
    same_numbers = bool(torch.equal(numbers, torch.get_rng_state()))
    return before, (again.fingerprint(), again.own()), same_numbers, again.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(("kind", "world"), KINDS)
def test_changes_after_save_returned_are_not_in_the_checkpoint(tmp_path, kind, world):
    for before, after, same_numbers, lr in values(run_ranks(world, mutate_after_save, tmp_path / "run", kind)):
        assert after[0] == before[0]
        assert lr != 77.0
        for own in (before[1], after[1]):
            del own["next numbers"]
        assert after[1] == before[1]
        assert same_numbers


# --- R30: other numbers of ranks, other wrappers --------------------------------------------------


def train_and_save(rank, world, root, kind):
    training = Training(kind, rank, width=15)  # does not divide evenly
    training.train(3 + rank if kind == "plain" else 3)
    prints = training.fingerprint()
    with checkpointer(root, training.state) as ckpt:
        ckpt.save(3).wait()
    return prints


def load_and_look(rank, world, root, kind):
    training = Training(kind, rank, seed=5, width=15)
    lines = []
    with checkpointer(
        root, training.state, on_event=lambda e: lines.append(str(e)) if e.name == Point.RESUMED else 0
    ) as ckpt:
        assert ckpt.resume() == 3
        prints = training.fingerprint()
        own = training.own()
        losses = training.train(2)  # it can go on
    return {"prints": prints, "own": own, "line": lines[0], "losses": losses}


ELASTIC = [
    ("fsdp", 4, [("fsdp", 1), ("fsdp", 2), ("fsdp", 3), ("fsdp", 8), ("ddp", 2), ("plain", 0)]),
    ("ddp", 2, [("fsdp", 4), ("ddp", 4), ("plain", 0)]),
    ("fsdp", 2, [("fsdp", 4)]),
    ("plain", 0, [("fsdp", 2), ("ddp", 2)]),
]


@pytest.mark.parametrize(
    ("kind", "world", "others"), ELASTIC, ids=lambda value: str(value) if isinstance(value, str | int) else ""
)
def test_model_and_optimizer_are_exact_on_any_other_layout(tmp_path, kind, world, others):
    root = tmp_path / "run"
    saved = values(run_ranks(world, train_and_save, root, kind))[0]
    for other_kind, other_world in others:
        for rank, loaded in enumerate(values(run_ranks(other_world, load_and_look, root, other_kind))):
            assert loaded["prints"] == saved, (other_kind, other_world)
            assert loaded["own"]["owner"] == rank % max(world, 1)
            assert loaded["own"]["position"] == 3


def test_with_other_ranks_the_line_says_what_became_of_their_own_values(tmp_path):
    root = tmp_path / "run"
    values(run_ranks(2, train_and_save, root, "ddp"))
    same, fewer, more = (values(run_ranks(world, load_and_look, root, "ddp")) for world in (2, 1, 4))

    assert "ranks" not in same[0]["line"]
    assert "2 -> 1 ranks" in fewer[0]["line"]
    assert "left out" in fewer[0]["line"]
    assert "2 -> 4 ranks" in more[0]["line"]
    assert "reseeded" in more[0]["line"]
    # Ranks that were there continue; the others draw numbers of their own.
    numbers = [tuple(result["own"]["next numbers"]) for result in more]
    assert numbers[:2] == [tuple(result["own"]["next numbers"]) for result in same]
    assert len(set(numbers)) == 4


# --- R9: nothing partial --------------------------------------------------------------------------


class Stateful:
    def __init__(self, error=None):
        self.error, self.loaded = error, None

    def state_dict(self):
        if self.error is not None:
            raise self.error
        return {"value": 1}

    def load_state_dict(self, state):
        self.loaded = state


def save_one(rank, world, root):
    training = Training("ddp", rank)
    training.state["extra"] = Stateful()
    training.train(2)
    with checkpointer(root, training.state) as ckpt:
        ckpt.save(2).wait()


def resume_with(rank, world, root, change):
    """Resume into a state that does not fit; what is different afterwards."""
    training = Training("ddp", rank, seed=5)
    training.state["extra"] = Stateful()
    training.train(1)
    change(training, rank)
    before = training.fingerprint(), training.buffers(), training.loader.state_dict(), copy.deepcopy(training.trainer)
    state = torch.get_rng_state()
    # A rank that hears nothing of its peer's failure would wait until then.
    with checkpointer(root, training.state, save_last=False, upload_timeout_s=15) as ckpt:
        error = raised_by(ckpt.resume)
        after = (
            training.fingerprint(),
            training.buffers(),
            training.loader.state_dict(),
            copy.deepcopy(training.trainer),
        )
        untouched = before == after and torch.equal(state, torch.get_rng_state())
        skipped = raised_by(ckpt.resume, skip=["ema"]) if "ema" in training.state else None
    return {"error": error, "untouched": bool(untouched), "skipped": skipped, "steps": training.trainer["steps"]}


def want_ema(training, rank):
    training.state["ema"] = {"decay": 0.5}


def want_another_shape(training, rank):
    training.core.last = torch.nn.Linear(16, 9)


def want_another_shape_on_rank_1(training, rank):
    if rank == 1:
        training.core.last = torch.nn.Linear(16, 9)


def raise_in_state_dict_on_rank_1(training, rank):
    if rank == 1:
        training.state["extra"].error = RuntimeError("cannot look at it now")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (want_ema, "ema"),
        (want_another_shape, "model.last."),
        (want_another_shape_on_rank_1, "model.last."),
        (raise_in_state_dict_on_rank_1, "cannot look at it now"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_on_every_rank_and_left_untouched(tmp_path, change, named):
    values(run_ranks(2, save_one, tmp_path / "run"))

    for result in values(run_ranks(2, resume_with, tmp_path / "run", change)):
        assert result["error"].type == "RestoreFailedError"
        assert named in result["error"].text
        assert result["untouched"]
        assert result["skipped"] is None
        assert result["steps"] == (2 if change is want_ema else 1)


def load_with(rank, world, root):
    training = Training("ddp", rank, seed=5)
    want_ema(training, rank)
    error = raised_by(dcpsvc.load, root, training.state)
    fresh = training.trainer["steps"]
    step = dcpsvc.load(root, training.state, skip=["ema"])
    return error.type, error.text, fresh, step, training.trainer["steps"], training.state["ema"]


def test_load_refuses_a_missing_component_on_every_rank_unless_it_is_skipped(tmp_path):
    values(run_ranks(2, save_one, tmp_path / "run"))

    for kind, text, fresh, step, steps, ema in values(run_ranks(2, load_with, tmp_path / "run")):
        assert (kind, fresh, step, steps, ema) == ("RestoreFailedError", 0, 2, 2, {"decay": 0.5})
        assert "ema" in text


# --- R17: the last step exists --------------------------------------------------------------------


def leave_loop(rank, world, root, how, kind):
    """37 complete steps, schedule every 500; then the loop ends."""
    training = Training(kind, rank)
    prints = own = None
    endings = contextlib.suppress(ArithmeticError, KeyboardInterrupt, SystemExit)
    with endings, checkpointer(root, training.state, every=Every(steps=500)) as ckpt:
        for step in range(1, 38):
            training.step()
            ckpt.step(step)
        prints, own = training.fingerprint(), own_values(training)
        how(training)
    return {"prints": prints, "own": own}


def own_values(training):
    return copy.deepcopy(training.trainer), training.loader.state_dict()


def end_normally(training):
    pass


def raise_at_the_start_of_a_step(training):
    raise ZeroDivisionError


def raise_after_the_loader_moved(training):
    training.loader.next()
    torch.rand(3)
    training.trainer["steps"] += 1
    raise ZeroDivisionError


def interrupt(training):
    raise KeyboardInterrupt


def exit_the_program(training):
    sys.exit(3)


def load_last(rank, world, root, kind):
    training = Training(kind, rank, seed=5)
    step = dcpsvc.load(root, training.state)
    return {"step": step, "prints": training.fingerprint(), "own": own_values(training)}


@pytest.mark.parametrize(
    "how", [end_normally, raise_at_the_start_of_a_step, raise_after_the_loader_moved, interrupt, exit_the_program]
)
def test_the_last_complete_step_is_committed_however_the_loop_ends(tmp_path, how):
    root = tmp_path / "run"
    left = values(run_ranks(2, leave_loop, root, how, "ddp"))

    assert committed(root) == [37]
    for before, after in zip(left, values(run_ranks(2, load_last, root, "ddp")), strict=True):
        assert after == {"step": 37, **before}


def raise_after_the_optimizer(training):
    training.step()
    raise ZeroDivisionError


def raise_after_the_forward(training):
    training.model(training.loader.next()[0])  # batch norm has counted it
    raise ZeroDivisionError


@pytest.mark.parametrize("how", [raise_after_the_optimizer, raise_after_the_forward])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_step_that_broke_off_in_the_middle_is_never_saved_as_the_one_before(tmp_path, how, kind):
    root = tmp_path / "run"
    left = values(run_ranks(2, leave_loop, root, how, kind))

    for step in committed(root):
        assert step == 37
        for before, after in zip(left, values(run_ranks(2, load_last, root, kind)), strict=True):
            assert after == {"step": 37, **before}


def raise_on_rank_1_alone(rank, world, root):
    training = Training("plain", rank)
    with checkpointer(root, training.state, sync_timeout_s=3) as ckpt:
        for step in range(1, 5):
            training.trainer["steps"] = step
            ckpt.step(step)
        if rank == 1:
            raise ZeroDivisionError("on one rank")
        dist.barrier()


def test_an_exception_on_one_rank_comes_out_unchanged_and_in_time(tmp_path):
    outcomes = run_ranks(2, raise_on_rank_1_alone, tmp_path / "run", timeout_s=90)

    assert outcomes[1].raised.type == "ZeroDivisionError"
    assert outcomes[1].raised.text == "on one rank"
    assert committed(tmp_path / "run") == []


SCRIPT = """
    import sys
    import torch
    import torch.distributed as dist
    import dcpsvc

    def main(root, ending):
        if ending == "group destroyed":
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ckpt = dcpsvc.Checkpointer(root, {"model": model, "optim": optimizer}, every=dcpsvc.Every(steps=10))
        for step in range(1, 38):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            ckpt.step(step)
        if ending == "exception":
            raise ZeroDivisionError
        if ending == "sys.exit":
            sys.exit(3)
        if ending == "group destroyed":
            dist.destroy_process_group()

    main(*sys.argv[1:])
"""


@pytest.mark.parametrize(("ending", "code"), [("normal", 0), ("exception", 1), ("sys.exit", 3), ("group destroyed", 0)])
def test_without_a_with_block_the_last_step_is_committed_when_the_interpreter_exits(tmp_path, ending, code):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script), str(tmp_path / "run"), ending]
    finished = subprocess.run(
        command, env=environment(tmp_path), capture_output=True, text=True, timeout=100, check=False
    )

    assert finished.returncode == code, finished.stderr
    assert committed(tmp_path / "run") == [10, 20, 30, 37], finished.stderr


def environment(tmp_path):
    return os.environ | {"DCPSVC_LOCAL": str(tmp_path / "local")}


def test_an_interrupted_script_has_committed_its_last_step(tmp_path):
    script = tmp_path / "train.py"
    body = SCRIPT.replace(
        "ckpt.step(step)\n",
        "ckpt.step(step)\n            print(step, flush=True)\n            step == 37 and time.sleep(100)\n",
    )
    script.write_text(textwrap.dedent(body).replace("import sys\n", "import sys, time\n", 1))
    command = [sys.executable, str(script), str(tmp_path / "run"), "normal"]
    with subprocess.Popen(
        command, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        for line in job.stdout:
            if line.strip() == "37":
                job.send_signal(signal.SIGINT)
        _, errors = job.communicate(timeout=100)

    assert "KeyboardInterrupt" in errors
    assert committed(tmp_path / "run") == [10, 20, 30, 37], errors

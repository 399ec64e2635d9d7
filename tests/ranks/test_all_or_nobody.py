"""R1 R2 R3 R4 R29: a save becomes a checkpoint on all ranks, or every live rank gets the same typed error."""

import contextlib
import functools
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import dcpsvc
from dcpsvc import Point
from dcpsvc.errors import StoreAccessError
from dcpsvc.storage.posix import PosixStore
from tests.ranks.harness import die, die_at, raised_by, run_ranks, values
from tests.ranks.models import Training, checkpointer, committed, files, step_files

IMPATIENT_S = 3.0
"""``sync_timeout_s`` where somebody is missing on purpose."""


def attempt(ckpt, step):
    """Save and wait, on this rank."""
    return raised_by(lambda: ckpt.save(step).wait())


# --- ranks that do not come -----------------------------------------------------------------------


def save_on_rank_0_only(rank, world, root, next_step):
    training = Training("ddp", rank)
    with checkpointer(root, training.state, sync_timeout_s=IMPATIENT_S) as ckpt:
        attempt(ckpt, 1)
        alone = attempt(ckpt, 2) if rank == 0 else None
        sums = [sum_over_ranks(rank) for _ in range(20)]
        found = committed(root), step_files(root, 2)
        dist.barrier()
        together = attempt(ckpt, next_step)
    return {"alone": alone, "sums": sums, "found": found, "together": together}


def sum_over_ranks(rank):
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    return int(total)


def test_a_save_by_rank_0_alone_names_who_came_and_who_did_not(tmp_path):
    root = tmp_path / "run"
    results = values(run_ranks(4, save_on_rank_0_only, root, 3))

    error = results[0]["alone"]
    assert error.type == "RanksMissingError"
    assert (error["step"], error["present"], error["missing"]) == (2, [0], [1, 2, 3])
    assert error["attempt"]
    assert error["newest"] == 1
    assert "step 1 remains the newest commit" in error.text
    assert all(result["found"] == ([1], []) for result in results)
    # Training goes on, and so do saves.
    assert all(result["sums"] == [10] * 20 for result in results)
    assert [result["together"] for result in results] == [None] * 4
    assert committed(root) == [1, 3]


def test_a_step_that_some_ranks_missed_is_saved_when_all_come(tmp_path):
    root = tmp_path / "run"
    results = values(run_ranks(2, save_on_rank_0_only, root, 2))

    assert results[0]["alone"].type == "RanksMissingError"
    assert [result["together"] for result in results] == [None] * 2
    assert committed(root) == [1, 2]


def save_different_steps(rank, world, root):
    training = Training("ddp", rank)
    with checkpointer(root, training.state, sync_timeout_s=IMPATIENT_S) as ckpt:
        apart = attempt(ckpt, 10 + rank)
        dist.barrier()
        return apart, attempt(ckpt, 20)


def test_ranks_with_different_steps_each_get_an_error_and_publish_nothing(tmp_path):
    root = tmp_path / "run"
    results = values(run_ranks(2, save_different_steps, root))

    for rank, (apart, together) in enumerate(results):
        assert "SaveError" in apart.family
        assert apart["step"] == 10 + rank
        assert apart["missing"] == [1 - rank]
        assert together is None
    assert committed(root) == [20]


# --- ranks that fail, or would save something else ------------------------------------------------


class Counters:
    """A Stateful that can be told to raise."""

    error = None

    def state_dict(self):
        if self.error is not None:
            raise self.error
        return {"count": 7}

    def load_state_dict(self, state):
        self.count = state["count"]


def save_around_a_fault(rank, world, root, fault, victim, dtype=torch.float32):  # noqa: PLR0917
    """Save step 1; step 2 with a fault on one rank; step 3 without. What each raised."""
    training = Training("ddp", rank, width=64, dtype=dtype)
    training.train(1)
    training.state["counters"] = Counters()
    observers = []

    def on_event(event):
        for observe in observers:
            observe(event)

    with checkpointer(root, training.state, on_event=on_event) as ckpt:
        first = attempt(ckpt, 1)
        with fault(training, observers, Path(root)) if rank == victim else contextlib.nullcontext():
            second = attempt(ckpt, 2)
            ckpt.wait()  # until what the failure left is tidied up
            dist.barrier()
            left = committed(root), step_files(Path(root).parent / "local", 2)
            dist.barrier()
        third = attempt(ckpt, 3)
        ckpt.wait()
        dist.barrier()
        left = *left, step_files(root, 2)  # a shard that came after the coordinator tidied up goes with the next commit
        statistics = ckpt.statistics()
    counted = (statistics.accepted, statistics.committed, statistics.failed)
    return {"first": first, "second": second, "third": third, "left": left, "counted": counted}


def assert_step_2_failed_alone(root, results):
    """Every rank has the error, no file of step 2 is anywhere, and the steps before and after stand."""
    for result in results:
        assert result["first"] is None
        assert result["second"] is not None
        assert result["left"] == ([1], [], [])
        assert result["third"] is None
        assert result["counted"] == (3, 2, 1)
    assert committed(root) == [1, 3]


def failures(error):
    return [(failure["rank"], failure["phase"], failure["error"]) for failure in error["failures"]]


@contextlib.contextmanager
def raising(error, training, observers, root):
    training.state["counters"].error = error
    yield
    training.state["counters"].error = None


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize(
    "error",
    [ValueError("no count today"), MemoryError("no room"), PermissionError("denied")],
    ids=lambda e: type(e).__name__,
)
def test_a_state_dict_that_raises_on_one_rank_fails_the_save_on_all(tmp_path, victim, error):
    root = tmp_path / "run"
    results = values(run_ranks(3, save_around_a_fault, root, functools.partial(raising, error), victim))

    assert_step_2_failed_alone(root, results)
    for second in (result["second"] for result in results):
        assert second.type == "SaveFailedError", (second.text, second)
        assert failures(second) == [(victim, "stage", type(error).__name__)]
        assert second["newest"] == 1
        assert str(error) in second.text


def come_late_to_a_failed_save(rank, world, root):
    training = Training("ddp", rank)
    training.state["counters"] = counters = Counters()
    with checkpointer(root, training.state, sync_timeout_s=IMPATIENT_S) as ckpt:
        attempt(ckpt, 1)
        counters.error = ValueError("no count today") if rank == 0 else None
        second = attempt(ckpt, 2) if rank == 0 else None
        dist.barrier()  # rank 0 has failed, and said so, before the others begin
        second = second or attempt(ckpt, 2)
        counters.error = None
        dist.barrier()
        return second, attempt(ckpt, 3)


def test_a_rank_that_comes_late_to_a_failed_save_hears_the_failure(tmp_path):
    root = tmp_path / "run"

    for second, third in values(run_ranks(3, come_late_to_a_failed_save, root)):
        assert second.type == "SaveFailedError", second
        assert failures(second) == [(0, "stage", "ValueError")]
        assert third is None
    assert committed(root) == [1, 3]


@contextlib.contextmanager
def another_key(training, observers, root):
    training.trainer["surplus"] = 1
    yield
    del training.trainer["surplus"]


@contextlib.contextmanager
def another_component(training, observers, root):
    training.state["surplus"] = 1
    yield
    del training.state["surplus"]


@contextlib.contextmanager
def another_value(training, observers, root):
    training.trainer["steps"] += 1
    yield
    training.trainer["steps"] -= 1


@contextlib.contextmanager
def another_shape(training, observers, root):
    weight = training.core.last.weight
    training.core.last.weight = torch.nn.Parameter(torch.zeros(1, 2))
    yield
    training.core.last.weight = weight


@pytest.mark.parametrize(
    ("fault", "key", "remedy"),
    [
        (another_key, "trainer.surplus", "wrap it in PerRank, PerGroup or OneRank"),
        (another_component, "surplus", "wrap it in PerRank, PerGroup or OneRank"),
        (another_value, "trainer.steps", "wrap it in PerRank, PerGroup or OneRank"),
        (another_shape, "model.last.weight", "declare it: Part for a module"),
    ],
)
def test_a_rank_with_other_state_is_named_with_the_key_and_the_remedy(tmp_path, fault, key, remedy):
    root = tmp_path / "run"
    results = values(run_ranks(3, save_around_a_fault, root, fault, 1))

    assert_step_2_failed_alone(root, results)
    for second in (result["second"] for result in results):
        assert second.type == "SaveFailedError"
        assert (1, "plan", "StateMismatchError") in failures(second)
        assert key in second.text
        assert "on ranks (1,)" in second.text
        assert remedy in second.text


@contextlib.contextmanager
def object_in_the_state(training, observers, root):
    training.trainer["handle"] = object()
    yield
    del training.trainer["handle"]


def test_an_object_that_cannot_be_saved_is_named_by_key_on_its_rank_and_by_rank_on_the_others(tmp_path):
    root = tmp_path / "run"
    results = values(run_ranks(3, save_around_a_fault, root, object_in_the_state, 1))

    assert_step_2_failed_alone(root, results)
    assert results[1]["second"].type == "UnsupportedStateError"
    assert results[1]["second"]["key"] == "trainer.handle"
    for rank in (0, 2):
        second = results[rank]["second"]
        assert failures(second) == [(1, "stage", "UnsupportedStateError")]
        assert "trainer.handle" in second.text


@contextlib.contextmanager
def perturbed(find, training, observers, root):
    tensor = find(training)
    before = tensor.detach().clone()
    with torch.no_grad():
        tensor.view(-1)[-1] += 0.5
    yield
    with torch.no_grad():
        tensor.copy_(before)


def weight(training):
    return training.core.first.weight


def moment(training):
    return training.optimizer.state[training.core.last.bias]["exp_avg_sq"]


def counter(training):
    return training.optimizer.state[training.core.last.bias]["step"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("find", "key"),
    [
        (weight, "model.first.weight"),
        (moment, "optim.state.last.bias.exp_avg_sq"),
        (counter, "optim.state.last.bias.step"),
    ],
)
def test_a_replica_that_differs_is_named_by_key_and_rank_and_nothing_is_published(tmp_path, find, key, dtype):
    root = tmp_path / "run"
    results = values(run_ranks(3, save_around_a_fault, root, functools.partial(perturbed, find), 2, dtype))

    assert_step_2_failed_alone(root, results)
    for second in (result["second"] for result in results):
        assert second.type == "SaveFailedError"
        assert failures(second) == [(2, "ack", "StateMismatchError")]
        assert key in second.text
        assert "on ranks (2,)" in second.text
        assert "; broadcast it, or Replicated(validate='off') if it may differ" in second.text
    found = {step: len([*tmp_path.rglob(f"manifests/order-*.step-{step:012d}.*")]) for step in (2, 3)}
    assert found == {2: 0, 3: 2}, "neither at the run root nor on the disk of the node"


# --- disks that fail ------------------------------------------------------------------------------


@contextlib.contextmanager
def small_file_limit(training, observers, root):
    """``write`` returns EFBIG in the middle of the shard."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_local_write_that_breaks_off_on_one_rank_leaves_no_shard_and_fails_the_save_on_all(tmp_path, victim):
    root = tmp_path / "run"
    results = values(run_ranks(2, save_around_a_fault, root, small_file_limit, victim))

    assert_step_2_failed_alone(root, results)
    for second in (result["second"] for result in results):
        assert second.type == "SaveFailedError"
        assert failures(second) == [(victim, "write", "OSError")]
        assert "File too large" in second.text


@contextlib.contextmanager
def folder_where_the_shard_belongs(training, observers, root):
    rank, made = dist.get_rank(), []

    def observe(event):
        if event.name == Point.SHARD_WRITTEN and event.step == 2:
            made.append(root / f"data/step-{event.step:012d}.{event.attempt}/rank-{rank:05d}.safetensors")
            made[0].mkdir(parents=True)

    observers.append(observe)
    yield
    observers.clear()
    made[0].rmdir()


@pytest.mark.parametrize("victim", [0, 1])
def test_an_upload_that_fails_on_one_rank_fails_the_save_on_all(tmp_path, victim):
    root = tmp_path / "run"
    results = values(run_ranks(2, save_around_a_fault, root, folder_where_the_shard_belongs, victim))

    assert_step_2_failed_alone(root, results)
    for second in (result["second"] for result in results):
        assert second.type == "SaveFailedError"
        assert [(rank, phase) for rank, phase, _ in failures(second)] == [(victim, "upload")]


def fail_to_commit(rank, world, root, breaking, mending):
    """Save step 1; step 2, for which the coordinator cannot write the manifest; step 3."""
    training = Training("ddp", rank)
    broken = []

    def on_event(event):
        if rank == 0 and event.step == 2 and event.name == Point.ACKED_REMOTE:
            broken.append(breaking(Path(root)))

    with checkpointer(root, training.state, on_event=on_event) as ckpt:
        first = attempt(ckpt, 1)
        second = attempt(ckpt, 2)
        dist.barrier()
        for what in broken:
            mending(Path(root), what)
        dist.barrier()
        return first, second, attempt(ckpt, 3)


def limit_files_to_10_bytes(root):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    return before


def lift_the_limit(root, before):
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_manifest_that_cannot_be_written_fails_the_save_on_all(tmp_path):
    root = tmp_path / "run"
    results = values(run_ranks(2, fail_to_commit, root, limit_files_to_10_bytes, lift_the_limit))

    for first, second, third in results:
        assert (first, third) == (None, None)
        assert second.type == "SaveFailedError"
        assert [(rank, phase) for rank, phase, _ in failures(second)] == [(0, "commit")]
    assert committed(root) == [1, 3]
    assert step_files(root, 2) == []


def put_a_file_over_the_manifests(root):
    (root / "manifests").rename(root / "moved")
    (root / "manifests").touch()


def put_the_manifests_back(root, _):
    (root / "manifests").unlink()
    (root / "moved").rename(root / "manifests")


def test_a_store_that_cannot_say_who_owns_the_root_makes_no_checkpoint(tmp_path):
    root = tmp_path / "run"
    results = values(run_ranks(2, fail_to_commit, root, put_a_file_over_the_manifests, put_the_manifests_back))

    for first, second, third in results:
        assert (first, third) == (None, None)
        assert second.type == "SaveFailedError"
        assert [(rank, phase) for rank, phase, _ in failures(second)] == [(0, "commit")]
    assert committed(root) == [1, 3]
    assert step_files(root, 2) == []


class Blind(PosixStore):
    """Takes the manifest of step 2, or only says so, and refuses to show it."""

    takes = True

    def create(self, key, data):
        return super().create(key, data) if self.takes or not self._is_it(key) else True

    def get(self, key, *, max_nbytes):
        if self._is_it(key):
            raise StoreAccessError("get", key, "not today")
        return super().get(key, max_nbytes=max_nbytes)

    def _is_it(self, key):
        return key.startswith("manifests/") and ".step-000000000002." in key


class Forgetful(Blind):
    takes = False


def save_on_a_blind_store(rank, world, root, kind):
    training = Training("ddp", rank)
    with checkpointer(root, training.state, store=kind(root)) as ckpt:
        return [attempt(ckpt, step) for step in (1, 2, 3)]


@pytest.mark.parametrize("kind", [Blind, Forgetful])
def test_a_store_that_cannot_say_whether_the_manifest_is_there_deletes_nothing(tmp_path, kind):
    root = tmp_path / "run"
    results = values(run_ranks(2, save_on_a_blind_store, root, kind))

    for first, second, third in results:
        assert (first, third) == (None, None)
        assert second.type == "CommitUnknownError"
        assert second["step"] == 2
    assert committed(root) == ([1, 2, 3] if kind.takes else [1, 3])
    assert len(step_files(root, 2)) == (3 if kind.takes else 2)


# --- ranks that die -------------------------------------------------------------------------------


def die_during_step_2(rank, world, root, victim, point):
    training = Training("plain", rank)
    on_event = die_at(point, step=2) if rank == victim else None
    ckpt = checkpointer(root, training.state, sync_timeout_s=IMPATIENT_S, on_event=on_event)
    attempt(ckpt, 1)
    return {"ckpt": ckpt, "second": attempt(ckpt, 2), "found": committed(root)}


def go_on_without_the_dead(rank, world, root, victim):
    said = die_during_step_2(rank, world, root, victim, Point.SHARD_WRITTEN)
    ckpt = said.pop("ckpt")
    ckpt.step(3)
    return said | {"third": attempt(ckpt, 3), "closing": raised_by(ckpt.close)}


def fail_during_step_2(rank, world, root, victim, point):
    said = die_during_step_2(rank, world, root, victim, point)
    del said["ckpt"]
    return said


def named(error):
    """Ranks that an error blames."""
    return set(error.attributes.get("missing", [])) | {f["rank"] for f in error.attributes.get("failures", [])}


@pytest.mark.parametrize(
    ("victim", "point"),
    [
        (0, Point.STAGED),
        (0, Point.SHARD_WRITTEN),
        (0, Point.UPLOADED),
        (2, Point.STAGED),
        (2, Point.PLAN_AGREED),
        (2, Point.ACKED_LOCAL),
        (2, Point.UPLOADED),
    ],
)
def test_a_killed_rank_leaves_the_previous_checkpoint_as_latest(tmp_path, victim, point):
    root = tmp_path / "run"
    outcomes = run_ranks(3, fail_during_step_2, root, victim, str(point))

    assert outcomes[victim].signal == signal.SIGKILL
    for result in values([outcome for outcome in outcomes if outcome.rank != victim]):
        assert "SaveError" in result["second"].family
        assert result["second"]["step"] == 2
        assert named(result["second"]) == {victim}, result["second"]
        assert result["found"] == [1]
    assert committed(root) == [1]
    assert dcpsvc.latest(root).step == 1


def test_ranks_whose_peer_died_fail_further_saves_by_name_and_can_close(tmp_path):
    root = tmp_path / "run"
    outcomes = run_ranks(3, go_on_without_the_dead, root, 1)

    assert outcomes[1].signal == signal.SIGKILL
    for result in values([outcomes[0], outcomes[2]]):
        assert named(result["second"]) == named(result["third"]) == {1}
        assert "SaveError" in result["closing"].family
    assert committed(root) == [1]


def resume_here(rank, world, root):
    training = Training("plain", rank)
    with checkpointer(root, training.state) as ckpt:
        return ckpt.resume()


def test_a_coordinator_killed_after_the_manifest_leaves_a_checkpoint_and_says_that_nobody_knows(tmp_path):
    root = tmp_path / "run"
    outcomes = run_ranks(3, fail_during_step_2, root, 0, str(Point.MANIFEST_CREATED))

    assert outcomes[0].signal == signal.SIGKILL
    for result in values(outcomes[1:]):
        assert result["second"].type == "CommitUnknownError"
        assert result["found"] == [1, 2]
    assert values(run_ranks(3, resume_here, root)) == [2, 2, 2]


# --- beside the training --------------------------------------------------------------------------


def train_in_a_tight_loop(rank, world, root, saves):
    training = Training("ddp", rank)
    wrong, loops, raised = 0, 0, []
    with checkpointer(root, training.state) as ckpt:
        for step in range(1, saves + 1):
            pending = ckpt.save(step)
            while not all_say(pending.committed.done()):
                wrong += sum_over_ranks(rank) != sum(range(1, world + 1))
                loops += 1
            raised.append(raised_by(pending.wait))
    return wrong, loops, raised


def all_say(word):
    said = torch.tensor([int(word)])
    dist.all_reduce(said, op=dist.ReduceOp.MIN)
    return bool(said)


def test_training_collectives_in_a_tight_loop_are_right_during_20_saves(tmp_path):
    root = tmp_path / "run"
    results = values(run_ranks(2, train_in_a_tight_loop, root, 20))

    for wrong, loops, raised in results:
        assert wrong == 0
        assert loops > 20
        assert raised == [None] * 20
    assert committed(root) == list(range(1, 21))


def save_from_two_nodes(rank, world, root, locals_):
    training = Training("fsdp", rank)
    node = int(os.environ["GROUP_RANK"])
    with checkpointer(root, training.state, local=locals_[node]) as ckpt:
        return int(os.environ["LOCAL_RANK"]), attempt(ckpt, 1), attempt(ckpt, 2)


def test_two_nodes_have_one_coordinator_and_write_each_path_once(tmp_path):
    root, locals_ = tmp_path / "run", [tmp_path / "node-0", tmp_path / "node-1"]
    results = values(run_ranks(4, save_from_two_nodes, root, locals_, nodes=2))

    assert results == [(0, None, None), (1, None, None), (0, None, None), (1, None, None)]
    shards = [f"rank-{rank:05d}.safetensors" for rank in range(4)]
    for step in (1, 2):
        assert [Path(name).name for name in step_files(root / "data", step)] == shards
        for node, local in enumerate(locals_):
            mine = [Path(name).name for name in step_files(local, step) if "/data/" in name]
            assert mine == shards[2 * node : 2 * node + 2]
            assert [name for name in step_files(local, step) if "/manifests/" in name]
    assert len(list((root / "manifests").glob("*.json"))) == 2
    assert files(root / "probes") == []
    assert {found.world_size for found in dcpsvc.list_checkpoints(root)} == {4}
    values(run_ranks(4, resume_here, root))


def die_before_the_constructor(rank, world, root):
    training = Training("plain", rank)
    if rank == 1:
        die()
    return raised_by(checkpointer, root, training.state, sync_timeout_s=IMPATIENT_S)


def test_a_rank_that_never_makes_its_checkpointer_is_named(tmp_path):
    outcomes = run_ranks(3, die_before_the_constructor, tmp_path / "run")

    for error in values([outcomes[0], outcomes[2]]):
        assert error.type == "RootError"
        assert "(1,)" in error.text

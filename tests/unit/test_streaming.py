"""R23: a shard that does not fit into memory a second time is written straight from the state, and is the same file."""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dcpsvc
from dcpsvc import Checkpointer, Point, copying
from dcpsvc.arena import Arena
from dcpsvc.errors import CommitUnknownError, SaveFailedError
from dcpsvc.format import digest, shardfile
from dcpsvc.format.digest import BLOCK_NBYTES
from dcpsvc.format.shardfile import Piece
from dcpsvc.outline import Outline
from dcpsvc.stages import shard
from dcpsvc.stages.stage import Gate, Snapshot
from dcpsvc.stages.stream import Stream, copy_elements
from dcpsvc.state.dtypes import name_of
from dcpsvc.state.saveplan import ShardPlan
from tests.unit.one_process import bits, resume, told

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dcpsvc.format.manifest import ShardRecord
    from dcpsvc.save import Save
    from dcpsvc.uploader import Uploader

COPIER = copying.thread()
MIB = 2**20
SECONDS = 20
"""Longer than anything here can take."""


# --- the same file, byte for byte -----------------------------------------------------------------


def every_kind(numel: int) -> dict[str, torch.Tensor]:
    """Every dtype, order of strides, and degenerate shape."""
    torch.manual_seed(0)
    wide = torch.randn(numel, 3)
    found = {f"plain.{name}": torch.randint(0, 2, (numel + 1,)).to(getattr(torch, name)) for name in DTYPES}
    return found | {
        "alone": torch.tensor(3.5, dtype=torch.float64),
        "alone.bf16": torch.tensor(3.5, dtype=torch.bfloat16),
        "nothing": torch.empty(0),
        "nothing.wide": torch.empty(4, 0, 2, dtype=torch.int64),
        "transposed": wide.t(),
        "column": wide[:, 1],
        "every.third": wide[::3],
        "permuted": torch.randn(5, numel, 2).permute(2, 1, 0),
        "narrow": torch.randn(3, numel, 2).narrow(1, 1, numel - 2),
        "expanded": torch.randn(1, 3).expand(numel, 3),
        "conjugate": torch.randn(numel, dtype=torch.complex64).conj(),
        "negative": torch.randn(numel, dtype=torch.complex64).conj().imag,
        "view": torch.randn(4 * numel)[numel : 2 * numel].view(numel),
        "twice": wide,
        "thrice": wide,
    }


DTYPES = ["bool", "uint8", "int8", "int16", "uint16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
DTYPES += ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "complex64"]
DOCUMENTS = {"sched": {"last_epoch": 7, "text": "ä" * 1000}, "rng@0": list(range(50))}


def outline(tensors: dict[str, torch.Tensor]) -> Outline:
    pieces = []
    for key, tensor in tensors.items():
        shape = tuple(tensor.shape)
        pieces.append(Piece(key, name_of(tensor.dtype, key), shape, (0,) * len(shape), shape))
    placement = shardfile.place(pieces)
    sources = [tensors[name] for name in placement.names]
    return Outline(placement, sources, DOCUMENTS, {"step": "7", "attempt": "1-cafecafe-0", "rank": "0"})


def written(path: Path, staged: Snapshot | Stream, placement: Any) -> ShardRecord:
    """Through DCP, as a save does it."""
    begun = begin(path, staged, placement)
    begun.open()
    return begun.record(SECONDS)


def begin(path: Path, staged: Snapshot | Stream, placement: Any) -> shard.DcpShard:
    key, plan = "data/step-000000000007.1-cafecafe-0/rank-00000.safetensors", ShardPlan(placement)
    writer = shard.ShardWriter(path, staged, plan, rank=0, key=key)
    return shard.begin(staged, stager=Gate(staged), plan=plan, writer=writer, process_group=None)


@pytest.mark.parametrize("window_mib", [1, 2, 16])
def test_a_streamed_shard_is_the_staged_one_to_the_last_byte(tmp_path: Path, window_mib: int) -> None:
    tensors = every_kind(60_001)
    copied, left = outline(tensors), outline(tensors)

    by_copy = written(tmp_path / "staged", Snapshot(copied, Arena(), COPIER), copied.placement)
    by_stream = written(tmp_path / "streamed", Stream(left, window_mib * MIB), left.placement)

    assert by_copy.nbytes > 8 * MIB
    assert by_stream == by_copy
    content = (tmp_path / "streamed").read_bytes()
    assert content == (tmp_path / "staged").read_bytes()
    assert digest.digest(content[by_stream.body_nbytes :]) == by_stream.digest


@given(numel=st.integers(3, 40), window=st.integers(1, 200).map(lambda eights: 8 * eights))
@settings(max_examples=60)
def test_wherever_a_window_ends_the_bytes_are_those_of_the_arena(numel: int, window: int) -> None:
    tensors = every_kind(numel)
    staged = Snapshot(outline(tensors), Arena(), COPIER)
    staged.stage()
    stream = Stream(outline(tensors), window)
    stream.stage()

    streamed = b"".join(bytes(part) for part in stream.parts(dict(stream.tensors).__getitem__))

    assert streamed == bytes(staged.image)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    """A tensor of whatever strides, and a range of its elements."""
    shape = draw(st.lists(st.integers(1, 5), max_size=5))
    order = draw(st.permutations(range(len(shape))))
    tensor = torch.arange(torch.Size(shape).numel()).view(shape).permute(order)
    for dim in range(tensor.dim()):
        tensor = tensor.narrow(dim, *draw(st.sampled_from([(0, tensor.shape[dim]), (tensor.shape[dim] - 1, 1)])))
    begin = draw(st.integers(0, tensor.numel() - 1))
    return tensor, begin, draw(st.integers(begin + 1, tensor.numel()))


@given(ranges())
def test_any_range_of_a_tensor_is_copied_as_if_it_were_contiguous(given: tuple[torch.Tensor, int, int]) -> None:
    source, begin, end = given
    flat = torch.zeros(end - begin, dtype=source.dtype)
    copy_elements(flat, source, begin)
    assert flat.tolist() == source.contiguous().view(-1)[begin:end].tolist()


def test_what_is_streamed_is_let_go_of_when_it_is_written(tmp_path: Path) -> None:
    left = outline({"w": torch.ones(10)})
    stream = Stream(left, MIB)
    written(tmp_path / "streamed", stream, left.placement)
    assert stream.tensors == {}


# --- the gate and the writer ----------------------------------------------------------------------


def test_a_gate_that_was_refused_stays_shut_and_one_that_was_opened_stays_open() -> None:
    for staged in (
        Snapshot(outline({"w": torch.ones(1)}), Arena(), COPIER),
        Stream(outline({"w": torch.ones(1)}), MIB),
    ):
        refused = Gate(staged)
        future = refused.stage({})
        refused.refuse(RuntimeError("no"))
        refused.open()
        assert str(future.exception()) == "no"
    opened = Gate(Snapshot(outline({"w": torch.ones(1)}), Arena(), COPIER))
    future = opened.stage({})
    opened.open()
    opened.refuse(RuntimeError("no"))
    assert len(future.result()) == 1


class Interrupted(Snapshot):
    """In the middle of it the save ends."""

    begun: shard.DcpShard

    def parts(self, resolve: Any) -> Any:
        for number, part in enumerate(super().parts(resolve)):
            if number == 1:
                self.begun.refuse(RuntimeError("the others failed"))
            yield part


@pytest.mark.parametrize("tidied", [False, True])
def test_a_shard_whose_save_ends_while_it_is_written_leaves_nothing(tmp_path: Path, tidied: bool) -> None:  # noqa: FBT001
    path = tmp_path / "data" / "rank-00000.safetensors"
    made = outline({"w": torch.ones(65 * MIB, dtype=torch.uint8)})
    staged = Interrupted(made, Arena(), COPIER)
    staged.begun = begin(path, staged, made.placement)
    if not tidied:
        path.parent.mkdir()
    staged.begun.open()
    with pytest.raises(BaseException, match="the save ended while its shard was being written"):
        staged.begun.record(SECONDS)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_is_whole_stays_when_its_save_ends(tmp_path: Path) -> None:
    made = outline({"w": torch.ones(5)})
    staged = Snapshot(made, Arena(), COPIER)
    begun = begin(tmp_path / "shard", staged, made.placement)
    begun.open()
    begun.record(SECONDS)
    begun.refuse(CommitUnknownError(7, "1-cafecafe-0", None, "nobody knows"))
    assert (tmp_path / "shard").exists()
    assert begun.record(SECONDS).body_nbytes == made.nbytes


def test_a_shard_is_never_written_over_another(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(b"somebody's")
    made = outline({"w": torch.ones(5)})
    with pytest.raises(BaseException, match="File exists"):
        written(tmp_path / "shard", Stream(made, MIB), made.placement)
    assert (tmp_path / "shard").read_bytes() == b"somebody's"


# --- a whole Checkpointer -------------------------------------------------------------------------


class Tied(nn.Module):
    """Two names for one tensor, each of its tensors larger than the smallest budget."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(1000, 700)
        self.body = nn.Linear(700, 700).bfloat16()
        self.head = nn.Linear(700, 1000, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(seed))


def state_of(seed: int) -> dict[str, Any]:
    model = Tied(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    columns = {"even": torch.arange(600_000).view(2, -1)[0], "turned": torch.randn(3, 5).t(), "none": torch.empty(0)}
    return {"model": model, "optim": optimizer, "values": {"seed": seed, "tensors": columns}}


def contents(state: dict[str, Any]) -> Any:
    return told([state["model"].state_dict(), state["optim"].state_dict(), state["values"]])


def tight(folder: Path, state: dict[str, Any], **options: Any) -> Checkpointer:
    return Checkpointer(folder / "root", state, local=folder / "local", staging_nbytes=1, save_last=False, **options)


@contextlib.contextmanager
def warnings_of(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    found: list[str] = []
    with caplog.at_level(logging.WARNING, "dcpsvc"):
        yield found
    found += [record.getMessage() for record in caplog.records if record.name == "dcpsvc"]


def test_a_job_without_memory_for_a_copy_saves_and_resumes_all_the_same(tmp_path: Path) -> None:
    state, other = state_of(1), state_of(2)
    with tight(tmp_path, state) as ckpt:
        ckpt.save(1).wait(SECONDS)

    assert resume(tmp_path, other) == 1
    assert contents(other) == contents(state)
    assert other["model"].head.weight is other["model"].embed.weight


def test_it_says_so_once_with_sizes_and_what_to_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with warnings_of(caplog) as said, tight(tmp_path, state_of(1)) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step).wait(SECONDS)

    (warning,) = said
    assert "rank 0: its shard of 1" in warning  # ten and some MiB
    assert "0.0 MiB of memory there is for staging" in warning
    assert "through a window of 1.0 MiB" in warning
    assert "raise staging_nbytes=" in warning


def test_nothing_is_said_where_memory_suffices(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with warnings_of(caplog) as said, Checkpointer(tmp_path / "root", state_of(1), local=tmp_path / "local") as ckpt:
        ckpt.save(1).wait(SECONDS)
    assert said == []


def test_what_training_does_right_after_save_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    model = nn.Linear(3000, 3000)
    with tight(tmp_path, {"model": model}) as ckpt:
        before = bits(model.weight)
        pending = ckpt.save(1)
        with torch.no_grad():
            model.weight.fill_(-1.0)
        assert pending.staged.done()
        pending.wait(SECONDS)

    other = nn.Linear(3000, 3000)
    resume(tmp_path, {"model": other})
    assert bits(other.weight) == before


def test_a_shard_that_grows_beyond_the_memory_there_is_streams_from_then_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state: dict[str, Any] = {"history": torch.ones(10)}
    with (
        warnings_of(caplog) as said,
        Checkpointer(tmp_path / "root", state, local=tmp_path / "local", staging_nbytes=2 * MIB) as ckpt,
    ):
        ckpt.save(1).wait(SECONDS)
        assert not caplog.records
        state["history"] = torch.ones(MIB)
        ckpt.save(2).wait(SECONDS)
        state["history"] = torch.ones(20)
        ckpt.save(3).wait(SECONDS)

    assert len(said) == 1
    for step, numel in ((1, 10), (2, MIB), (3, 20)):
        found: dict[str, Any] = {"history": torch.zeros(numel)}
        assert resume(tmp_path, found, step=step) == step
        assert found["history"].eq(1).all()


def test_the_blocked_time_of_a_streamed_save_includes_the_writing(tmp_path: Path) -> None:
    with tight(tmp_path, state_of(1)) as ckpt:
        pending = ckpt.save(1)
        assert pending.timings.write_s > 0
        assert pending.timings.blocked_s > pending.timings.write_s


class Hasty:
    """An uploader whose caller is interrupted as soon as it has taken a save over."""

    def __init__(self, real: Uploader) -> None:
        self._real = real

    def accept(self, save: Save) -> None:
        self._real.accept(save)
        if save.key.step == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("early", [False, True], ids=["while it waits", "before it waits"])
def test_an_interrupt_while_a_shard_streams_publishes_nothing_and_the_next_save_is_whole(
    tmp_path: Path,
    early: bool,  # noqa: FBT001
) -> None:
    """It comes when the ranks have agreed, before the first byte; the state changes, then the save goes on."""
    state = {"model": nn.Linear(1000, 1000)}
    main, gone_on = threading.main_thread(), threading.Event()

    def on_event(event: dcpsvc.Event) -> None:
        if event.name == Point.PLAN_AGREED and event.step == 2:
            if not early:
                assert main.ident is not None
                signal.pthread_kill(main.ident, signal.SIGINT)
            gone_on.wait(SECONDS)

    with tight(tmp_path, state, on_event=on_event) as ckpt:
        if early:
            ckpt._saves._uploader = Hasty(ckpt._uploader)  # type: ignore[assignment]
        ckpt.save(1).wait(SECONDS)
        with pytest.raises(KeyboardInterrupt):
            ckpt.save(2)
        with torch.no_grad():
            state["model"].weight.zero_()
        gone_on.set()
        ckpt.wait(SECONDS)
        assert ckpt.statistics().failed == 1
        assert list((tmp_path / "local").rglob("*000002*")) == []
        ckpt.save(3).wait(SECONDS)

    assert [c.step for c in dcpsvc.list_checkpoints(tmp_path / "root") if c.state == "committed"] == [1, 3]


def test_a_state_that_cannot_be_saved_is_refused_at_once_without_memory_too(tmp_path: Path) -> None:
    state: dict[str, Any] = {"x": torch.ones(5)}
    with tight(tmp_path, state) as ckpt:
        state["x"] = torch.ones(5).to_sparse()
        with pytest.raises(dcpsvc.errors.StateError):
            ckpt.save(1)
        state["x"] = torch.ones(5)
        with contextlib.suppress(SaveFailedError):
            ckpt.wait(SECONDS)
        ckpt.save(2).wait(SECONDS)


def test_the_size_of_a_save_is_known_before_it_is_made(tmp_path: Path) -> None:
    state = state_of(1)
    with tight(tmp_path, state) as ckpt:
        predicted = ckpt._saves._saver.predicted()
        pending = ckpt.save(1)
        pending.wait(SECONDS)
    assert predicted is not None
    values_nbytes = sum(tensor.nbytes for tensor in state["values"]["tensors"].values())
    assert 0 <= pending.timings.shard_nbytes - predicted.shard_nbytes - values_nbytes < BLOCK_NBYTES / 8


def test_a_state_that_cannot_be_read_yet_has_no_size_yet(tmp_path: Path) -> None:
    with tight(tmp_path, {"model": nn.Linear(2, 2, device="meta")}) as ckpt:
        assert ckpt._saves._saver.predicted() is None


# --- peak memory, in a process of its own ---------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
import torch, dcpsvc
model = torch.nn.Linear(8192, 8192, bias=False)  # 256 MiB
budget = int(sys.argv[2]) or None
with dcpsvc.Checkpointer(Path(sys.argv[1], "root"), {"model": model, "turned": model.weight.detach()[:64].t()},
                         local=Path(sys.argv[1], "local"), staging_nbytes=budget, save_last=False) as ckpt:
    def status(name):
        return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(name))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = status("VmRSS")
    ckpt.save(1).wait()
    print(status("VmHWM") - before)
"""


@pytest.mark.parametrize(("budget", "low", "high"), [(0, 256 * MIB, 400 * MIB), (4 * MIB, 0, 100 * MIB)])
def test_a_streamed_save_needs_no_more_memory_than_its_window_and_reading_back(
    tmp_path: Path, budget: int, low: int, high: int
) -> None:
    """The first case shows that the measure sees an arena."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), str(budget)],
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert low <= int(done.stdout) < high

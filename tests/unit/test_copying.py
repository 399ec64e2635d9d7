"""Copying beside the training: every byte once, owners let go as soon as theirs is done, nothing torn goes through."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dcpsvc import copying
from dcpsvc.copying import BATCH_NBYTES, Copying
from dcpsvc.errors import TornSnapshotError
from dcpsvc.witness import Extent, Watch, flat

if TYPE_CHECKING:
    from collections.abc import Callable

COPIER = ThreadPoolExecutor(4)
SECONDS = 30
ADAM, OTHER = 1, 2


class Step:
    """A task that does what it is told, when it is told."""

    def __init__(self, owner: int | None, begin: int | None = 0, work: Callable[[], Any] = lambda: None) -> None:
        self.owner, self.begin, self._work = owner, begin, work
        self.free, self.begun, self.done = threading.Event(), threading.Event(), threading.Event()
        self.free.set()

    def run(self) -> None:
        self.begun.set()
        assert self.free.wait(SECONDS)
        self._work()
        self.done.set()

    def check(self) -> None:
        pass

    def held(self) -> Step:
        self.free.clear()
        return self


def extent(key: str, source: torch.Tensor, origin: torch.Tensor | None = None) -> Extent:
    bytes_ = flat(source.detach())
    return Extent(key, source if origin is None else origin, bytes_, torch.zeros_like(bytes_))


def batches_of(*extents: Extent, watch: Watch = Watch.CLOSELY) -> list[copying.Batch]:
    return list(copying.batches(((0, ADAM, each) for each in extents), watch))


def copied(batches: list[copying.Batch]) -> Copying:
    found = Copying(batches, lambda: None)
    found.start(COPIER)
    found.wait()
    return found


# --- batches ----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 70), st.sampled_from([None, ADAM, OTHER])), max_size=12))
def test_every_byte_is_in_one_batch_of_one_owner_and_no_batch_is_long(sizes: list[tuple[int, int | None]]) -> None:
    mib = torch.zeros(70 << 20, dtype=torch.uint8)
    made, begin = [], 0
    for number, (size, owner) in enumerate(sizes):
        part = mib[: size << 20]
        made.append((begin, owner, Extent(str(number), part, part, part)))
        begin += size << 20
    found = list(copying.batches(made, Watch.NOT))
    assert all(sum(part.source.numel() for part in batch._extents) <= BATCH_NBYTES for batch in found)
    total = [0] * len(sizes)
    for batch in found:
        for part in batch._extents:
            assert sizes[int(part.key)][1] == batch.owner
            total[int(part.key)] += part.source.numel()
        first = batch._extents[0]
        offset = first.source.data_ptr() - mib.data_ptr()
        assert batch.begin == sum(size << 20 for size, _ in sizes[: int(first.key)]) + offset
    assert total == [size << 20 for size, _ in sizes]


def test_what_is_copied_is_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "BATCH_NBYTES", 1 << 16)
    sources = [torch.randn(50_000), torch.arange(30_000), torch.randn(70_001).bfloat16()]
    extents = [extent(str(number), source) for number, source in enumerate(sources)]
    batches = batches_of(*extents)
    assert len(batches) > len(extents)
    copied(batches)
    assert all(torch.equal(flat(source), each.target) for source, each in zip(sources, extents, strict=True))


# --- who waits for what -----------------------------------------------------------------------------


def test_an_owner_waits_for_its_own_and_for_nothing_else() -> None:
    other, mine = Step(OTHER).held(), Step(ADAM)
    under_way = Copying([other, mine], lambda: None)
    under_way.start(COPIER)
    assert other.begun.wait(SECONDS)
    under_way.release(ADAM)  # this thread does it: the other one is busy
    assert mine.done.is_set()
    assert not other.done.is_set()
    assert not under_way.ended
    other.free.set()
    under_way.wait()
    assert under_way.ended


def test_what_nobody_guards_comes_first() -> None:
    order: list[str] = []
    steps = [Step(ADAM, work=lambda: order.append("adam")), Step(None, work=lambda: order.append("nobody"))]
    copied(steps)  # type: ignore[arg-type]
    assert order == ["nobody", "adam"]


def test_an_owner_waits_for_what_another_thread_is_at() -> None:
    mine = Step(ADAM).held()
    under_way = Copying([mine], lambda: None)
    under_way.start(COPIER)
    assert mine.begun.wait(SECONDS)
    step = threading.Thread(target=under_way.release, args=(ADAM,))
    step.start()
    step.join(0.3)
    assert step.is_alive()
    mine.free.set()
    step.join(SECONDS)
    assert not step.is_alive()


def test_a_writer_gets_the_first_bytes_before_the_last_are_there() -> None:
    first, last = Step(ADAM, begin=0), Step(ADAM, begin=100).held()
    under_way = Copying([first, last], lambda: None)
    under_way.start(COPIER)
    under_way.wait_below(100)
    assert not last.done.is_set()
    last.free.set()
    under_way.wait_below(101)
    assert last.done.is_set()


def test_the_end_is_told_once_and_at_once_where_nothing_is_to_be_done() -> None:
    ends: list[int] = []
    copying.Copying([], lambda: ends.append(0)).start(COPIER)
    assert ends == [0]
    told = threading.Event()
    under_way = Copying([Step(None), Step(ADAM)], told.set)
    under_way.start(COPIER)
    assert told.wait(SECONDS)


# --- what goes wrong --------------------------------------------------------------------------------


def test_an_error_ends_all_of_it_and_every_wait_says_it_but_training_goes_on() -> None:
    def fail() -> None:
        raise OSError("broken")

    never = threading.Event()
    under_way = Copying([Step(ADAM, work=fail), Step(OTHER, begin=100)], never.set)
    under_way.release(ADAM)
    for wait in (lambda: under_way.wait_below(101), under_way.wait):
        with pytest.raises(OSError, match="broken"):
            wait()
    under_way.release(OTHER)
    assert under_way.ended
    assert not never.is_set()


def test_a_ctrl_c_while_an_optimizer_helps_is_not_swallowed() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    under_way = Copying([Step(ADAM, work=interrupted)], lambda: None)
    with pytest.raises(KeyboardInterrupt):
        under_way.release(ADAM)
    assert under_way.ended
    with pytest.raises(KeyboardInterrupt):
        under_way.wait()


def test_what_is_called_off_ends_when_the_running_part_does() -> None:
    running, waiting = Step(ADAM).held(), Step(ADAM)
    under_way = Copying([running, waiting], lambda: None)
    under_way.start(COPIER)
    assert running.begun.wait(SECONDS)
    under_way.call_off()
    under_way.release(ADAM)
    assert not under_way.ended
    running.free.set()
    with pytest.raises(InterruptedError):
        under_way.wait()
    assert running.done.wait(SECONDS)
    assert not waiting.begun.is_set()


def test_a_copy_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "PATIENCE_S", 0.1)
    stuck = Step(ADAM).held()
    under_way = Copying([stuck], lambda: None)
    under_way.start(COPIER)
    assert stuck.begun.wait(SECONDS)
    under_way.release(ADAM)
    assert isinstance(under_way.error, TimeoutError)
    assert not under_way.ended  # the arena is not to be used again
    stuck.free.set()


# --- nothing torn goes through ----------------------------------------------------------------------

N = 200_000


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(0.9)


def behind_the_counter(weight: nn.Parameter) -> None:
    weight.data.mul_(0.9)


def its_exponents(weight: nn.Parameter) -> None:
    weight.data.mul_(0.5)


def one_element(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight[N - 7] += 1.0


def by_a_fused_optimizer(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], fused=True).step()


def by_hand(weight: nn.Parameter) -> None:
    weight.detach().numpy()[:] *= 0.9


@pytest.mark.parametrize(
    "change", [in_place, behind_the_counter, its_exponents, one_element, by_a_fused_optimizer, by_hand]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_change_before_the_copy_is_seen(change: Callable[[nn.Parameter], None], dtype: torch.dtype) -> None:
    if change is by_hand and dtype is torch.bfloat16:
        pytest.skip("NumPy has no bfloat16")
    weight = nn.Parameter(torch.randn(N).to(dtype))
    batches = batches_of(extent("w", weight.detach(), weight))
    change(weight)
    with pytest.raises(TornSnapshotError, match="by something other than its optimizer"):
        copied(batches)


def test_what_an_owner_does_once_it_was_let_go_is_its_own_affair() -> None:
    weight = nn.Parameter(torch.randn(N))
    under_way = Copying(batches_of(extent("w", weight.detach(), weight)), lambda: None)
    under_way.start(COPIER)
    under_way.release(ADAM)
    in_place(weight)
    under_way.wait()


def test_nan_and_nothing_changed_is_not_torn() -> None:
    weight = nn.Parameter(torch.full((N,), float("nan")))
    copied(batches_of(extent("w", weight.detach(), weight)))


def one_byte_behind_the_counter(weight: nn.Parameter) -> None:
    flat(weight.data)[4 * N - 5] ^= 1


def test_one_byte_behind_the_counter_is_seen_only_by_who_looks_at_every_byte() -> None:
    weight = nn.Parameter(torch.randn(N))
    batches = batches_of(extent("w", weight.detach(), weight))
    one_byte_behind_the_counter(weight)
    copied(batches)
    thorough = batches_of(extent("w", weight.detach(), weight), watch=Watch.EVERY_BYTE)
    one_byte_behind_the_counter(weight)
    with pytest.raises(TornSnapshotError):
        copied(thorough)
    copied(batches_of(extent("w", weight.detach(), weight), watch=Watch.EVERY_BYTE))

"""What the runs of the demo prove: pure functions of their stories and of what the run root lists."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

from dcpsvc.demo.screen import Row

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from dcpsvc.demo.journal import Story


class Listed(Protocol):
    """What the demo reads of a ``dcpsvc.list_checkpoints`` entry."""

    @property
    def step(self) -> int: ...  # noqa: D102
    @property
    def attempt(self) -> str: ...  # noqa: D102
    @property
    def nbytes(self) -> int: ...  # noqa: D102
    @property
    def state(self) -> str: ...  # noqa: D102


class Difference(NamedTuple):
    """The first step whose loss is not the same, to the last bit, in two runs."""

    step: int
    run: str
    loss_hex: str | None
    reference_hex: str | None

    def __str__(self) -> str:
        return (
            f"step {self.step} differs: loss {_number(self.loss_hex)} in the {self.run} run, "
            f"{_number(self.reference_hex)} in the reference run"
        )


def compare(reference: Story, runs: Mapping[str, Story], steps: int) -> tuple[int, Difference | None]:
    """Count the steps whose loss is the same in the reference and in every run that computed it, and at least one did.

    The losses are compared as hex text, which shows every bit.
    """
    differences = [_difference(step, reference, runs) for step in range(1, steps + 1)]
    return differences.count(None), next((d for d in differences if d is not None), None)


def _difference(step: int, reference: Story, runs: Mapping[str, Story]) -> Difference | None:
    expected = reference.losses.get(step)
    found = {name: story.losses[step] for name, story in runs.items() if step in story.losses}
    if not found:
        return Difference(step, " and the ".join(runs), None, expected)
    return next((Difference(step, name, loss, expected) for name, loss in found.items() if loss != expected), None)


def _number(loss_hex: str | None) -> str:
    return "missing" if loss_hex is None else f"{float.fromhex(loss_hex)!r} ({loss_hex})"


def rows(stories: Iterable[Story], listed: Sequence[Listed]) -> list[Row]:
    """One row an attempt, in the order of the saves: timings from the runs, the state from the run root."""
    found: dict[tuple[int, str], Row] = {}
    for story in stories:
        for save in story.saves:
            row = Row(**{key: value for key, value in save.items() if key != "kind"})
            gone = row.state == "committed"  # unless the root still has it
            found[row.step, row.attempt] = replace(row, state="deleted") if gone else row
        if story.killed:
            key = story.killed.step, story.killed_attempt
            found[key] = Row(step=story.killed.step, attempt=story.killed_attempt, state="killed")
    for entry in listed:
        key = entry.step, entry.attempt
        before = found.get(key, Row(step=entry.step, attempt=entry.attempt, state=entry.state))
        found[key] = replace(before, state=entry.state, nbytes=entry.nbytes)
    return sorted(found.values(), key=lambda row: row.step)

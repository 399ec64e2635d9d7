"""Plays many seeds and judges them: ``python -m tests.model.simulate --seeds 100000 --jobs 2``.

A seed that breaks an invariant is printed with the command that plays it again, with its trace; the exit status is 1.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dcpsvc.events import Point
from tests.model.states import Distinct
from tests.model.world import Report, play, silence

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK = 200
_SPEAK_S = 10.0
_SHOWN_FAILURES = 10


@dataclass(slots=True)
class Sum:
    """What many histories came to."""

    schedules: int = 0
    cpu_s: float = 0.0
    events: int = 0
    simulated_s: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter[str])
    faults: Counter[str] = field(default_factory=Counter[str])
    crashes: Counter[str] = field(default_factory=Counter[str])
    visits: set[str] = field(default_factory=set[str])
    distinct: Distinct = field(default_factory=Distinct)
    failures: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])

    def add(self, report: Report) -> None:
        """One more history."""
        self.schedules += 1
        self.events += report.events
        self.simulated_s += report.seconds
        self.outcomes += report.outcomes
        self.faults += report.faults
        self.crashes += report.crashes
        self.visits |= report.visits
        if report.error:
            self.failures.append((report.seed, report.error))

    def merge(self, other: Sum) -> None:
        """What another process has played."""
        self.schedules += other.schedules
        self.cpu_s += other.cpu_s
        self.events += other.events
        self.simulated_s += other.simulated_s
        self.outcomes += other.outcomes
        self.faults += other.faults
        self.crashes += other.crashes
        self.visits |= other.visits
        self.distinct.merge(other.distinct)
        self.failures += other.failures


def play_many(seeds: range) -> Sum:
    """In this process."""
    found = Sum()
    began = time.process_time()
    gc.collect()
    gc.disable()  # a history leaves few cycles, and looking for them costs more than they do
    try:
        with silence():
            for seed in seeds:
                found.add(play(seed, found.distinct))
    finally:
        gc.enable()
    found.cpu_s = time.process_time() - began
    return found


def main() -> int:
    """The command."""
    options = _parser().parse_args()
    if options.seed is not None:
        return _replay(options.seed, trace=options.trace)
    began = time.perf_counter()
    total = Sum()
    for part in _parts(options):
        total.merge(part)
        if len(total.failures) > _SHOWN_FAILURES:
            break
    _print(total, time.perf_counter() - began, options)
    return 1 if total.failures else 0


def _parts(options: argparse.Namespace) -> Iterator[Sum]:
    """Results as they come, from one process or several; says now and then how far it is."""
    ends = time.perf_counter() + (options.seconds or float("inf"))
    last = options.first + options.seeds
    chunks = (range(begin, min(begin + _CHUNK, last)) for begin in range(options.first, last, _CHUNK))
    voice = _Voice(options.seeds)
    if options.jobs == 1:
        for chunk in chunks:
            if time.perf_counter() >= ends:
                return
            yield voice.said(play_many(chunk))
        return
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running: set[Future[Sum]] = set()
        try:
            while True:
                while len(running) < 2 * options.jobs and time.perf_counter() < ends and (chunk := next(chunks, None)):
                    running.add(pool.submit(play_many, chunk))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield voice.said(future.result())
        finally:
            pool.shutdown(cancel_futures=True)


class _Voice:
    """Progress, now and then."""

    def __init__(self, seeds: int) -> None:
        self._seeds, self._played, self._failed = seeds, 0, 0
        self._began = self._spoke = time.perf_counter()

    def said(self, part: Sum) -> Sum:
        self._played += part.schedules
        self._failed += len(part.failures)
        now = time.perf_counter()
        if now - self._spoke >= _SPEAK_S:
            self._spoke = now
            rate = self._played / (now - self._began)
            print(f"{self._played} of {self._seeds} schedules, {rate:.0f}/s, {self._failed} failed", flush=True)
        return part


def _replay(seed: int, *, trace: bool) -> int:
    with silence():
        report, again = play(seed, tracing=trace), play(seed)
    for line in report.trace:
        print(line)
    print(f"seed {seed}: {report.error or 'all invariants hold'}")
    print(f"history {report.fingerprint:016x}, and played again {again.fingerprint:016x}")
    return 1 if report.error or report.fingerprint != again.fingerprint else 0


def _print(total: Sum, seconds: float, options: argparse.Namespace) -> None:
    about = "about " if total.distinct.mask else ""
    rate = total.schedules / seconds
    print(
        f"\n{total.schedules} schedules in {seconds:.0f} s on {options.jobs} process(es): {rate:.0f} schedules/s "
        f"({total.schedules / total.cpu_s:.0f} per second of CPU, {total.events / total.cpu_s:,.0f} events), "
        f"{total.simulated_s / 3600:.1f} h of simulated time"
    )
    print(f"distinct states visited: {about}{total.distinct.count():,}")
    _print_crash_points(total, everything=options.coverage)
    _print_counter(f"faults: {sum(total.faults.values()):,} of {len(total.faults)} kinds", total.faults)
    _print_counter("outcomes", total.outcomes)
    for seed, error in sorted(total.failures)[:_SHOWN_FAILURES]:
        print(f"\nFAILED seed {seed}: {error}")
        print(f"  replay: python -m tests.model.simulate --seed {seed} --trace")
    print(f"\n{'FAILED' if total.failures else 'every invariant held'}")


def _print_crash_points(total: Sum, *, everything: bool) -> None:
    """A crash point is a switch point or a labelled point of a checkpoint's life, for each role."""
    crashed: Counter[str] = Counter()
    for label, count in total.crashes.items():
        crashed[label[: label.rindex(")") + 1]] += count
    missing = sorted(total.visits - crashed.keys())
    covered = len(total.visits) - len(missing)
    print(f"crash points covered: {covered} of {len(total.visits)} (label x role), {sum(crashed.values()):,} crashes")
    labelled = {
        f"point {point} ({role})"
        for point in Point
        if point is not Point.TRAINING_WAITED
        for role in ("coordinator", "other")
    }
    unseen = sorted(labelled - crashed.keys())
    print(f"  of the {len(labelled)} labelled points of a life x role: {len(labelled) - len(unseen)}")
    for title, labels in (("never reached", sorted(labelled - total.visits)), ("reached, never crashed at", missing)):
        if labels:
            print(f"  {title}: {', '.join(labels)}")
    if everything:
        for label, count in sorted(total.crashes.items()):
            print(f"  {count:8,} {label}")


def _print_counter(title: str, counter: Counter[str]) -> None:
    print(f"{title}:")
    for name, count in sorted(counter.items()):
        print(f"  {count:10,} {name}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="how many schedules")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seconds", type=float, default=0.0, help="begin nothing after so long")
    parser.add_argument("--coverage", action="store_true", help="every crash point with its count")
    parser.add_argument("--seed", type=int, help="play this one only")
    parser.add_argument("--trace", action="store_true", help="with --seed: every event")
    return parser


if __name__ == "__main__":
    sys.exit(main())

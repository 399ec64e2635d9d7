"""Systems side by side: round by round in one run, so that what disturbs one disturbs all."""

import dataclasses
import re
import signal
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.common import size
from benchmarks.common.crew import Crew, CrewError
from benchmarks.common.limits import Limits
from benchmarks.peers import OURS, SYSTEMS, install

_BASE_MIB = 400  # python, torch and gloo in each rank
_USABLE = 0.85


@dataclasses.dataclass(frozen=True)
class Setting:
    """How the state is shared.

    Attributes:
        kind: ``fsdp2`` (each rank holds a part) or ``ddp`` (each holds all of it).
        ranks: How many.
        threads: Each trains on; 0 for its share of the cores.
    """

    kind: str
    ranks: int
    threads: int = 0

    @classmethod
    def parse(cls, text):
        """``fsdp2x1``, or ``fsdp2x1t1``: it leaves the other cores to the save."""
        found = re.fullmatch(r"(fsdp2|ddp)x([1-9]\d*)(?:t([1-9]\d*))?", text)
        if not found:
            raise ValueError(f"{text!r}: use fsdp2x1, fsdp2x2, ddpx2, fsdp2x1t1, ...")
        return cls(found[1], int(found[2]), int(found[3] or 0))

    def __str__(self):
        return f"{self.kind} x {self.ranks}" + (f", {self.threads} thread each" if self.threads else "")


def measure(options, setting, exercises, *, fresh=False, after=None):
    """Run every exercise with every system, ``options.rounds`` times after a first one that is kept apart.

    Args:
        options: See :mod:`benchmarks.common.options`.
        setting: One of ``options.settings``.
        exercises: Names to further arguments.
        fresh: New processes for each round; then there is no first round.
        after: Called with a new crew when the rounds are over; what it returns joins the row.

    Returns:
        Rows, one a system: ``rounds`` as measured and their medians, those of the first round as ``first_*``, ``torn``,
        and ``limits`` and ``ours`` of the same rounds, for ratios; or why the system was skipped.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # through every `finally`: processes, files
    rows = []
    for names in _batches(options, setting):
        batch = _Batch(options, setting, names)
        rows += batch.run(exercises, fresh=fresh, after=after)
        if batch.stopped:
            options.stopped = True
            say("stopped: this is what was measured until then")
            break
    return [row for row in rows if row["system"] != OURS or row is next(r for r in rows if r["system"] == OURS)]


class _Batch:
    """Systems that fit into memory together. Ours is one of them, so that every ratio is within one batch."""

    def __init__(self, options, setting, names):
        self._options, self._setting = options, setting
        self._rows = {name: {"system": name, "label": SYSTEMS[name].label, "rounds": []} for name in names}
        self._limits = []
        self.stopped = False

    def run(self, exercises, *, fresh, after):
        with tempfile.TemporaryDirectory(prefix="dcpsvc-bench-", dir=self._options.dir) as directory:
            limits = Limits(size.nbytes(self._options.mib) // self._setting.ranks, self._setting.ranks, directory)
            crews = {}
            try:
                if not fresh:
                    self._start(crews, self._rows, directory)
                for number in range(self._options.rounds + (not fresh)):
                    self._limits.append(limits.measure())
                    self._round(crews, number, exercises, directory if fresh else None)
                self._finish(crews, after, directory)
            except (KeyboardInterrupt, SystemExit):
                self.stopped = True
            finally:
                for crew in crews.values():
                    crew.end()
        return self._summary(skip_first=not fresh)

    def _start(self, crews, names, directory):
        for name in names:
            entry = SYSTEMS[name]
            if self._setting.kind not in entry.kinds:
                self._rows[name]["skipped"] = f"it does not save {self._setting.kind} states"
            elif entry.python is None:
                self._rows[name]["skipped"] = install.reason(entry.environment)
            else:
                self._try(crews, name, lambda entry=entry: Crew(entry, self._setting, self._options.mib, directory))
                if name in crews:
                    self._guarded(crews, name, lambda crew: crew.ready())

    def _round(self, crews, number, exercises, directory):
        names = [*self._rows]
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:  # nobody always comes after the same one
            if directory is not None:
                self._start(crews, [name], directory)
            if name in crews:
                say(f"{self._setting}: round {number}, {name}")
                self._guarded(crews, name, lambda crew, name=name: self._exercise(crew, name, exercises))
            if directory is not None and name in crews:
                crews.pop(name).end()

    def _exercise(self, crew, name, exercises):
        found = {}
        for exercise, told in exercises.items():
            found |= crew.do(exercise, **told)
        self._rows[name]["rounds"].append(found)
        self._rows[name]["nbytes"] = crew.nbytes

    def _finish(self, crews, after, directory):
        """In new processes: what the rounds before have left behind, reading everything back, is no cost of a save."""
        for name in [*crews] if after else []:
            crews.pop(name).end()
            self._start(crews, [name], directory)
            if name in crews:
                self._guarded(crews, name, lambda crew, name=name: self._rows[name].update(after(crew)))

    def _try(self, crews, name, make):
        try:
            crews[name] = make()
        except (CrewError, OSError) as err:
            self._skip(name, err)

    def _guarded(self, crews, name, work):
        try:
            work(crews[name])
        except (CrewError, OSError) as err:
            crews.pop(name).kill()
            self._skip(name, err)

    def _skip(self, name, err):
        self._rows[name]["skipped"] = str(err).splitlines()[0]
        say(f"{name}: {err}")

    def _summary(self, *, skip_first):
        limits = medians(self._limits)
        for row in self._rows.values():
            if self.stopped and len(row["rounds"]) <= skip_first:
                row.setdefault("skipped", "stopped before it was measured")
            first, later = row["rounds"][: int(skip_first)], row["rounds"][int(skip_first) :]
            row.update({f"first_{name}": value for found in first for name, value in found.items()})
            row.update(medians(later))
            row["torn"] = sum(found.get("torn", 0) for found in row["rounds"])
        ours = {name: value for name, value in self._rows.get(OURS, {}).items() if name != "rounds"}
        return [row | {"limits": limits, "ours": ours} for row in self._rows.values()]


def medians(rounds):
    """Of each number over the rounds; of lists, element by element."""
    found = {}
    for name in rounds[0] if rounds else ():
        values = [one[name] for one in rounds]
        if isinstance(values[0], list):
            found[name] = [statistics.median(each) for each in zip(*values, strict=True)]
        else:
            found[name] = statistics.median(values)
    return found


def say(text):
    """Progress, beside the result."""
    print(text, file=sys.stderr, flush=True)


def _batches(options, setting):
    """Ours first in each, then as many others as fit into memory beside it."""
    room = _available_mib() * _USABLE - 2 * options.mib  # the limits have their own
    need = {name: _need_mib(SYSTEMS[name], setting, options.mib) for name in options.systems}
    anchor = [OURS] if OURS in options.systems else []
    batches, free = [], 0
    for name in options.systems:
        if name in anchor:
            continue
        if not batches or need[name] > free:
            batches.append([*anchor])
            free = room - sum(need[one] for one in anchor)
        batches[-1].append(name)
        free -= need[name]
    return batches or [anchor]


def _need_mib(entry, setting, mib):
    held = mib * 4 / 3 * (setting.ranks if setting.kind == "ddp" else 1)  # the gradients too
    copies = entry.memory * mib * (setting.ranks if setting.kind == "ddp" and not entry.divides else 1)
    return held + copies + _BASE_MIB * setting.ranks


def _available_mib():
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1024

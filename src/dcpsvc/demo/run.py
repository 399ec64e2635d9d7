"""``dcpsvc demo``: kill a training job in the middle of a save, start it again, compare every loss bit for bit."""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

import dcpsvc
from dcpsvc.demo.journal import Kill
from dcpsvc.demo.launch import Finished, Job, JobTimeoutError, run_job
from dcpsvc.demo.screen import Live, Plain, Row, Screen, Silent
from dcpsvc.demo.verdict import Difference, Listed, compare, rows
from dcpsvc.errors import DcpsvcError, RootError, UnsupportedFormatError

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from dcpsvc.demo.journal import Story

KILL_PHASE = "shard-written"
"""The victim's own shard is on its disk, and nobody else knows it yet."""

OTHER_DROPOUT = 0.2


class DemoError(Exception):
    """The demo did not show what it promises."""


@dataclass(kw_only=True)
class Outcome:
    """What the demo found; ``--json`` prints exactly these fields."""

    ok: bool = False
    error: str | None = None
    parallel: str
    ranks: int
    steps: int
    identical: int = 0
    """Steps whose loss is the same, to the last bit, in every run that computed it."""
    first_difference: Difference | None = None
    killed: Kill | None = None
    resumed_from: int | None = None
    newest: int | None = None
    """Step of the newest commit at the end."""
    checkpoints: list[Row] = field(default_factory=list[Row])
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    """Wall time of every run."""
    root: str
    directory: str

    def document(self) -> str:
        """All of it as one JSON document."""
        named = {name: value and value._asdict() for name, value in self._named().items()}
        return json.dumps(asdict(self) | named, indent=2)

    def _named(self) -> dict[str, Difference | Kill | None]:
        return {"first_difference": self.first_difference, "killed": self.killed}


def run_demo(
    *,
    root: str | None = None,
    parallel: str = "fsdp",
    ranks: int = 2,
    steps: int = 60,
    every: int = 20,
    as_json: bool = False,
    keep_dir: Path | None = None,
    storage_options: Mapping[str, Any] | None = None,
    break_resume: bool = False,
    timeout_s: float = 300.0,
) -> int:
    """Run the demo and print what it shows.

    Three runs of one job: an uninterrupted one; one that loses a rank to SIGKILL while its second save is in flight;
    and that one started again. Needs no network beyond the loopback interface, unless ``root`` is a URL.

    Args:
        root: The run roots are ``<root>/reference`` and ``<root>/run``, and neither may hold a run yet; by
            default below the demo's directory.
        parallel: ``"fsdp"``, ``"ddp"``, or ``"none"`` for one process without torchrun.
        ranks: Number of processes.
        steps: Length of the job: two saves or more.
        every: Steps from one save to the next.
        as_json: Print one JSON document at the end, and nothing else.
        keep_dir: The demo's directory, new or empty; by default a new one below the system's temporary directory.
            It is left in place either way.
        storage_options: For fsspec, when ``root`` is a URL.
        break_resume: Resume with another dropout, to see that a difference is found.
        timeout_s: Deadline of each of the three runs.

    Returns:
        Exit code: 0 if every step is bit-identical and the last one is committed, 1 if not.
    """
    directory = _directory(keep_dir)
    outcome = Outcome(
        parallel=parallel,
        ranks=1 if parallel == "none" else ranks,
        steps=steps,
        root=root.rstrip("/") if root else str(directory / "store"),
        directory=str(directory),
    )
    with _screen(as_json=as_json) as screen:
        demo = _Demo(screen, outcome, every, storage_options or {}, timeout_s)
        try:
            demo.play(other_dropout=break_resume)
        except (DemoError, JobTimeoutError, DcpsvcError) as err:
            outcome.error = str(err)
    if as_json:
        print(outcome.document())  # noqa: T201 - the command's output
    elif outcome.error:
        Console(stderr=True).print(f"[bold red]{escape(outcome.error)}[/]", soft_wrap=True, highlight=False)
    return 0 if outcome.ok else 1


@dataclass(frozen=True, slots=True)
class _Demo:
    """The three runs and their checks; what they find goes into ``outcome``."""

    screen: Screen
    outcome: Outcome
    every: int
    storage_options: Mapping[str, Any]
    timeout_s: float

    def play(self, *, other_dropout: bool) -> None:
        """Tell the whole story, up to the table."""
        self._check_start()
        out = self.outcome
        size = f"ranks: {out.ranks}, steps: {out.steps}, a save every {self.every}"
        self.screen.say(f"{out.parallel}, {size}; in {escape(out.directory)}")
        reference = self._reference_run()
        killed = self._killed_run()
        resumed = self._resumed_run(killed, other_dropout=other_dropout)
        self._show_root([killed, resumed])
        self._check_losses(reference, {"killed": killed, "resumed": resumed})
        if out.newest != out.steps:
            msg = f"the newest commit is step {out.newest}, not the final step {out.steps}"
            raise DemoError(msg)
        out.ok = True

    def _check_start(self) -> None:
        if self.every < 1 or self.outcome.steps < 2 * self.every:
            msg = f"{self.outcome.steps} steps with a save every {self.every} are not two saves, as the demo needs"
            raise DemoError(msg)
        if any(Path(self.outcome.directory).iterdir()):
            msg = f"{self.outcome.directory} is not empty; the demo needs a directory of its own"
            raise DemoError(msg)
        for name in ("reference", "run"):
            if self._is_taken(name):
                msg = f"{self.outcome.root}/{name} already holds a run; the demo needs a fresh root"
                raise DemoError(msg)

    def _reference_run(self) -> Story:
        finished = self._run(self._job("reference", "reference"))
        self._expect_success("reference", finished)
        return finished.story

    def _killed_run(self) -> Story:
        victim = 1 if self.outcome.ranks > 1 else 0
        kill = Kill(KILL_PHASE, 2 * self.every, victim)
        finished = self._run(self._job("killed", "run", kill=kill))
        self.outcome.killed = finished.story.killed
        if finished.story.killed is None or finished.exit_code == 0:
            msg = f"rank {victim} should have died at {kill}; exit code {finished.exit_code}\n{finished.output}"
            raise DemoError(msg)
        return finished.story

    def _resumed_run(self, killed: Story, *, other_dropout: bool) -> Story:
        finished = self._run(self._job("resumed", "run", dropout=OTHER_DROPOUT if other_dropout else None))
        self._expect_success("resumed", finished)
        self.outcome.resumed_from = resumed = finished.story.resumed
        newest = max(killed.committed, default=None)
        if resumed != newest:
            msg = f"resumed from step {resumed}; the newest commit before the kill was step {newest}"
            raise DemoError(msg)
        return finished.story

    def _show_root(self, stories: list[Story]) -> None:
        listed = self._listed("run")
        self.outcome.newest = max((entry.step for entry in listed if entry.state == "committed"), default=None)
        self.outcome.checkpoints = rows(stories, listed)
        self.screen.table(self.outcome.checkpoints)
        self.screen.say(f"list them with: dcpsvc ls {escape(self.outcome.root)}/run")

    def _check_losses(self, reference: Story, runs: Mapping[str, Story]) -> None:
        out = self.outcome
        out.identical, out.first_difference = compare(reference, runs, out.steps)
        verdict = f"bit-identical: {out.identical} of {out.steps} steps"
        if out.first_difference:
            msg = f"{verdict}; {out.first_difference}"
            raise DemoError(msg)
        self.screen.say(f"[bold green]{verdict}[/]")

    def _job(self, name: str, store: str, *, kill: Kill | None = None, dropout: float | None = None) -> Job:
        out = self.outcome
        return Job(
            name=name,
            root=f"{out.root}/{store}",
            directory=Path(out.directory),
            parallel=out.parallel,
            ranks=out.ranks,
            steps=out.steps,
            every=self.every,
            kill=kill,
            dropout=dropout,
            storage_options=self.storage_options,
        )

    def _run(self, job: Job) -> Finished:
        watch = self.screen.follow(job.name, job.steps)
        finished = run_job(job, timeout_s=self.timeout_s, watch=watch)
        self.outcome.seconds[job.name] = round(finished.seconds, 2)
        return finished

    def _expect_success(self, name: str, finished: Finished) -> None:
        if finished.exit_code or not finished.story.done:
            msg = f"the {name} run failed with exit code {finished.exit_code}\n{finished.output}"
            raise DemoError(msg)

    def _is_taken(self, store: str) -> bool:
        try:
            self._listed(store)
        except UnsupportedFormatError:
            return True
        except RootError:
            return False
        return True

    def _listed(self, store: str) -> Sequence[Listed]:
        return dcpsvc.list_checkpoints(f"{self.outcome.root}/{store}", storage_options=self.storage_options)


def _directory(keep_dir: Path | None) -> Path:
    if keep_dir is None:
        return Path(tempfile.mkdtemp(prefix=f"dcpsvc-demo-{time.strftime('%Y%m%d-%H%M%S')}-"))
    keep_dir.mkdir(parents=True, exist_ok=True)
    return keep_dir.resolve()


@contextmanager
def _screen(*, as_json: bool) -> Generator[Screen]:
    console = Console()
    if as_json:
        yield Silent()
    else:
        with (Live if console.is_terminal else Plain).opened(console) as screen:
            yield screen

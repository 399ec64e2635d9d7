"""What is the same for all commands: help that can be copied from, and JSON."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

import dcpsvc
from dcpsvc import progress
from dcpsvc.cli import cli
from dcpsvc.control.place import Place
from dcpsvc.errors import NoSuchStepError
from dcpsvc.policies import EveryNSteps, Latest
from dcpsvc.reading import open_root
from dcpsvc.stages import discover
from dcpsvc.tools import live, livetables
from tests.unit.every_command import commands


def told(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done.stdout


@pytest.mark.parametrize(
    ("words", "command"), list(commands()), ids=lambda one: " ".join(one) if type(one) is tuple else ""
)
def test_each_help_has_examples_that_can_be_copied_and_ends_with_the_exit_codes(words, command):
    text = told(*words, "--help")
    assert text.partition("\nExit codes: ")[2].startswith("0 well, 1 damaged")
    assert "\\b" not in text
    _, title, written = inspect.cleandoc(command.help).partition("\n\nExamples:\n")
    assert title
    examples = [f"  {line}" for line in written.splitlines()]
    assert "\n".join(["\n  Examples:", *examples, ""]) in text
    assert any(f"dcpsvc {' '.join(words)}" in line for line in examples)


def test_the_help_lists_every_command_once_below_what_it_is_for():
    lines = told("--help").splitlines()
    first = next(number for number, line in enumerate(lines) if line == "Look:")
    listed = [line.split()[0] for line in lines[first:] if line.startswith("  ") and line[2] != " "]
    assert sorted(name for name in listed if name in cli.commands) == sorted(cli.commands)
    assert {"Look:", "Change:", "Live job:", "Move:"} <= set(lines)
    assert "..." not in "".join(lines[first:])


def on_a_terminal(columns: int, *arguments: object) -> list[str]:
    """What a command prints on a terminal of so many columns, by line."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    command = [sys.executable, "-m", "dcpsvc", *map(str, arguments)]
    environ = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES"}} | {
        "NO_COLOR": "1"
    }
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ) as it:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while more := os.read(ours, 65536):
                said += more
        os.close(ours)
        assert it.wait(60) == 0, said.decode()
    return re.sub(r"\x1b\[[0-9;]*m", "", said.decode()).splitlines()


@pytest.mark.parametrize("columns", [80, 160])
def test_ls_shows_reasons_and_metrics_whole_on_a_terminal_of(columns, tmp_path):
    with dcpsvc.Checkpointer(tmp_path / "root", {"x": 1}, local=tmp_path / "local", keep=Latest(9)) as ckpt:
        for step in (10, 20):
            ckpt.save(step, metrics={"loss": 0.25, "eval": 0.5}).wait(30)
    lines = on_a_terminal(columns, "ls", tmp_path / "root")
    assert all(len(line) <= columns for line in lines)
    shown = " ".join(" ".join(lines).split())
    for text in ("kept because", "metrics / reason", "latest 1 of 9", "loss=0.25 eval=0.5", "committed"):
        assert text in shown
    assert ("ranks" in shown) == (columns == 160)


def test_ls_cuts_nothing_off_on_a_narrow_terminal(tmp_path):
    keep = Latest(9) | EveryNSteps(5)
    with dcpsvc.Checkpointer(tmp_path / "root", {"x": 1}, local=tmp_path / "local", keep=keep) as ckpt:
        ckpt.save(10, metrics={"loss": 0.25, "a_long_name_of_a_metric": 0.5}).wait(30)
    lines = on_a_terminal(60, "ls", tmp_path / "root")
    assert all(len(line) <= 60 for line in lines)
    assert lines[0].split()[:2] == ["step", "10"]
    shown = " ".join(" ".join(lines).split())
    for text in ("committed", "latest 1 of 9, a multiple of 5 steps", "loss=0.25 a_long_name_of_a_metric=0.5"):
        assert text in shown


def test_show_cuts_no_name_of_a_file_in_two_on_a_narrow_terminal(run):
    lines = on_a_terminal(80, "show", run, 10)
    assert all(len(line) <= 80 for line in lines)
    (found,) = [one for one in discover.committed(open_root(run)) if one.step == 10]
    assert f"   shards  {found.data}" in lines
    assert any(re.fullmatch(r"0 +[0-9.]+ KiB +[0-9a-f]{32} +rank-00000\.safetensors *", line) for line in lines)


def test_status_fits_on_a_narrow_terminal_with_what_is_in_flight(monkeypatch, capsys):
    said = {"root": "r", "world_size": 1, "step": 12, "newest": 10, "committed": 1, "failed": 0, "skipped": 0}
    said |= {"blocked_s": 0.5, "in_flight": [{"step": 12, "phase": "upload"}]}
    monkeypatch.setenv("FORCE_COLOR", "1")
    for columns, has in ((60, False), (100, True)):
        monkeypatch.setenv("COLUMNS", str(columns))
        livetables.print_status([live.LiveRank(place=Place("r1", 4711, Path("/run/x")), rank=0, status=said)])
        shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        assert max(map(len, shown.splitlines())) <= columns
        assert all(text in shown for text in ("newest", "failed", "blocked", "0.50 s", "in flight", "step 12: upload"))
        assert ("4711" in shown) == has


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Steps 10 and 20 of a small model, and a second attempt at 20."""
    folder = tmp_path_factory.mktemp("run")
    state = {"model": torch.nn.Linear(4, 3), "note": "hello"}
    with dcpsvc.Checkpointer(folder / "root", state, local=folder / "local", keep=Latest(9)) as ckpt:
        for step in (10, 20):
            ckpt.save(step, metrics={"loss": 0.25}).wait(30)
    told("edit", folder / "root", 20, "--set", 'note="bye"')
    return folder / "root"


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """The same run, to be changed."""
    shutil.copytree(run, tmp_path / "root")
    return tmp_path / "root"


def attempts(root: Path, step: int = 20) -> list[str]:
    return [one.attempt for one in discover.committed(open_root(root)) if one.step == step]


READING = {
    "show": ("show", "ROOT", "20"),
    "diff": ("diff", "ROOT", "20", "20"),
    "fetch": ("fetch", "ROOT", "20", "OUT"),
    "export": ("export", "ROOT", "20", "OUT", "--format", "hf"),
}


@pytest.mark.parametrize("arguments", READING.values(), ids=READING)
def test_a_command_that_reads_says_which_attempt_of_several_it_takes(arguments, run, tmp_path):
    places = {"ROOT": str(run), "OUT": str(tmp_path / "out")}
    done = CliRunner().invoke(cli, [places.get(one, one) for one in arguments])
    assert done.exit_code == 0, done.output
    assert f"step 20 has 2 attempts; taking {attempts(run)[-1]}" in done.stderr


@pytest.mark.parametrize("arguments", [("pin", "20"), ("unpin", "20"), ("gc", "--remove", "20", "--force-last")])
def test_a_command_that_changes_one_of_several_attempts_wants_it_named(arguments, copy):
    name, *more = arguments
    done = CliRunner().invoke(cli, [name, str(copy), *more])
    assert done.exit_code == 2, done.output
    assert all(attempt in done.stderr for attempt in ("--attempt", *attempts(copy)))
    before = attempts(copy)
    told(name, copy, *more, "--attempt", before[0])
    assert attempts(copy) == (before[1:] if name == "gc" else before)
    assert all(before[1] not in path.name for path in (copy / "pins").glob("*"))


@pytest.mark.parametrize("arguments", [("show", "20"), ("pin", "20"), ("gc", "--remove", "20")])
def test_an_attempt_that_is_not_there_is_told_with_those_that_are(arguments, copy):
    name, *more = arguments
    failed = CliRunner().invoke(cli, [name, str(copy), *more, "--attempt", "9-abc-0"]).exception
    assert isinstance(failed, NoSuchStepError)
    assert str(failed).endswith(
        f"step 20 has no committed attempt 9-abc-0; its attempts are {', '.join(attempts(copy))}"
    )


def test_one_of_several_attempts_is_exported(run, tmp_path):
    first, last = attempts(run)
    for attempt, given, note in ((first, ("--attempt", first), b"hello"), (last, (), b"bye")):
        for kind in ("hf", "dcp"):
            out = tmp_path / f"{kind}-{attempt}"
            said = json.loads(told("export", run, 20, out, "--format", kind, "--json", *given))
            assert said["attempt"] == attempt
        assert any(note in path.read_bytes() for path in out.iterdir())


def test_two_attempts_of_a_step_are_compared_and_told_apart(run):
    first, last = attempts(run)
    said = " ".join(told("diff", run, 20, 20, "--attempt", first, code=1).split())
    assert f"value attempt {first} attempt {last} note" in said
    assert '"hello" "bye"' in said
    assert said.endswith("--values compares the tensors' numbers")
    document = json.loads(told("diff", run, 20, 20, "--attempt", first, "--json", code=1))
    assert (document["a"], document["b"]) == ({"step": 20, "attempt": first}, {"step": 20, "attempt": last})
    assert told("diff", run, 20, 20, "--attempt", first, "--attempt-b", first).startswith("the same structure")


def test_to_pin_what_is_not_committed_says_so(run):
    failed = CliRunner().invoke(cli, ["pin", str(run), "7"]).exception
    assert str(failed).endswith("step 7 is not committed; committed steps: 10, 20")


def test_who_asks_for_a_step_that_is_not_there_is_told_where_to_look(run):
    done = subprocess.run(
        [sys.executable, "-m", "dcpsvc", "show", str(run), "7"], capture_output=True, text=True, timeout=60, check=False
    )
    first, second = done.stderr.splitlines()
    assert first.endswith("step 7 is not committed; committed steps: 10, 20")
    assert second.strip() == "dcpsvc ls ROOT shows what is there."
    assert (done.returncode, done.stdout) == (1, "")


def test_latest_is_a_step_wherever_one_is_named(copy):
    newest = attempts(copy)[-1]
    assert json.loads(told("show", copy, "latest", "--json"))["attempt"] == newest
    assert {one["step"] for one in json.loads(told("verify", copy, "latest", "--json"))} == {20}
    assert json.loads(told("pin", copy, "latest", "--attempt", newest, "--json"))["step"] == 20
    told("show", copy, "newest", code=2)
    told("unpin", copy, "latest", "--attempt", newest)
    told("gc", copy, "--remove", "latest", "--force-last", "--attempt", newest)
    assert newest not in attempts(copy)


def test_what_is_asked_for_of_an_empty_run_says_that_nothing_is_committed(copy, tmp_path):
    for one in (10, *(("latest", "--attempt", each) for each in attempts(copy))):
        told("gc", copy, "--force-last", "--remove", *(one if isinstance(one, tuple) else (one,)))
    for words in (("show", copy, "latest"), ("cp", copy, tmp_path / "other")):
        failed = CliRunner().invoke(cli, [str(word) for word in words]).exception
        assert str(failed) == f"{copy}: no commit can be loaded: nothing is committed"


@pytest.mark.parametrize("typed", ["show ROOT 20 --attempt ", "gc ROOT --remove "])
def test_the_shell_completes_the_value_of_an_option(typed, run):
    words = f"dcpsvc {typed.replace('ROOT', str(run))}"
    environ = {"_DCPSVC_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()))}
    shown = [line.removeprefix("plain,") for line in program(**environ).stdout.split()]
    assert shown == (attempts(run)[::-1] if "--attempt" in typed else ["20", "10", "latest"])


def program(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own."""
    command = [sys.executable, "-m", "dcpsvc", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environ)


@pytest.mark.parametrize(
    ("arguments", "code", "advised"),
    [
        (("ls", "NOWHERE"), 3, True),
        (("ls", "ROOT", "-o", "key=1"), 3, False),
        (("pin", "ROOT", "10", "--note", "two\nlines"), 2, False),
    ],
    ids=["no run", "no options", "no note"],
)
def test_wrong_input_ends_with_its_code_and_the_advice_that_fits(arguments, code, advised, copy, tmp_path):
    places = {"ROOT": copy, "NOWHERE": tmp_path / "nowhere"}
    done = program(*(places.get(one, one) for one in arguments))
    assert (done.returncode, "A run root holds run.json" in done.stderr) == (code, advised), done.stderr
    assert "Traceback" not in done.stderr


def test_a_heading_of_du_is_one_line(run):
    assert "tensors of the newest checkpoint" in told("du", run).splitlines()


def test_show_tells_metrics_that_came_late_pins_and_why_it_stays(copy):
    dcpsvc.record_metrics(copy, 10, {"eval": 0.5})
    said = told("pin", copy, 10, "--note", "paper")
    assert "pinned (paper)" in said
    shown = " ".join(told("show", copy, 10).split())
    assert "loss=0.25 eval=0.5" in shown
    assert "latest 2 of 9, pinned" in shown  # the two attempts at 20 take one place
    assert "paper" in shown
    listed = json.loads(told("ls", copy, "--json"))[0]
    document = json.loads(told("show", copy, 10, "--json"))
    assert {name: document[name] for name in listed} == listed
    assert "1 pin removed" in told("unpin", copy, 10)
    assert "it was not pinned" in told("unpin", copy, 10)


def test_show_takes_patterns_and_dtypes_and_says_when_nothing_matches(run):
    assert set(json.loads(told("show", run, 10, "--filter", "*.bias", "--json"))["tensors"]) == {"model.bias"}
    assert "model.bias" in told("show", run, 10, "--dtype", "f32")
    assert set(json.loads(told("show", run, 10, "--dtype", "F32", "--json"))["tensors"]) == {
        "model.bias",
        "model.weight",
    }
    done = CliRunner().invoke(cli, ["show", str(run), "10", "--dtype", "BF16"])
    assert (done.exit_code, "no tensor matches" in done.stderr) == (1, True)


def test_ranks_in_a_row_are_told_as_a_range():
    assert progress.ranges([*range(512), 600, 602, 603]) == "0-511, 600, 602-603"


OFFLINE = {
    "ls": ("ROOT",),
    "show": ("ROOT", "10"),
    "diff": ("ROOT", "10", "10"),
    "du": ("ROOT",),
    "verify": ("ROOT",),
    "report": ("ROOT", "-o", "OUT"),
    "doctor": ("--size", "64KiB"),
    "pin": ("ROOT", "10"),
    "unpin": ("ROOT", "10"),
    "edit": ("ROOT", "10", "--set", 'note="x"'),
    "promote": ("ROOT", "10", "OUT"),
    "gc": ("ROOT",),
    "fetch": ("ROOT", "10", "OUT"),
    "cp": ("ROOT", "OUT", "10"),
    "export": ("ROOT", "10", "OUT", "--format", "hf"),
}


@pytest.mark.parametrize("name", OFFLINE)
def test_json_is_one_document(name, copy, tmp_path):
    places = {"ROOT": str(copy), "OUT": str(tmp_path / "out")}
    done = CliRunner().invoke(cli, [name, *(places.get(one, one) for one in OFFLINE[name]), "--json"])
    assert done.exit_code in {0, 1}, done.output
    json.loads(done.stdout, parse_constant=pytest.fail)


@pytest.mark.parametrize(("words", "command"), [pytest.param(*one, id=" ".join(one[0])) for one in commands()])
def test_every_command_that_tells_something_has_json(words, command):
    has = any("--json" in parameter.opts for parameter in command.params)
    assert has or isinstance(command, click.Group) or words == ("completion",)


def test_a_url_is_no_name_for_the_report(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["report", str(run), "-o", "endpoint_url=http://x"])
    assert (done.exit_code, "--option KEY=VALUE" in done.stderr) == (2, True), done.output

"""Long commands show how far they are on a terminal, and leave logs and pipes alone."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch

import dcpsvc

pytestmark = pytest.mark.timeout(120)

PROGRAM = str(Path(sys.executable).with_name("dcpsvc"))
COLOURED = re.compile(r"\x1b\[(?:[0-9]+;)*(?:3[0-8]|9[0-7])[;m]")
LONG = {
    "verify": ("verified", ("verify", "ROOT")),
    "diff": ("compared", ("diff", "ROOT", 1, 2, "--values")),
    "fetch": ("copied", ("fetch", "ROOT", 1, "OUT")),
    "cp": ("copied", ("cp", "ROOT", "OUT")),
    "export": ("exported", ("export", "ROOT", 1, "OUT", "--format", "hf")),
    "import": ("imported", ("import", "MODEL", "OUT", 3)),
    "edit": ("copied", ("edit", "ROOT", 2, "--set", 'note="bye"')),
    "promote": ("copied", ("promote", "ROOT", 2, "OUT")),
    "gc": ("freed", ("gc", "ROOT", "--keep", "latest:1")),
    "doctor": ("saved", ("doctor", "OUT", "--local", "LOCAL", "--size", "4MiB")),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Steps 1 and 2 of 4 MiB and 2 MiB beside in ``root``, and step 1 in ``model`` as safetensors."""
    folder = tmp_path_factory.mktemp("run")
    state = {"model": torch.nn.Linear(1024, 1024), "other": torch.zeros(1 << 19), "note": "hello"}
    with dcpsvc.Checkpointer(folder / "root", state, local=folder / "local") as ckpt:
        for step in (1, 2):
            ckpt.save(step).wait(30)
    command = [PROGRAM, "export", str(folder / "root"), "1", str(folder / "model"), "--format", "hf"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return folder


@pytest.fixture
def places(run, tmp_path) -> dict[str, Path]:
    shutil.copytree(run / "root", tmp_path / "root")
    return {"ROOT": tmp_path / "root", "MODEL": run / "model", "OUT": tmp_path / "out", "LOCAL": tmp_path / "local"}


def on_a_terminal(command: list[str], **environ: str) -> tuple[str, str]:
    """Standard output, through a pipe, and what a terminal of 120 columns got as standard error."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    inherited = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES", "NO_COLOR"}}
    with subprocess.Popen(
        command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env={**inherited, "TERM": "xterm", **environ}
    ) as it:
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while more := os.read(ours, 65536):
                seen += more
        os.close(ours)
        assert it.stdout is not None
        said = it.stdout.read().decode()
        assert it.wait(60) == 0, seen.decode()
    return said, seen.decode()


def command(arguments: tuple[object, ...], places: dict[str, Path]) -> list[str]:
    return [PROGRAM, *(str(places.get(str(each), each)) for each in arguments)]


@pytest.mark.parametrize(("what", "arguments"), LONG.values(), ids=LONG)
def test_a_terminal_shows_bytes_rate_and_time_left_and_is_clean_afterwards(what, arguments, places):
    said, seen = on_a_terminal(command(arguments, places))
    (*_, last) = (line for line in re.split(r"[\r\n]+|\x1b\[2K", seen) if what in line)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last)
    assert re.search(
        rf"{what} .*[0-9.]+/[0-9.]+ [KM]iB +([0-9.]+ [KMGT]iB/s|\?) +(-|[0-9]+):([0-9-]+):([0-9-]+)", shown
    )
    assert COLOURED.search(seen)
    assert seen.endswith("\x1b[1A\x1b[2K")  # the bar is wiped out
    assert said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("nbytes", "how"),
    [
        ("6.0", ("dcp",)), ("4.0", ("dcp", "--component", "model")), ("6.0", ("dcp", "--flat")),
        ("4.0", ("hf",)), ("4.0", ("torch",)),
    ],
    ids=" ".join,
)  # fmt: skip
def test_the_bar_of_an_export_ends_full_with_what_was_asked_for(nbytes, how, places):
    _, seen = on_a_terminal(command(("export", "ROOT", 1, "OUT", "--format", *how), places))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    assert re.findall(r"([0-9.]+)/([0-9.]+) MiB", plain)[-1] == (nbytes, nbytes)


@pytest.mark.parametrize(("what", "arguments"), [LONG["verify"], LONG["doctor"]], ids=["verify", "doctor"])
def test_no_color_leaves_the_bar_and_takes_the_colours(what, arguments, places):
    _, seen = on_a_terminal(command(arguments, places), NO_COLOR="1")
    assert what in seen
    assert not COLOURED.search(seen)


@pytest.mark.parametrize(("what", "arguments"), LONG.values(), ids=LONG)
def test_json_is_alone_even_on_a_terminal(what, arguments, places):
    said, seen = on_a_terminal([*command(arguments, places), "--json"])
    assert json.loads(said) is not None
    assert what not in seen


@pytest.mark.parametrize("arguments", [each for _, each in LONG.values()], ids=LONG)
def test_elsewhere_a_short_operation_says_only_its_result(arguments, places):
    done = subprocess.run(command(arguments, places), capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
    assert "\x1b" not in done.stdout

"""What a script hears that asked for JSON when a command fails: the type of the error, its facts, what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dcpsvc
from dcpsvc.commandline import failures
from dcpsvc.errors import NoBucketError
from dcpsvc.tools import live
from tests.unit.every_command import call, with_json

NO_RUN, USAGE = ("NoRunError", 3), ("BadParameter", 2)

FAILING: dict[str, tuple[tuple[str, ...], tuple[str, int]]] = {
    "ls": (("NOWHERE",), NO_RUN),
    "show": (("NOWHERE", "10"), NO_RUN),
    "verify": (("NOWHERE",), NO_RUN),
    "diff": (("NOWHERE", "10", "20"), NO_RUN),
    "du": (("NOWHERE",), NO_RUN),
    "fetch": (("NOWHERE", "10", "OUT"), NO_RUN),
    "cp": (("NOWHERE", "OUT"), NO_RUN),
    "report": (("NOWHERE", "-o", "OUT"), NO_RUN),
    "doctor": (("--size", "much"), USAGE),
    "export": (("NOWHERE", "10", "OUT", "--format", "hf"), NO_RUN),
    "import": (("HERE", "OUT"), ("ForeignFormatError", 1)),
    "edit": (("NOWHERE", "10", "--drop", "note"), NO_RUN),
    "promote": (("NOWHERE", "10", "OUT"), NO_RUN),
    "pin": (("NOWHERE", "10"), NO_RUN),
    "unpin": (("NOWHERE", "10"), NO_RUN),
    "gc": (("NOWHERE",), NO_RUN),
    "status": (("NOWHERE",), NO_RUN),
    "save": (("NOWHERE",), NO_RUN),
    "stop": (("NOWHERE",), NO_RUN),
    "drill sigterm": (("--", "NOWHERE"), ("UsageError", 2)),
    "demo": (("-o", "nonsense"), USAGE),
}
"""Of each command a call that fails, and how."""


@pytest.mark.parametrize("name", with_json())
def test_an_error_of_a_command_that_was_asked_for_json_is_an_object_and_nothing_else(name, tmp_path):
    arguments, (error, code) = FAILING[name]
    places = {"NOWHERE": str(tmp_path / "nowhere"), "HERE": str(tmp_path), "OUT": str(tmp_path / "out")}
    ended, out, err = call(*name.split(), "--json", *(places.get(one, one) for one in arguments))
    told = json.loads(err, parse_constant=pytest.fail)
    assert (ended, out, told["error"], told["exit_code"]) == (code, "", error, code)
    assert told["message"]
    assert "remedy" in told
    if error == "NoRunError":
        assert told["where"] == places["NOWHERE"]
        assert "run.json" in told["remedy"]


def test_a_script_can_tell_what_is_worth_another_try_and_what_a_person_must_do() -> None:
    told = failures.document(NoBucketError("list", "s3://b/run/manifests/", "there is no such bucket"))
    assert (told["transient"], told["operation"], told["exit_code"]) == (False, "list", 3)
    assert told["remedy"].startswith("Create the bucket")


@pytest.mark.parametrize(
    ("err", "code"),
    [
        (live.NoLiveJobError("./run", (4711,)), 4),
        (live.NotDoneError("step 40: no", "SaveFailedError"), 1),
        (live.NoAnswerError("rank 0 did not answer within 3 s; what was asked stands"), 1),
    ],
)
def test_what_a_live_job_did_not_do_tells_its_facts(err: live.LiveError, code: int) -> None:
    told = json.loads(json.dumps(failures.document(err)))
    assert (told["error"], told["exit_code"]) == (type(err).__name__, code)
    assert {name: told[name] for name in vars(err)} == json.loads(json.dumps(vars(err)))


def test_a_step_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    with dcpsvc.Checkpointer(tmp_path / "root", {"x": 1}, local=tmp_path / "local") as ckpt:
        for step in (10, 20):
            ckpt.save(step).wait(30)
    ended, out, err = call("show", tmp_path / "root", 7, "--json")
    told: dict[str, Any] = json.loads(err)
    assert (ended, out) == (1, "")
    assert (told["error"], told["step"], told["available"]) == ("NoSuchStepError", 7, [10, 20])
    assert (told["intact"], told["root"]) == ("committed steps: 10, 20", str(tmp_path / "root"))
    assert told["remedy"] == "dcpsvc ls ROOT shows what is there."


def test_whoever_did_not_ask_for_json_reads_text_though_a_note_says_so(tmp_path: Path) -> None:
    ended, out, err = call("pin", tmp_path, 10, "--note", "--json")
    assert (ended, out) == (3, "")
    assert err.startswith(f"dcpsvc: {tmp_path}: no run is stored here")


def test_a_wrong_option_is_told_by_its_name_before_anything_is_json() -> None:
    ended, out, err = call("ls", "--json", "--nonsense")
    assert (ended, out) == (2, "")
    assert "--nonsense" in err


@pytest.mark.parametrize("name", ["status", "save", "stop"])
def test_a_password_in_a_url_is_not_repeated_by(name, tmp_path: Path) -> None:
    url = f"memory://anna:geheim@{tmp_path.name}/run"
    with dcpsvc.Checkpointer(url, {"x": 1}, local=tmp_path / "local") as ckpt:
        ckpt.save(1).wait(30)
    for more in ((), ("--json",)):
        ended, out, err = call(name, url, *more)
        assert (ended, out) == (4, "")
        assert f"{tmp_path.name}/run: no live job" in err
        assert "geheim" not in err


@pytest.mark.parametrize("more", [(), ("--json",)], ids=["text", "json"])
def test_a_full_disk_behind_the_output_is_told_in_a_line(more, tmp_path: Path) -> None:
    with dcpsvc.Checkpointer(tmp_path / "root", {"x": 1}, local=tmp_path / "local") as ckpt:
        ckpt.save(1).wait(30)
    command = [sys.executable, "-m", "dcpsvc", "ls", str(tmp_path / "root"), *more]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    told = json.loads(line)["message"] if more else line.removeprefix("dcpsvc: ")
    assert told == "standard output: No space left on device"

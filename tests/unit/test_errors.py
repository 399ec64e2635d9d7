"""The error tree: errors travel between processes whole, and the docstring draws the tree as it is."""

from __future__ import annotations

import inspect
import json
import pickle
import re

import pytest

from dcpsvc import errors
from dcpsvc.commandline import failures
from dcpsvc.errors import DcpsvcError, RankFailure

FAILURE = RankFailure(3, "upload", "StoreFullError", "put data/x: no space left")

ARGUMENTS: dict[str, tuple[object, ...]] = {
    "DcpsvcError": ("something",),
    "ConfigError": ("Latest(0): at least 1 checkpoint must be kept",),
    "ClosedError": ("this Checkpointer is closed",),
    "WaitTimeoutError": (2.5, ("step 40", "step 50")),
    "RootError": ("s3://bucket/run", "no such bucket"),
    "NoRunError": ("/runs/a", "no run is stored here"),
    "UnsupportedFormatError": ("/runs/a", "written in format version 2"),
    "DestinationError": ("/runs/exp43", "holds another run"),
    "RunBusyError": ("/nvme/a", "process 7 on this host is writing the same run"),
    "StateError": ("model.weight", "two tensors would have this name"),
    "UnsupportedStateError": ("loader.fn", "builtins.function is neither a tensor nor JSON-like"),
    "SharingError": ("OneRank", "rank=5 is not in this job of 4 ranks"),
    "StructureMismatchError": ("model.weight", "1 difference"),
    "StateMismatchError": ("model.weight", "saved with shape [2], here it is [3]"),
    "TornSnapshotError": ("model.weight", "it was changed while it was copied"),
    "SaveError": (40, "cafe-0", 30),
    "SaveFailedError": (40, "cafe-0", 30, (FAILURE,)),
    "RanksMissingError": (40, "cafe-0", None, "plan", (3,), (0, 1, 2), 60.0, "rank 3 was last seen in step 39"),
    "FencedError": (40, "cafe-0", 30, "job cafe was replaced by job beef"),
    "SaveSkippedError": (40, "cafe-0", 30, "1 saves were under way"),
    "CommitUnknownError": (40, "cafe-0", 30, "create manifests/x: timed out"),
    "StepExistsError": (40, "cafe-0", 40),
    "RestoreError": ("nothing to read",),
    "NoSuchStepError": ("/runs/a", 40, (10, 20), "damaged"),
    "StepDeletedError": ("/runs/a", 40, (10, 20), "cafe-0", True, 12_345),
    "NoValidCheckpointError": ("/runs/a", ("step 40: the file is missing",)),
    "RestoreFailedError": ("/runs/a", (FAILURE,), (1,)),
    "RemovalRefusedError": ("/runs/a", 40, "is the newest checkpoint"),
    "CheckpointGoneError": ("/runs/a", 40, "it is not committed, or deleted"),
    "ExportError": ("/models/a", "the directory is not empty"),
    "ForeignFormatError": ("/models/a", "not JSON"),
    "FormatError": ("/runs/a/run.json", "not JSON"),
    "ManifestError": ("manifests/x.json", "field 'step' is missing"),
    "LayoutError": ("layouts/x.json", "chunks hold 3 of 4 elements"),
    "CorruptShardError": ("data/x/rank-00000.safetensors", "the file is missing"),
    "StoreError": ("put", "data/x", "refused"),
    "StoreNotFoundError": ("get", "data/x", "there is no such object"),
    "StoreObjectError": ("get", "data/x", "it is not a regular file"),
    "NoBucketError": ("list", "s3://b/run/manifests/", "there is no such bucket"),
    "StoreAccessError": ("get", "data/x", "403"),
    "StoreFullError": ("put", "data/x", "no space left"),
    "StoreUnavailableError": ("list", "manifests/", "503"),
    "StoreThrottledError": ("put_file", "data/x", "503"),
}
"""Sensible arguments for every class of the tree; a new class must be given some."""


def tree(root: type[DcpsvcError] = DcpsvcError) -> list[type[DcpsvcError]]:
    return [root, *(below for child in root.__subclasses__() for below in tree(child))]


def drawn() -> dict[str, str]:
    """Each class in the docstring's drawing, and the class it hangs below."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in inspect.getdoc(errors).splitlines():
        if match := re.match(r"    ((?:\|   |    )*)(?:[|`]-- )?(\w+Error)\b", line):
            depth = len(match[1]) // 4 + ("-- " in line[: match.start(2)])
            parents[match[2]] = path[depth - 1] if depth else ""
            path[depth:] = [match[2]]
    return parents


@pytest.mark.parametrize("kind", tree(), ids=lambda kind: kind.__name__)
def test_an_error_arrives_in_another_process_as_it_left(kind: type[DcpsvcError]) -> None:
    error = kind(*ARGUMENTS[kind.__name__])
    arrived = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own error, of this process
    assert type(arrived) is kind
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)
    assert arrived.args == error.args


@pytest.mark.parametrize("kind", tree(), ids=lambda kind: kind.__name__)
def test_a_message_names_every_text_and_number_it_was_given(kind: type[DcpsvcError]) -> None:
    given = ARGUMENTS[kind.__name__]
    text = str(kind(*given))
    for argument in given:
        if isinstance(argument, str) and argument not in {"cafe-0", "plan"}:
            assert argument in text
    assert "object at 0x" not in text


def test_the_drawing_shows_every_class_below_its_parent() -> None:
    assert drawn() == {kind.__name__: "" if kind is DcpsvcError else kind.__base__.__name__ for kind in tree()}


def test_the_whole_tree_is_in_one_module() -> None:
    assert {kind.__module__ for kind in tree()} == {"dcpsvc.errors"}


def test_a_failed_save_says_what_a_restart_resumes_from() -> None:
    failed = errors.SaveFailedError(40, "cafe-0", 30, (FAILURE,))
    assert str(failed) == (
        "step 40 (attempt cafe-0): rank 3 failed in upload: StoreFullError: put data/x: no space left; "
        "step 30 remains the newest commit"
    )
    assert errors.SaveError(1, "cafe-0", None).intact == "no checkpoint is committed yet"


def test_missing_ranks_are_told_with_phase_attempt_and_seconds() -> None:
    missing = errors.RanksMissingError(40, "cafe-0", 30, "plan", (3,), (0, 1, 2), 60.0)
    assert str(missing) == (
        "step 40 (attempt cafe-0): ranks (3,) did not arrive in plan within 60.0 s, ranks (0, 1, 2) did; "
        "step 30 remains the newest commit"
    )


def test_an_unknown_commit_sends_the_reader_to_the_store() -> None:
    text = str(errors.CommitUnknownError(40, "cafe-0", 30, "the store did not answer"))
    assert "list the run root" in text
    assert "the store did not answer" in text


def test_only_an_unavailable_store_is_worth_another_try() -> None:
    transient = [kind.__name__ for kind in tree(errors.StoreError) if kind.transient]
    assert transient == ["StoreUnavailableError", "StoreThrottledError"]


def test_a_step_that_is_not_there_lists_those_that_are() -> None:
    assert str(errors.NoSuchStepError("/r", 4, (1, 2))) == "/r: step 4 is not committed; committed steps: 1, 2"
    assert str(errors.NoSuchStepError("/r", 4, ())) == "/r: step 4 is not committed; nothing is committed"


def test_of_many_steps_those_around_a_mistyped_one_are_named() -> None:
    steps = tuple(range(100, 100_001, 100))
    assert str(errors.NoSuchStepError("/r", 4_250, steps)) == (
        "/r: step 4250 is not committed; 1000 steps are committed, 100 to 100000; next to it 4100, 4200, 4300, 4400"
    )


@pytest.mark.parametrize("kind", tree(), ids=lambda kind: kind.__name__)
def test_each_error_tells_its_facts_under_their_own_names(kind: type[DcpsvcError]) -> None:
    err = kind(*ARGUMENTS[kind.__name__])
    told = json.loads(json.dumps(failures.document(err)))
    assert (told["error"], told["message"]) == (kind.__name__, str(err))
    assert not {"error", "message", "remedy", "exit_code"} & vars(err).keys()
    assert vars(err).keys() <= told.keys()
    assert told.get("intact") == getattr(err, "intact", None)
    assert told["exit_code"] in {1, 2, 3}


def test_what_ranks_said_of_a_failed_save_stays_apart() -> None:
    told = failures.document(errors.SaveFailedError(40, "cafe-0", 30, (FAILURE,)))
    assert told["failures"] == [
        {"rank": 3, "phase": "upload", "error": "StoreFullError", "text": "put data/x: no space left"}
    ]
    assert (told["step"], told["newest"], told["intact"]) == (40, 30, "step 30 remains the newest commit")

"""A test session without any S3 server says so where nobody can miss it, and in CI it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ONE = "tests/s3/test_s3_store.py::test_a_missing_bucket_is_named_as_such_and_not_created"
NOWHERE = {"DCPSVC_CEPH_ROOT": "/dev/null/ceph", "MIRROR": "http://127.0.0.1:9", "DCPSVC_SWIFT_VENV": "/dev/null/swift"}


@pytest.mark.parametrize(
    ("given", "code"),
    [({}, 0), ({"CI": "true"}, 1), ({"DCPSVC_TEST_S3_SERVER": "swift"}, 1)],
    ids=["at home", "in CI", "asked for"],
)
def test_where_no_server_can_be_had_the_session_says_so_and_fails_where_it_counts(
    given: dict[str, str], code: int
) -> None:
    inherited = {k: v for k, v in os.environ.items() if k != "CI" and not k.startswith(("DCPSVC_TEST", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", ONE],
        cwd=ROOT, env={**inherited, **NOWHERE, **given}, capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    assert "NO S3 TEST HAS RUN: " in done.stdout
    assert "swift cannot be fetched" in done.stdout

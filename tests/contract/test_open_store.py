"""From a run root as a user writes it to a store, or to a sentence that says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dcpsvc
from dcpsvc.errors import RootError
from dcpsvc.storage.open import open_store, redact

SOURCE = str(Path(dcpsvc.__file__).parents[1])


def test_a_path_a_string_and_a_file_url_are_one_place(tmp_path: Path) -> None:
    open_store(tmp_path / "a b").put("run.json", b"x")
    for url in (str(tmp_path / "a b"), (tmp_path / "a b").as_uri(), f"local://{tmp_path}/a b"):
        assert open_store(url).get("run.json", max_nbytes=1) == b"x"
        assert open_store(url).url == str(tmp_path / "a b")


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_store("~/runs").url == str(tmp_path / "runs")


def test_memory_stores_are_shared_by_name() -> None:
    open_store("memory://one").put("run.json", b"x")
    assert open_store("memory://one/").get("run.json", max_nbytes=1) == b"x"
    assert open_store("memory://two").list("") == []


def test_an_s3_url_is_opened_without_asking_anybody() -> None:
    store = open_store("s3://bucket/some/run/", {"endpoint_url": "http://127.0.0.1:9", "key": "k", "secret": "s"})
    assert store.url == "s3://bucket/some/run"
    assert store.atomic_create
    assert open_store("S3://Bucket/run").url == "s3://Bucket/run"


@pytest.mark.parametrize(
    ("url", "options", "advice"),
    [
        ("", {}, "give a directory"),
        ("s3://", {}, "s3://bucket/prefix"),
        ("s3:///prefix", {}, "names no bucket"),
        ("s3://key:hunter2@bucket/run", {}, "storage_options"),
        ("nonsense://place", {}, "'nonsense' is not a known protocol"),
        ("https://example.org/run", {}, "not a place"),
        ("simplecache::s3://bucket/run", {}, "not a place"),
        ("file://machine/run", {}, "three slashes"),
        ("file://", {}, "absolute path"),
        ("memory://", {}, "give it a name"),
        ("/a/path", {"key": "hunter2"}, "takes no storage_options, and was given key"),
        ("s3://bucket/run", {"max_concurrency": 0}, "max_concurrency"),
        ("a\0b", {}, "NUL"),
        ("s3:/bucket/run", {}, "give 's3://bucket/run'"),
        (Path("s3://bucket/run"), {}, "a pathlib.Path drops one"),
    ],
)
def test_a_run_root_that_is_none_says_what_to_do(url: str, options: dict[str, object], advice: str) -> None:
    with pytest.raises(RootError, match=advice) as caught:
        open_store(url, options)
    assert "hunter2" not in str(caught.value)


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "s3fs.py").write_text("raise ImportError('no s3fs here')")
    code = "from dcpsvc.storage.open import open_store; open_store('s3://bucket/run')"
    process = run(code, f"{tmp_path}{os.pathsep}{SOURCE}")
    assert "RootError: s3://bucket/run: cannot be opened: ImportError: Install s3fs" in process.stderr


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sftp://user:hunter2@host:22/run", "sftp://host:22/run"),
        ("s3://bucket/run?X-Amz-Signature=hunter2", "s3://bucket/run"),
        ("local:///runs/a", "local:///runs/a"),
        ("/runs/a@b", "/runs/a@b"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert redact(url) == shown


def test_opening_a_directory_loads_neither_torch_nor_fsspec() -> None:
    code = (
        "import sys; from dcpsvc.storage.open import open_store; open_store('/tmp/x').list('')\n"
        "print(sorted({'torch', 'fsspec', 's3fs', 'botocore', 'numpy', 'asyncio'} & set(sys.modules)))"
    )
    assert run(code, SOURCE).stdout == "[]\n"


def run(code: str, path: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)

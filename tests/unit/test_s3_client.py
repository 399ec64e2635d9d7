"""One client for each server and set of credentials in a process; never one of somebody else's."""

from __future__ import annotations

import os
from typing import Any

import pytest

from dcpsvc.config import Limits
from dcpsvc.storage import s3client
from dcpsvc.storage.s3wire import s3_options

URL = "s3://bucket/some/run/"
OPTIONS: dict[str, Any] = {
    "endpoint_url": "http://127.0.0.1:9", "key": "access", "secret": "hush", "client_kwargs": {"region_name": "here"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_clients_yet(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(s3client, "_clients", {})
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def client(url: str = URL, **options: Any) -> s3client.Client:
    return s3client.client(url, s3_options({**OPTIONS, **options}, Limits()))[0]


def test_the_same_options_give_the_same_client_and_the_path_of_each_url() -> None:
    found, root = s3client.client(URL, s3_options(OPTIONS, Limits()))
    again, other = s3client.client("s3://bucket/other", s3_options(dict(OPTIONS), Limits()))
    assert found is again
    assert (root, other) == ("bucket/some/run", "bucket/other")


@pytest.mark.parametrize(
    "changed",
    [
        {"secret": "another"},
        {"endpoint_url": "http://127.0.0.1:10"},
        {"token": "x"},
        {"config_kwargs": {"read_timeout": 1}},
    ],
)
def test_other_credentials_servers_and_limits_get_a_client_of_their_own(changed: dict[str, Any]) -> None:
    assert client() is not client(**changed)


def test_credentials_of_the_environment_are_looked_at_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = {"key": None, "secret": None}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "one")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    first = client(**bare)
    assert s3client.credentials(first.fs).access_key == "one"
    assert client(**bare) is first
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "two")
    assert s3client.credentials(client(**bare).fs).access_key == "two"


def test_credentials_that_somebody_writes_anew_into_a_file_are_read_again(tmp_path) -> None:  # type: ignore[no-untyped-def]
    bare = {"key": None, "secret": None}
    for key in ("one", "two"):
        (tmp_path / "credentials").write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = hush\n")
        assert s3client.credentials(client(**bare).fs).access_key == key


def test_a_forked_child_does_not_speak_on_its_parent_s_connections() -> None:
    mine = client()
    if (child := os.fork()) == 0:
        os._exit(17 if client() is mine else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_only_a_few_clients_are_kept() -> None:
    made = [client(token=str(number)) for number in range(20)]
    assert len(s3client._clients) == s3client._KEPT
    assert client(token=str(19)) is made[-1]


def test_options_that_are_no_plain_values_are_not_remembered() -> None:
    odd = {"config_kwargs": {"user_agent_extra": "x", "s3": {"odd": object()}}}
    assert s3client._key(s3_options({**OPTIONS, **odd}, Limits())) is None

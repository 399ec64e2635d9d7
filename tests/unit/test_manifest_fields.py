"""Every field of a manifest must make sense, alone and beside the others, even where the seal is right."""

from __future__ import annotations

from typing import Any

import pytest

from dcpsvc.errors import ManifestError
from dcpsvc.format import manifest
from dcpsvc.format.digest import BLOCK_NBYTES
from tests.unit.small_manifest import PATH, SMALL, content, parsed, record


@pytest.mark.parametrize("name", sorted(content()))
def test_a_missing_field_is_named(name: str) -> None:
    fields = content()
    del fields[name]
    with pytest.raises(ManifestError, match=f"^{PATH}: field '{name}' is missing$"):
        manifest.loads(PATH, manifest.seal(fields))


@pytest.mark.parametrize("name", ["rank", "path", "nbytes", "body_nbytes", "digest"])
def test_a_missing_field_of_a_shard_is_named(name: str) -> None:
    fields = content()
    del fields["shards"][1][name]
    with pytest.raises(ManifestError, match=f"field '{name}' is missing"):
        manifest.loads(PATH, manifest.seal(fields))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", True), ("format", "1"), ("format", 1.0), ("format", 2), ("format", 0), ("format", None),
        ("run_id", 7), ("run_id", ""), ("run_id", None),
        ("step", True), ("step", 7.0), ("step", "7"), ("step", -1), ("step", 8), ("step", 10**12), ("step", None),
        ("attempt", 0), ("attempt", "cafe-1"), ("attempt", "../../x"), ("attempt", ""), ("attempt", None),
        ("created", 0), ("created", ""), ("created", "yesterday"), ("created", "2026-01-31"),
        ("created", "2026-01-31T23:59:59+01:00"), ("created", "2026-01-31T23:59:59Z\n"),
        ("world_size", True), ("world_size", 1), ("world_size", 3), ("world_size", "2"), ("world_size", 2.0),
        ("world_size", -1), ("world_size", 1 << 60),
        ("block_nbytes", True), ("block_nbytes", 1), ("block_nbytes", 2 * BLOCK_NBYTES), ("block_nbytes", None),
        ("layout", None), ("layout", []), ("layout", "x"), ("layout", {}), ("layout", {"digest": "01" * 16}),
        ("layout", {"digest": "../../x", "nbytes": 1}), ("layout", {"digest": "01" * 16, "nbytes": -1}),
        ("layout", {"digest": "01" * 16, "nbytes": True}), ("layout", {"digest": "01" * 16, "nbytes": 1 << 50}),
        ("layout", {"digest": "AB" * 16, "nbytes": 1}), ("layout", {"digest": f"{'01' * 16}\n", "nbytes": 1}),
        ("adapter", []), ("adapter", "x"), ("adapter", {}), ("adapter", False),
        ("metrics", None), ("metrics", []), ("metrics", {"loss": None}), ("metrics", {"loss": True}),
        ("metrics", {"loss": "low"}), ("metrics", {"loss": "Infinity"}),
        ("versions", None), ("versions", "2.11"),
        ("shards", None), ("shards", {}), ("shards", []), ("shards", [None]), ("shards", [[]]), ("shards", "x"),
    ],
)  # fmt: skip
def test_a_field_that_makes_no_sense_is_refused_with_the_file_named(name: str, value: Any) -> None:
    with pytest.raises(ManifestError) as caught:
        parsed({name: value})
    assert caught.value.path == PATH


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", True), ("rank", 0), ("rank", 2), ("rank", -1), ("rank", "1"), ("rank", 1 << 60),
        ("path", "../../x"), ("path", "/etc/passwd"), ("path", f"/{SMALL.shards[1].path}"), ("path", ""),
        ("path", None),
        ("path", f"../other-run/{SMALL.shards[1].path}"), ("path", f"s3://bucket/{SMALL.shards[1].path}"),
        ("path", f"{SMALL.shards[1].path}\n"), ("path", PATH), ("path", "run.json"),
        ("nbytes", True), ("nbytes", -1), ("nbytes", 5000), ("nbytes", 5015), ("nbytes", 5017), ("nbytes", 1 << 60),
        ("body_nbytes", 4999), ("body_nbytes", 5016), ("body_nbytes", -1), ("body_nbytes", 5000.0),
        ("body_nbytes", 1 << 60),
        ("digest", ""), ("digest", 7), ("digest", "ab" * 15), ("digest", "AB" * 16), ("digest", "xy" * 16),
    ],
)  # fmt: skip
def test_a_shard_that_makes_no_sense_is_refused_with_the_file_named(name: str, value: Any) -> None:
    with pytest.raises(ManifestError) as caught:
        parsed(shard={name: value})
    assert caught.value.path == PATH


CONFIG = {"path": f"{SMALL.key.adapter}adapter_config.json", "nbytes": 7, "digest": "ab" * 16}
MODEL = {"path": f"{SMALL.key.adapter}other/adapter_model.safetensors", "nbytes": 7, "digest": "ab" * 16}


def test_the_files_of_an_adapter_folder_are_read_as_they_were_written() -> None:
    found = parsed({"adapter": {"component": "model.inner", "files": [CONFIG, MODEL]}})
    assert found.adapter is not None
    assert [file.to_json() for file in found.adapter.files] == [CONFIG, MODEL]
    assert found.nbytes == SMALL.nbytes + 14
    assert set(found.sizes) - set(SMALL.sizes) == {CONFIG["path"], MODEL["path"]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("path", "../../x"), ("path", "/etc/passwd"), ("path", SMALL.shards[0].path), ("path", PATH), ("path", None),
        ("path", f"{SMALL.key.adapter}../../../run.json"), ("path", f"{SMALL.key.adapter}../adapter_config.json"),
        ("path", f"{SMALL.key.adapter}a/b/adapter_config.json"), ("path", f"{SMALL.key.adapter}config.json"),
        ("path", MODEL["path"].replace("0000007", "0000008")), ("path", f"{CONFIG['path']}\n"),
        ("nbytes", True), ("nbytes", -1), ("nbytes", 1 << 60), ("nbytes", "7"), ("nbytes", None),
        ("digest", ""), ("digest", "AB" * 16), ("digest", None),
    ],
)  # fmt: skip
def test_a_file_of_an_adapter_folder_that_makes_no_sense_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ManifestError) as caught:
        parsed({"adapter": {"component": "model", "files": [CONFIG | {name: value}]}})
    assert caught.value.path == PATH


@pytest.mark.parametrize(
    "folder",
    [
        {"component": "model", "files": []}, {"component": "", "files": [CONFIG]}, {"component": "model"},
        {"component": "model", "files": [MODEL, CONFIG]}, {"component": "model", "files": [CONFIG, CONFIG]},
        {"component": "m" * 5000, "files": [CONFIG]}, {"files": [CONFIG]},
    ],
)  # fmt: skip
def test_an_adapter_folder_that_makes_no_sense_is_refused(folder: dict[str, Any]) -> None:
    with pytest.raises(ManifestError) as caught:
        parsed({"adapter": folder})
    assert caught.value.path == PATH


@pytest.mark.parametrize("order", [(1, 0), (0, 0), (1, 1), (0,), (1,), (0, 1, 1), (0, 1, 2)])
def test_the_shards_are_one_of_each_rank_in_order(order: tuple[int, ...]) -> None:
    shards = [record(SMALL.key, rank).to_json() for rank in order]
    with pytest.raises(ManifestError, match="shards are not one for each of 2 ranks, in order"):
        parsed({"shards": shards})


def test_what_a_later_version_adds_beside_our_fields_does_not_matter() -> None:
    assert parsed({"comment": {"any": ["thing"]}}) == SMALL

"""Each benchmark runs, small, and gives the JSON it promises; and it tells the torn from the whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.common.crew import Crew, CrewError
from benchmarks.common.report import Column
from benchmarks.common.rounds import Setting, medians
from benchmarks.peers import SYSTEMS, Entry, install
from benchmarks.tables.page import PAGE, README, page, with_tables

ROOT = Path(__file__).parents[2]
SMALL = ["--mib", "1", "--systems", "dcpsvc,dcp_thread_cached"]
ONE_RANK = Setting("fsdp2", 1)
PROMISED = {
    "bench": ({"stall_s", "visible_s", "added_s", "durable_s", "speed", "memory", "cpu_s_per_gib"}, ["--rounds", "1"]),
    "bench_stall": ({"blocked_s", "next_s", "stall_s", "visible_s", "added_s", "cpu_s"}, ["--rounds", "1"]),
    "bench_write": ({"durable_s", "first_durable_s", "gib_per_s"}, ["--rounds", "1", "--settings", "ddpx2"]),
    "bench_interference": ({"step_s", "speed", "added_s"}, ["--rounds", "1"]),
    "bench_memory": ({"memory", "memory_grown"}, ["--saves", "2"]),
    "bench_first_save": ({"first_blocked_s", "tenth_durable_s", "durable_ratio"}, ["--rounds", "1"]),
}
FACTS = {"command", "commit", "cpu", "cores", "memory_gib", "file_system", "kernel", "torch"}


def run(script, *arguments):
    command = [sys.executable, "-m", f"benchmarks.{script}", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_tables_of_the_documents_are_those_of_the_results():
    assert PAGE.read_text() == page(), "python -m benchmarks.tables"
    readme = README.read_text()
    assert readme == with_tables(readme), "python -m benchmarks.tables"


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("script", PROMISED)
def test_a_benchmark_measures_ours_and_a_peer_in_one_run(script, tmp_path):
    promised, arguments = PROMISED[script]
    result = run(script, *SMALL, *arguments, "--dir", str(tmp_path), "--out", str(tmp_path / "results" / "one.json"))
    (rows,) = result["settings"].values()
    assert [row["system"] for row in rows] == ["dcpsvc", "dcp_thread_cached"]
    for row in rows:
        assert "skipped" not in row
        assert promised <= row.keys()
        assert row["torn"] == 0
        assert row["limits"].keys() == {"memcpy_s", "direct_s", "hash_s"}
    assert result["facts"].keys() >= FACTS
    assert json.loads((tmp_path / "results" / "one.json").read_text()) == result
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_resume_benchmark_reads_warm_and_cold_and_counts_what_it_fetches(tmp_path):
    result = run("bench_resume", "--mib", "32", "--rounds", "1", "--dir", str(tmp_path))
    for setting in ("warm", "cold"):
        rows = {row["system"]: row for row in result["settings"][setting]}
        assert {"dcpsvc", "plain reads", "safetensors", "DCP load"} <= rows.keys()
        assert all(row["seconds"] > 0 for row in rows.values())
    for setting in ("warm", "cold"):
        for what in ("resume, local tier", "from process start"):
            rows = {row["system"]: row for row in result["settings"][f"{what}, {setting}"]}
            assert {"dcpsvc", "plain reads", "DCP load"} == rows.keys()
            assert all(row["seconds"] > 0 for row in rows.values())
            assert rows["dcpsvc"]["over_mib"] < 256
    assert result["resharded"][0]["ranks"] == "4 -> 4"
    assert all(row["from_root_when_shared"] < 1.02 for row in result["resharded"])
    assert result["facts"].keys() >= FACTS
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_ceiling_benchmark_reads_the_same_files_in_each_way_and_says_what_the_proof_costs(tmp_path):
    result = run("bench_ceiling", "--mib", "32", "--rounds", "1", "--dir", str(tmp_path))
    for setting in ("warm", "cold"):
        rows = {row["system"]: row for row in result["settings"][setting]}
        touched = {"plain read", "read and hash", "hash", "hash, then read", "hash, then read and hash"}
        new = {"plain read, new memory", "read and hash, new memory", "read and hash, new huge pages"}
        assert rows.keys() == touched | new | {"dcpsvc", "DCP load"}
        assert all(row["seconds"] > 0 and row["x_plain"] > 0 for row in rows.values())
        assert rows["plain read"]["x_plain"] == rows["plain read, new memory"]["x_plain"] == 1
    assert result["facts"]["threads"] >= 1
    assert result["facts"].keys() >= FACTS
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_export_benchmark_measures_time_and_memory_beside_loading_and_saving(tmp_path):
    result = run("bench_export", "--mib", "32", "--rounds", "1", "--dir", str(tmp_path))
    rows = {row["system"]: row for row in result["rows"]}
    assert {
        "export hf",
        "load + safetensors save_file",
        "export torch",
        "load + torch.save",
        "import dcp",
    } <= rows.keys()
    assert all(row["seconds"] > 0 and row["largest_nbytes"] > 0 for row in rows.values())
    assert rows["export hf"]["anon_nbytes"] < 2 * rows["export hf"]["largest_nbytes"]
    assert result["facts"].keys() >= FACTS
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_replicas_benchmark_measures_every_way_to_compare(tmp_path):
    result = run("bench_replicas", "--mib", "16", "--rounds", "1", "--dir", str(tmp_path))
    assert [row["way"] for row in result["rows"]] == ["off", "hash", "full"]
    assert all(row["committed_s"] > 0 and row["cpu_s"] > 0 for row in result["rows"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_adapter_benchmark_shows_that_an_adapter_is_a_small_part_of_what_it_trains_on(tmp_path):
    pytest.importorskip("peft")
    rows = {row["way"]: row["nbytes"] for row in run("bench_adapter", "--small", "--dir", str(tmp_path))["rows"]}
    assert list(tmp_path.iterdir()) == []
    alone = rows["the adapter"]
    assert alone < rows["the adapter and its PEFT folder"] < 1.5 * alone
    assert 5 * alone < rows["the adapter and its base"] < rows["everything is trained"]


def test_the_scale_benchmark_measures_every_phase_and_what_each_rank_says_does_not_grow_with_the_ranks():
    result = run("bench_scale", "--ranks", "2,512", "--tensors", "100")
    small, large = ({row["phase"]: row for row in result["rows"] if row["ranks"] == ranks} for ranks in (2, 512))
    assert small.keys() == large.keys()
    assert {
        "plan",
        "plan again",
        "layout",
        "read layout",
        "agree",
        "ack local",
        "ack remote",
        "manifest",
        "commit",
        "discover",
    } < small.keys()
    assert all({"s", "nbytes", "peak_mib"} <= phase.keys() for phase in small.values())
    assert small["manifest"]["nbytes"] < large["manifest"]["nbytes"]
    assert large["layout"]["nbytes"] < 2 * small["layout"]["nbytes"]
    assert small["steady"]["nbytes"] == pytest.approx(large["steady"]["nbytes"], abs=50)


def test_the_scale_benchmark_has_a_layout_that_does_not_grow_with_the_ranks_under_hsdp_either():
    found = [run("bench_scale", "--ranks", ranks, "--tensors", "50", "--replicas", "4") for ranks in ("16", "512")]
    small, large = ({row["phase"]: row for row in result["rows"]} for result in found)
    assert large["layout"]["nbytes"] < 1.5 * small["layout"]["nbytes"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_its_benchmark_says_why_it_is_skipped():
    assert "finds no CUDA device" in run("bench_gpu")["skipped"]


def test_a_snapshot_that_changes_with_the_state_is_told_from_a_whole_one(tmp_path):
    torn, whole = (
        crew_does(entry, tmp_path)["torn"] for entry in (Entry("torn", "tests.unit.torn_system"), SYSTEMS["dcp"])
    )
    assert torn > 0
    assert whole == 0


def test_a_system_that_cannot_start_says_why_and_leaves_nothing(tmp_path):
    with pytest.raises(CrewError, match="ModuleNotFoundError"):
        crew_does(Entry("absent", "tests.unit.no_such_system"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_torn_system_is_not_compared():
    column = Column("stall s", "stall_s", of_ours=True, limit="memcpy_s")
    row = {"stall_s": 2.0, "ours": {"stall_s": 4.0}, "limits": {"memcpy_s": 1.0}, "torn": 0}
    assert list(column.cells(row)) == ["2.000", "0.50", "2.00"]
    assert list(column.cells(row | {"torn": 3})) == ["2.000", "-", "-"]


def test_medians_are_taken_over_the_rounds_also_of_lists():
    rounds = [{"s": 1.0, "each_s": [1, 9]}, {"s": 5.0, "each_s": [2, 8]}, {"s": 2.0, "each_s": [9, 1]}]
    assert medians(rounds) == {"s": 2.0, "each_s": [2, 8]}


def test_a_peer_without_an_environment_is_skipped_with_the_reason(tmp_path):
    assert Entry("absent", "nowhere", environment="no-such-peer").python is None
    assert install.reason("absent", tmp_path) == "not installed: make peers"
    (tmp_path / "absent.failed").write_text("ERROR: no matching distribution\n")
    assert install.reason("absent", tmp_path) == "ERROR: no matching distribution"


@pytest.mark.parametrize("text", ["fsdp1x2", "ddp", "ddpx0", "x2", "ddpx2t0", "ddpx2t"])
def test_a_setting_that_makes_no_sense_is_refused(text):
    with pytest.raises(ValueError, match="use fsdp2x1"):
        Setting.parse(text)


def test_a_setting_says_on_how_many_threads_each_rank_trains():
    assert Setting.parse("fsdp2x1t1") == Setting("fsdp2", 1, threads=1)
    assert str(Setting.parse("fsdp2x1t1")) == "fsdp2 x 1, 1 thread each"
    assert Setting.parse("ddpx16") == Setting("ddp", 16)


def crew_does(entry, directory):
    crew = Crew(entry, ONE_RANK, 1, directory)
    try:
        crew.ready()
        return crew.do("at_once")
    finally:
        crew.end()


def test_the_writers_benchmark_measures_thread_and_process_and_leaves_nothing(tmp_path):
    result = run("bench_writer", "--mib", "40", "--rounds", "1", "--dir", str(tmp_path))
    assert [row["who"] for row in result["rows"]] == ["thread", "process"]
    assert all(row["write_s"] > 0 for row in result["rows"])
    assert list(tmp_path.iterdir()) == []

"""What observers make of a real run's events: a log, metrics, spans, and who was waited for."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from click.testing import CliRunner

import dcpsvc
from dcpsvc import Event, Observers, Point, PrometheusMetrics, RunLog, Spans
from dcpsvc.cli import cli
from dcpsvc.errors import ConfigError, StoreUnavailableError
from dcpsvc.observing import runlog
from dcpsvc.observing.phases import PHASES, SaveTimes, Tracker, stragglers
from dcpsvc.reading import open_root
from dcpsvc.storage.memory import MemoryStore
from dcpsvc.storage.posix import PosixStore
from dcpsvc.tools import reporting


def train(folder, observer, steps=(1, 2)):
    """Save a step or two with an observer."""
    state = {"x": torch.arange(1000.0)}
    with dcpsvc.Checkpointer(folder / "root", state, local=folder / "local", on_event=observer) as ckpt:
        ckpt.resume()
        for step in steps:
            ckpt.save(step, metrics={"loss": 1.0}).wait(30)


def told(seconds, **about) -> SaveTimes:
    return SaveTimes(**({"step": 1, "attempt": "a", "rank": 0, "began": 0.0, "seconds": seconds} | about))


# --- the log --------------------------------------------------------------------------------------


def test_the_log_of_a_run_is_at_its_root_after_closing_with_the_seconds_of_each_phase(tmp_path):
    train(tmp_path, RunLog(tmp_path / "root"))
    saves, events, _ = runlog.read(open_root(tmp_path / "root"))
    assert [(save.step, save.rank, save.outcome) for save in saves] == [(1, 0, "committed"), (2, 0, "committed")]
    assert all(set(save.seconds) == set(PHASES.values()) for save in saves)
    assert all(save.nbytes and save.nbytes > 4000 for save in saves)
    assert [event["event"] for event in events] == ["opened", "resumed", "closed"]
    assert all("NaN" not in path.read_text() for path in (tmp_path / "root" / "events").iterdir())


def test_every_start_of_the_job_has_a_log_of_its_own(tmp_path):
    train(tmp_path, RunLog(tmp_path / "root"))
    train(tmp_path, RunLog(tmp_path / "root"), steps=(3,))
    assert len(list((tmp_path / "root" / "events").iterdir())) == 2
    assert [save.step for save in runlog.read(open_root(tmp_path / "root"))[0]] == [1, 2, 3]
    assert [each.step for each in dcpsvc.list_checkpoints(tmp_path / "root")] == [1, 2, 3]


def test_the_local_log_has_a_json_line_for_each_event_at_once_and_tells_the_same(tmp_path):
    seen: list[Event] = []
    train(tmp_path, Observers(seen.append, RunLog(folder=tmp_path / "logs")))
    (path,) = (tmp_path / "logs").iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["event"] for line in lines) == sorted(event.name for event in seen)  # of two threads
    assert all(line["rank"] == 0 and line["t"] > 1e9 for line in lines)
    saves, events, _ = runlog.read_folder(tmp_path / "logs")
    assert [save.step for save in saves] == [1, 2]
    assert [event["event"] for event in events] == ["opened", "resumed", "closed"]


def test_a_log_that_broke_off_is_read_as_far_as_it_goes(tmp_path):
    train(tmp_path, RunLog(folder=tmp_path / "logs"))
    (path,) = (tmp_path / "logs").iterdir()
    whole = path.read_text()
    cut = whole[: whole.index('"event":"committed"') + 40]  # in the middle of a line
    path.write_text(cut + '\n[1]\n{"event":"nonsense","rank":0,"t":1}\n{"t":"x"}\n')
    assert runlog.read_folder(tmp_path / "logs")[0] == []
    assert [event["event"] for event in runlog.read_folder(tmp_path / "logs")[1]] == ["opened", "resumed"]


def test_a_failed_save_is_in_the_log_with_its_reason(tmp_path):
    class Raises:
        def state_dict(self):
            raise ValueError("no state today")

        def load_state_dict(self, state):
            raise NotImplementedError

    log = RunLog(tmp_path / "root")
    ckpt = dcpsvc.Checkpointer(tmp_path / "root", {"bad": Raises()}, local=tmp_path / "local", on_event=log)
    with pytest.raises(dcpsvc.SaveError, match="no state today"):
        ckpt.save(1).wait(30)
    with pytest.raises(dcpsvc.SaveError):
        ckpt.close()
    saves, events, _ = runlog.read(open_root(tmp_path / "root"))
    assert [(save.step, save.outcome) for save in saves] == [(1, "failed")]
    assert "no state today" in saves[0].detail
    assert "save-failed" in [event["event"] for event in events]


def test_a_run_root_that_takes_no_log_does_not_break_closing(tmp_path, caplog):
    class Refuses(MemoryStore):
        def put(self, key, data):
            raise dcpsvc.StoreError("put", key, "no")

    log = RunLog(Refuses("refuses-logs"))
    log(Event(name=Point.CLOSED, rank=0))
    assert "is not at the run root" in caplog.text


def test_a_folder_that_cannot_be_written_is_told_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    train(tmp_path, RunLog(folder=tmp_path / "file" / "logs"))
    assert caplog.text.count("events are no longer written") == 1


def test_an_observer_that_raises_keeps_nothing_from_the_others(tmp_path):
    seen: list[Event] = []

    def raises(event):
        raise RuntimeError("strange")

    train(tmp_path, Observers(raises, seen.append), steps=(1,))
    assert Point.COMMITTED in [event.name for event in seen]


def test_with_run_log_a_run_leaves_its_log_at_its_root_beside_an_observer_of_ones_own(tmp_path):
    seen: list[Event] = []
    with dcpsvc.Checkpointer(
        tmp_path / "root", {"x": 1}, local=tmp_path / "local", run_log=True, on_event=seen.append
    ) as ckpt:
        ckpt.save(1).wait(30)
    assert Point.CLOSED in [event.name for event in seen]
    assert [save.step for save in runlog.read(open_root(tmp_path / "root"))[0]] == [1]


def test_the_report_of_a_run_without_a_log_says_how_to_get_one(tmp_path, caplog):
    train(tmp_path, None)
    reporting.report(open_root(tmp_path / "root"))
    assert "no times of saves: jobs with run_log=True leave them there" in caplog.text
    caplog.clear()
    train(tmp_path, RunLog(tmp_path / "root"), steps=(3,))
    reporting.report(open_root(tmp_path / "root"))
    assert "no times of saves" not in caplog.text


class Flaky(PosixStore):
    """Each shard is taken at the second try."""

    def __init__(self, root) -> None:
        super().__init__(root)
        self._refused: set[str] = set()

    def put_file(self, key, path, *, progress=None):
        if key not in self._refused:
            self._refused.add(key)
            raise StoreUnavailableError("put_file", key, "503 SlowDown")
        super().put_file(key, path, progress=progress)


def test_calls_that_were_made_again_are_counted_in_statistics_and_log(tmp_path):
    (tmp_path / "root").mkdir()
    store = Flaky(tmp_path / "root")
    with dcpsvc.Checkpointer(store, {"x": 1}, local=tmp_path / "local", run_log=True) as ckpt:
        for step in (1, 2):
            ckpt.save(step).wait(30)
        assert ckpt.statistics().retries == 2
    saves, _, _ = runlog.read(open_root(tmp_path / "root"))
    assert [(save.step, save.retries) for save in saves] == [(1, 1), (2, 1)]
    with dcpsvc.Checkpointer(tmp_path / "root", {"x": 1}, local=tmp_path / "local", save_last=False) as ckpt:
        assert ckpt.statistics().retries == 0


def test_calls_that_were_made_again_are_counted_in_metrics(tmp_path):
    pytest.importorskip("prometheus_client")
    path = tmp_path / "metrics.prom"
    (tmp_path / "root").mkdir()
    with dcpsvc.Checkpointer(
        Flaky(tmp_path / "root"), {"x": 1}, local=tmp_path / "local", on_event=PrometheusMetrics(path)
    ) as ckpt:
        ckpt.save(1).wait(30)
    assert 'dcpsvc_store_retries_total{rank="0"} 1.0' in path.read_text()


KILLED = """
import os, pathlib, signal, sys
import torch, dcpsvc
root, local = sys.argv[1:]
ckpt = dcpsvc.Checkpointer(root, {"x": torch.arange(1000.0)}, local=local, run_log=True)
ckpt.resume()
for step in (1, 2):
    ckpt.save(step).wait(30)
ckpt.wait(30)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_job_left_on_its_disk_is_brought_to_the_run_root_by_the_next_start(tmp_path):
    root, local = tmp_path / "root", tmp_path / "local"
    command = [sys.executable, "-c", KILLED, str(root), str(local)]
    assert subprocess.run(command, check=False, timeout=50).returncode == -signal.SIGKILL
    assert runlog.read(open_root(root)).saves == []
    (left,) = local.glob("*/events/*")
    assert [save.step for save in runlog.read_folder(left.parent).saves] == [1, 2]
    with dcpsvc.Checkpointer(root, {"x": torch.zeros(1000)}, local=local, run_log=True) as ckpt:
        assert ckpt.resume() == 2
        ckpt.save(3).wait(30)
    saves, events, skipped = runlog.read(open_root(root))
    assert ([save.step for save in saves], skipped) == ([1, 2, 3], [])
    assert [event["event"] for event in events] == ["opened", "resumed", "opened", "resumed", "closed"]
    assert list(local.glob("*/events/*")) == []
    jobs = reporting.gather([], saves, events)["jobs"]
    assert jobs["starts"] == 2
    assert 0 < jobs["blocked_s"] < jobs["seconds"]


def test_segments_come_to_the_run_root_while_the_job_runs_and_tell_each_save_once(tmp_path):
    log = RunLog(tmp_path / "root", spool=tmp_path / "spool", segment_saves=2)
    seen: list[int] = []

    def look(event):
        if event.name is Point.CLOSED:
            seen.append(len(runlog.read(open_root(tmp_path / "root")).saves))

    train(tmp_path, Observers(look, log), steps=range(1, 8))
    assert seen[0] >= 4
    saves, _, _ = runlog.read(open_root(tmp_path / "root"))
    assert [save.step for save in saves] == list(range(1, 8))
    assert len(list((tmp_path / "root" / "events").iterdir())) >= 3
    assert list((tmp_path / "spool").iterdir()) == []


def test_the_log_of_a_process_that_lives_is_left_to_it(tmp_path):
    living = RunLog(MemoryStore("living"), spool=tmp_path)
    living(Event(name=Point.OPENED, rank=0))
    other = RunLog(MemoryStore("living"), spool=tmp_path)
    other(Event(name=Point.CLOSED, rank=1))
    assert [event["rank"] for event in runlog.read(MemoryStore("living")).events] == [1]
    living(Event(name=Point.CLOSED, rank=0))
    assert sorted(event["rank"] for event in runlog.read(MemoryStore("living")).events) == [0, 0, 1]


def test_lines_that_could_not_be_brought_away_go_with_the_next_segment(tmp_path, caplog):
    class Sometimes(MemoryStore):
        refuses = True

        def put(self, key, data):
            if self.refuses:
                raise dcpsvc.StoreError("put", key, "no")
            super().put(key, data)

    store = Sometimes("sometimes")
    log = RunLog(store, spool=tmp_path, segment_saves=1)
    for step in (1, 2):
        for name in (Point.SAVE_ACCEPTED, Point.COMMITTED):
            log(Event(name=name, rank=0, step=step, attempt="1-a-0"))
        log.flush()
        store.refuses = False
    assert "is not at the run root" in caplog.text
    assert [save.step for save in runlog.read(store).saves] == [1, 2]
    assert list(tmp_path.iterdir()) == []


def test_files_of_the_log_that_are_too_large_are_named_in_the_report(tmp_path):
    train(tmp_path, RunLog(tmp_path / "root"))
    with (tmp_path / "root" / "events" / "large.rank-00000.00000.jsonl").open("wb") as file:
        file.truncate(runlog.MAX_NBYTES + 1)
    saves, _, (skipped,) = runlog.read(open_root(tmp_path / "root"))
    assert "large.rank-00000.00000.jsonl: 64 MiB, more than 64" in skipped
    assert len(saves) == 2
    assert skipped in reporting.report(open_root(tmp_path / "root"))
    done = CliRunner().invoke(cli, ["report", str(tmp_path / "root"), "-o", str(tmp_path / "page.html"), "--json"])
    assert (done.exit_code, done.stderr) == (0, f"not read: {skipped}\n")
    assert json.loads(done.stdout)["skipped"] == [skipped]


# --- phases ---------------------------------------------------------------------------------------


def test_the_phases_of_a_save_add_up_to_all_of_it():
    tracker = Tracker()
    points = [Point.SAVE_ACCEPTED, *PHASES]
    ended = None
    for number, point in enumerate(points):
        ended = tracker.take(Event(name=point, rank=3, step=7, attempt="a", nbytes=5), 100.0 + number, float(number**2))
    assert ended is not None
    assert ended.total_s == (len(points) - 1) ** 2
    assert ended.seconds["stage"] == 1.0
    assert ended.seconds["commit"] == 13.0
    assert (ended.rank, ended.step, ended.began, ended.nbytes) == (3, 7, 100.0, 5)
    assert tracker.open_attempts() == 0


def test_saves_whose_end_is_never_told_are_forgotten():
    tracker = Tracker()
    for step in range(1000):
        tracker.take(Event(name=Point.SAVE_ACCEPTED, rank=0, step=step, attempt="a"), 0.0, 0.0)
    assert tracker.open_attempts() <= 64


def test_the_rank_that_the_others_waited_for_is_named_with_the_phase():
    saves = [told({"stage": 0.1, "write": 1.0, "upload": 2.0}, rank=rank) for rank in range(8)]
    saves[5] = told({"stage": 0.1, "write": 1.1, "upload": 9.0}, rank=5)
    (found,) = stragglers(saves)
    assert (found.who.rank, found.who.phase, found.who.seconds, found.who.median_s) == (5, "upload", 9.0, 2.0)
    assert str(found) == "step 1: rank 5 took 9.00 s to upload, the median 2.00 s"


def test_ranks_that_are_alike_and_a_rank_alone_have_no_straggler():
    assert stragglers([told({"upload": 2.0 + rank / 100}, rank=rank) for rank in range(8)]) == []
    assert stragglers([told({"upload": 0.001}), told({"upload": 0.01}, rank=1)]) == []
    assert stragglers([told({"upload": 2.0})]) == []


def test_a_line_of_the_log_reads_back():
    save = told({"stage": 0.5}, nbytes=3, outcome="failed", detail="why")
    assert SaveTimes.from_json(json.loads(json.dumps(save.to_json()))) == save


# --- Prometheus -----------------------------------------------------------------------------------


def test_the_text_file_has_the_counters_of_the_rank(tmp_path):
    pytest.importorskip("prometheus_client")
    train(tmp_path, PrometheusMetrics(tmp_path / "dcpsvc-{rank}.prom"))
    text = (tmp_path / "dcpsvc-0.prom").read_text()
    assert 'dcpsvc_saves_total{outcome="committed",rank="0"} 2.0' in text
    assert 'dcpsvc_committed_step{rank="0"} 2.0' in text
    assert 'dcpsvc_phase_seconds_count{phase="upload",rank="0"} 2.0' in text
    assert 'dcpsvc_saves_under_way{rank="0"} 0.0' in text


def test_the_endpoint_answers_on_this_machine_only_and_closes_with_the_job(tmp_path):
    pytest.importorskip("prometheus_client")
    metrics = PrometheusMetrics(port=0)
    url = f"http://127.0.0.1:{metrics.port}/metrics"
    assert metrics._server[0].server_address[0] == "127.0.0.1"
    scraped: list[str] = []

    def scrape(event):
        if event.name is Point.COMMITTED:
            with urllib.request.urlopen(url, timeout=10) as answer:
                scraped.append(answer.read().decode())

    train(tmp_path, Observers(metrics, scrape), steps=(5,))
    assert 'dcpsvc_committed_step{rank="0"} 5.0' in scraped[0]
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=10)


@pytest.mark.parametrize("given", [{}, {"path": "a", "port": 1}])
def test_metrics_need_one_place_to_go(given):
    with pytest.raises(ConfigError, match="one of path= and port="):
        PrometheusMetrics(**given)


# --- OpenTelemetry --------------------------------------------------------------------------------


def test_a_save_is_a_span_and_its_phases_lie_inside_it(tmp_path):
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    train(tmp_path, Spans(provider.get_tracer("test")), steps=(1,))
    *parts, whole = exporter.get_finished_spans()
    assert whole.name == "dcpsvc.save"
    assert whole.attributes["dcpsvc.outcome"] == "committed"
    assert [part.name for part in parts] == [f"dcpsvc.{phase}" for phase in PHASES.values()]
    assert all(part.parent.span_id == whole.context.span_id for part in parts)
    assert (parts[0].start_time, parts[-1].end_time) == (whole.start_time, whole.end_time)


# --- what training waited for ---------------------------------------------------------------------


class Slow(PosixStore):
    """Takes its time with shards."""

    def put_file(self, key, path, *, progress=None):
        ends = time.monotonic() + 0.15
        while time.monotonic() < ends:
            time.sleep(0.02)
        super().put_file(key, path, progress=progress)


@pytest.mark.parametrize(
    ("options", "waits"),
    [
        ({"staging": "overlap"}, {"optimizer"}),
        ({"staging": "block", "max_inflight": 1, "backpressure": "wait"}, {"room"}),
        ({"staging_nbytes": 1}, {"save"}),
    ],
    ids=["overlap", "backpressure", "streaming"],
)
def test_what_training_waited_for_is_the_same_in_the_log_the_report_and_the_statistics(tmp_path, options, waits):
    model = torch.nn.Linear(1500, 1500)
    optimizer = torch.optim.Adam(model.parameters())
    (tmp_path / "root").mkdir()
    seen: list[Event] = []
    log = RunLog(tmp_path / "root", folder=tmp_path / "logs")
    with dcpsvc.Checkpointer(
        Slow(tmp_path / "root"), {"model": model, "optim": optimizer}, local=tmp_path / "local",
        on_event=Observers(log, seen.append), **options,
    ) as ckpt:  # fmt: skip
        for step in range(1, 5):
            model(torch.ones(1, 1500)).sum().backward()
            if step == 1:
                optimizer.step()  # makes the state of which the saves consist
            ckpt.save(step)
            optimizer.step()  # nothing in between: the copy cannot have been faster each time
        ckpt.wait(30)
        blocked_s = ckpt.statistics().blocked_s
    assert {event.phase for event in seen if event.name is Point.TRAINING_WAITED and event.seconds > 1e-4} >= waits
    for told in (runlog.read(open_root(tmp_path / "root")), runlog.read_folder(tmp_path / "logs")):
        assert sum(save.blocked_s for save in told.saves) == pytest.approx(blocked_s, abs=1e-4)
    data = reporting.gather([], told.saves, told.events)
    assert data["jobs"]["blocked_s"] == pytest.approx(blocked_s, abs=1e-4)


def test_what_training_waited_for_a_save_that_is_committed_already_counts_for_it():
    log = RunLog(MemoryStore("late-waits"))
    about = {"rank": 0, "step": 1, "attempt": "1-a-0"}
    for name, seconds in ((Point.SAVE_ACCEPTED, None), (Point.COMMITTED, None), (Point.TRAINING_WAITED, 2.5)):
        log(Event(name=name, seconds=seconds, phase="save", **about))
    log(Event(name=Point.CLOSED, rank=0))
    (save,), _, _ = runlog.read(MemoryStore("late-waits"))
    assert save.waited == {"save": 2.5}

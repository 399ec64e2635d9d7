"""R20: a live job answers its own user, and nobody can disturb it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dcpsvc.commandline.failures import remedy as remedy_of
from dcpsvc.control import Control, Request, conversation, place, server
from dcpsvc.errors import RankFailure, SaveFailedError, WaitTimeoutError
from dcpsvc.tools import live

BOUND_S = 20.0
NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")


class Training:
    """The training side, as far as a client sees it: the test resolves what was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.said = threading.Condition()
        self.request = Request()
        self.note: object = "idle"

    def _ask(self, what: str) -> Request:
        with self.said:
            self.asked.append(what)
            self.said.notify_all()
        return self.request

    def await_asked(self, times: int) -> None:
        with self.said:
            assert self.said.wait_for(lambda: len(self.asked) >= times, BOUND_S), self.asked

    def status(self) -> dict[str, object]:
        if isinstance(self.note, Exception):
            raise self.note
        return {"step": 7, "note": self.note}

    def save(self) -> Request:
        return self._ask("save")

    def stop(self, *, save: bool) -> Request:
        return self._ask(f"stop save={save}")

    def abort(self) -> Request:
        return self._ask("abort")


@pytest.fixture
def run_id() -> str:
    return secrets.token_hex(6)


@pytest.fixture(autouse=True)
def runtime(monkeypatch):
    """A directory for the sockets, with a short name that others may enter."""
    with tempfile.TemporaryDirectory(prefix="dcpsvc-run-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        yield Path(directory)


@pytest.fixture
def training() -> Training:
    return Training()


@pytest.fixture
def control(run_id, training):
    serving = Control(run_id, 3, training)
    assert serving.place is not None
    yield serving
    serving.close()


@contextlib.contextmanager
def connected(control):
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(BOUND_S)
        client.connect(str(control.place.path))
        yield client


def heard(client) -> list[dict[str, object]]:
    """Everything the server says until it closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):  # it closed without having read all we sent
        while more := client.recv(1 << 16):
            received += more
    return [json.loads(line) for line in received.splitlines()]


def line(**message) -> bytes:
    return json.dumps({"v": 1} | message).encode() + b"\n"


def said(control, data: bytes) -> list[dict[str, object]]:
    with connected(control) as client:
        with contextlib.suppress(BrokenPipeError):  # refused before it said anything
            client.sendall(data)
        return heard(client)


def happens(client, event: int) -> bool:
    """Until something happens to a connection."""
    poller = select.poll()
    poller.register(client, event)
    return poller.poll(BOUND_S * 1000) != []


def one(run_id) -> live.LiveRank:
    (rank,) = live.ranks(run_id)
    return rank


def works(run_id) -> bool:
    return one(run_id).status.get("step") == 7


# --- the socket -------------------------------------------------------------------------------------


def test_the_socket_belongs_to_this_user_alone(runtime, run_id, control):
    path = control.place.path

    assert path == runtime / "dcpsvc" / f"{run_id}-{os.getpid()}.sock"
    assert stat.filemode(path.parent.stat().st_mode) == "drwx------"
    assert stat.filemode(path.stat().st_mode) == "srw-------"


def test_a_directory_that_others_could_enter_is_closed_to_them_first(runtime, run_id, training):
    (runtime / "dcpsvc").mkdir(mode=0o777)
    (runtime / "dcpsvc").chmod(0o777)

    control = Control(run_id, 0, training)
    mode = stat.filemode((runtime / "dcpsvc").stat().st_mode)
    control.close()

    assert mode == "drwx------"


def test_without_a_runtime_directory_the_temporary_one_is_used(runtime, run_id, training, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime / "gone"))
    monkeypatch.setattr(tempfile, "tempdir", str(runtime))

    control = Control(run_id, 0, training)
    path, answers = control.place.path, works(run_id)
    control.close()

    assert path.parent == runtime / f"dcpsvc-control-{os.geteuid()}"
    assert answers


@needs_root
def test_a_runtime_directory_of_another_user_is_not_used(runtime, run_id, training, monkeypatch):
    foreign = runtime / "foreign"
    foreign.mkdir()
    os.chown(foreign, NOBODY, NOBODY)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(foreign))
    monkeypatch.setattr(tempfile, "tempdir", str(runtime))

    control = Control(run_id, 0, training)
    path = control.place.path
    control.close()

    assert path.is_relative_to(runtime / f"dcpsvc-control-{os.geteuid()}")
    assert list(foreign.iterdir()) == []


def symlink(runtime):
    (runtime / "elsewhere").mkdir()
    (runtime / "dcpsvc").symlink_to(runtime / "elsewhere")
    return runtime, "symlink"


def foreign_owner(runtime):
    (runtime / "dcpsvc").mkdir()
    os.chown(runtime / "dcpsvc", NOBODY, NOBODY)
    return runtime, f"belongs to user {NOBODY}"


def long_path(runtime):
    long = runtime / ("x" * 90)
    long.mkdir()
    return long, "bytes are more than the 107 a socket may have"


def a_file(runtime):
    (runtime / "dcpsvc").touch()
    return runtime, "Not a directory"


@pytest.mark.parametrize("trap", [symlink, pytest.param(foreign_owner, marks=needs_root), long_path, a_file])
def test_where_no_socket_can_be_made_one_warning_says_why_and_training_goes_on(
    runtime, run_id, monkeypatch, caplog, trap
):
    directory, reason = trap(runtime)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", str(runtime / "gone"))

    control = Control(run_id, 5, Training())
    control.close()

    (record,) = caplog.records
    assert (record.levelno, control.place) == (logging.WARNING, None)
    assert "rank 5 cannot be controlled" in record.getMessage()
    assert reason in record.getMessage()
    assert list(directory.rglob("*.sock")) == []


def test_a_job_is_found_from_a_shell_with_another_temporary_directory(runtime, run_id, training, monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(tempfile, "tempdir", str(runtime))
    control = Control(run_id, 0, training)

    monkeypatch.setattr(tempfile, "tempdir", "/var/tmp")  # noqa: S108
    answers = works(run_id)
    control.close()

    assert answers


def abandoned_socket(path: Path) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def dead_pid() -> int:
    child = subprocess.Popen(["true"])  # noqa: S607
    child.wait()
    return child.pid


def test_a_client_removes_the_socket_of_a_dead_process(runtime, run_id, control):
    stale = runtime / "dcpsvc" / f"{run_id}-{dead_pid()}.sock"
    abandoned_socket(stale)

    assert [rank.pid for rank in live.ranks(run_id)] == [os.getpid()]
    assert not stale.exists()
    assert control.place.path.exists()


def test_a_job_that_starts_removes_what_dead_ones_left_even_under_its_own_number(runtime, run_id, training):
    stale = [runtime / "dcpsvc" / f"{run_id}-{pid}.sock" for pid in (os.getpid(), dead_pid())]
    for path in stale:
        abandoned_socket(path)

    control = Control(run_id, 0, training)
    found, answers, path = list((runtime / "dcpsvc").iterdir()), works(run_id), control.place.path
    control.close()

    assert found == [path] == [stale[0]]
    assert answers


def test_the_socket_of_a_live_process_that_does_not_listen_yet_is_left_alone(runtime, run_id):
    early = runtime / "dcpsvc" / f"{run_id}-{os.getppid()}.sock"
    abandoned_socket(early)

    assert live.ranks(run_id) == []
    assert early.exists()


def test_files_with_other_names_are_left_alone(runtime, run_id, training):
    (runtime / "dcpsvc").mkdir(mode=0o700)
    other = runtime / "dcpsvc" / "notes.sock"
    other.touch()

    Control(run_id, 0, training).close()

    assert list((runtime / "dcpsvc").iterdir()) == [other]


@needs_root
def test_another_user_is_turned_away_even_where_the_files_would_let_him_in(run_id, training, control):
    control.place.path.parent.chmod(0o755)
    control.place.path.chmod(0o666)
    code = f"""
import os, socket
os.setgroups([])
os.setresgid(*[{NOBODY}] * 3)
os.setresuid(*[{NOBODY}] * 3)
client = socket.socket(socket.AF_UNIX)
client.connect({str(control.place.path)!r})
try:
    client.sendall(b'{{"v": 1, "command": "abort"}}\\n')
except BrokenPipeError:
    pass
print(client.recv(4096).decode())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert json.loads(done.stdout)["error"] == "PermissionError", done.stderr
    assert training.asked == []
    assert works(run_id)


# --- what can be asked ------------------------------------------------------------------------------


def test_status_is_what_the_training_side_says(run_id, control):
    rank = one(run_id)

    assert (rank.rank, rank.pid, rank.problem) == (3, os.getpid(), "")
    assert rank.status == {"step": 7, "note": "idle"}


@pytest.mark.parametrize(
    ("asked", "command"),
    [
        ({"command": "save"}, "save"),
        ({"command": "stop", "save": True}, "stop save=True"),
        ({"command": "stop", "save": False}, "stop save=False"),
        ({"command": "abort"}, "abort"),
    ],
)
def test_a_command_is_answered_when_it_is_done_and_the_step_is_told_before(run_id, training, control, asked, command):
    steps: list[int] = []
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(live.command, one(run_id), asked, BOUND_S, steps.append)
        training.await_asked(1)
        training.request.agree(9)
        assert not answer.done()
        training.request.resolve({"step": 9, "attempt": "cafe-0", "state": "committed"})

        assert answer.result(BOUND_S) == {"step": 9, "attempt": "cafe-0", "state": "committed"}
    assert training.asked == [command]
    assert steps == [9]


def test_several_clients_wait_for_one_save_while_another_asks_for_the_status(run_id, training, control):
    with ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(live.command, one(run_id), {"command": "save"}, BOUND_S) for _ in range(3)]
        training.await_asked(3)
        assert works(run_id)
        assert not any(answer.done() for answer in answers)
        training.request.resolve({"step": 9})

        assert [answer.result(BOUND_S) for answer in answers] == [{"step": 9}] * 3


def test_a_save_that_fails_is_told_with_its_type_and_text(run_id, training, control):
    failure = RankFailure(1, "upload", "StoreFullError", "put data/x: no space left")
    training.request.fail(SaveFailedError(9, "cafe-0", 5, (failure,)))

    with pytest.raises(
        live.NotDoneError, match=r"^SaveFailedError: step 9 \(attempt cafe-0\): rank 1 failed in upload.*step 5 remains"
    ):
        live.command(one(run_id), {"command": "save"}, BOUND_S)


def test_an_answer_that_does_not_come_is_given_up_and_says_so(run_id, training, control):
    with pytest.raises(
        live.NoAnswerError, match=r"rank 3 .* did not answer within 0.2 s; what was asked stands"
    ) as caught:
        live.command(one(run_id), {"command": "save"}, 0.2)

    assert remedy_of(caught.value).startswith("dcpsvc status ROOT shows how far")
    assert works(run_id)


@pytest.mark.parametrize("note", [RuntimeError("the store is gone"), object()])
def test_a_status_that_cannot_be_had_is_told_and_the_next_one_is_served(run_id, training, control, note):
    training.note = note

    broken = one(run_id)
    training.note = "idle"

    assert broken.rank == 3
    assert "the store is gone" in broken.problem or "not JSON serializable" in broken.problem
    assert works(run_id)


def test_who_is_not_answered_when_the_job_ends_is_told_so(run_id, training, control):
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(live.command, one(run_id), {"command": "save"}, BOUND_S)
        training.await_asked(1)
        control.close()

        with pytest.raises(live.NotDoneError, match="ClosedError: the job ended"):
            answer.result(BOUND_S)


def test_an_answer_given_just_before_the_end_arrives(run_id, training, control):
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(live.command, one(run_id), {"command": "stop", "save": True}, BOUND_S)
        training.await_asked(1)
        training.request.resolve({"step": 9})
        control.close()

        assert answer.result(BOUND_S) == {"step": 9}


# --- clients that misbehave -------------------------------------------------------------------------

RUBBISH = {
    "nothing": b"\n",
    "no JSON": b"{\n",
    "no text": bytes(range(128, 138)) + b"\n",
    "no object": b"[1]\n",
    "no version": b'{"command": "save"}\n',
    "another version": b'{"v": 2, "command": "save"}\n',
    "no command": line(),
    "an unknown command": line(command="format"),
    "a command that is no text": line(command=["save"]),
    "a stop that does not say whether to save": line(command="stop"),
    "a stop with a number": line(command="stop", save=1),
    "deep": b"[" * 4000 + b"\n",
    "long": b"x" * 100_000,
    "long and then a line": b" " * 100_000 + line(command="save"),
}


@pytest.mark.parametrize("rubbish", RUBBISH.values(), ids=list(RUBBISH))
def test_rubbish_is_refused_and_nothing_is_done(run_id, training, control, rubbish):
    with connected(control) as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before the end
            client.sendall(rubbish)
        last = heard(client)[-1]

    assert (last["event"], last["error"]) == ("failed", "ProtocolError")
    assert training.asked == []
    assert works(run_id)


def test_a_line_may_come_in_pieces(training, control):
    training.request.resolve({"step": 9})
    with connected(control) as client:
        for byte in line(command="save"):
            client.sendall(bytes([byte]))

        assert heard(client)[-1] == {"v": 1, "event": "done", "answer": {"step": 9}}


def test_a_client_that_says_nothing_is_sent_away_and_others_are_served_meanwhile(run_id, control, monkeypatch):
    monkeypatch.setattr(conversation, "TALK_S", 0.5)
    with connected(control) as silent:
        assert works(run_id)
        assert heard(silent)[-1]["error"] == "TimeoutError"


def test_a_client_that_does_not_take_its_answer_is_dropped_and_others_are_served(
    run_id, training, control, monkeypatch
):
    monkeypatch.setattr(conversation, "TALK_S", 0.5)
    training.note = "x" * 5_000_000
    with connected(control) as deaf:
        deaf.sendall(line(command="status"))
        assert happens(deaf, select.POLLIN), "nothing was said"
        training.note = "idle"
        assert works(run_id)
        assert happens(deaf, select.POLLHUP), "it is still waited for"


def test_an_answer_beyond_all_bounds_is_not_taken_by_our_client(run_id, training, control):
    training.note = "x" * 5_000_000

    assert "a line of more than 1048576 bytes" in one(run_id).problem


def test_what_a_client_asked_for_stands_when_it_leaves(run_id, training, control):
    with connected(control) as client:
        client.sendall(line(command="save"))
        training.await_asked(1)
    training.request.resolve({"step": 9})

    assert works(run_id)
    assert training.asked == ["save"]


def test_one_client_too_many_is_told_to_come_again(run_id, training, control, monkeypatch):
    monkeypatch.setattr(server, "MAX_CLIENTS", 2)
    with connected(control) as first, connected(control) as second:
        for waiting in (first, second):
            waiting.sendall(line(command="save"))
        training.await_asked(2)
        assert said(control, line(command="status"))[-1]["error"] == "BusyError"
        assert "2 clients are being served" in one(run_id).problem
    training.request.resolve({})

    deadline = time.monotonic() + BOUND_S
    while not works(run_id):  # those two have left: noticed at the next turn
        assert time.monotonic() < deadline


def test_a_training_side_that_hangs_in_a_command_does_not_keep_the_job_from_ending(run_id, training, monkeypatch):
    monkeypatch.setattr(server, "FAREWELL_S", 0.2)
    entered, leave, left = threading.Event(), threading.Event(), threading.Event()

    def stuck():
        entered.set()
        leave.wait(BOUND_S)
        left.set()
        return Request()

    training.save = stuck
    control = Control(run_id, 0, training)
    path = control.place.path
    with connected(control) as client:
        client.sendall(line(command="save"))
        assert entered.wait(BOUND_S)
        control.close()
        left_over, was_waited_for = path.exists(), left.is_set()
        leave.set()
        heard(client)

    assert (left_over, was_waited_for) == (False, False)


# --- processes --------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys, time
from dcpsvc.control import Control, Request

class Training:
    def status(self): return {"step": 7}
    def save(self):
        print("asked", flush=True)
        return Request()

control = Control(sys.argv[1], 0, Training())
print("ready", flush=True)
"""


@contextlib.contextmanager
def job(run_id, then="signal.pause()"):
    """Another process that serves, and then does something."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD + then, run_id], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_a_process_that_is_killed_before_it_answers_is_told_to_the_client(run_id, runtime):
    with job(run_id) as process, ThreadPoolExecutor(1) as threads:
        answer = threads.submit(live.command, one(run_id), {"command": "save"}, BOUND_S)
        assert process.stdout.readline() == "asked\n"
        process.kill()

        with pytest.raises(live.NotDoneError, match=rf"rank 0 \(process {process.pid}\) ended before it answered"):
            answer.result(BOUND_S)

    assert live.ranks(run_id) == []
    assert list((runtime / "dcpsvc").iterdir()) == []


def await_stopped(pid):
    """A signal takes effect some time after it was sent."""
    tasks = (path / "stat" for path in Path(f"/proc/{pid}/task").iterdir())
    for task in tasks:
        ends = time.monotonic() + 20
        while task.read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < ends
            time.sleep(0.01)


def test_a_stopped_process_is_shown_as_one_that_does_not_answer(run_id, monkeypatch):
    monkeypatch.setattr(live, "ANSWER_S", 0.5)
    with job(run_id) as process:
        process.send_signal(signal.SIGSTOP)
        await_stopped(process.pid)
        rank = one(run_id)
        process.send_signal(signal.SIGCONT)

    assert (rank.rank, rank.pid, dict(rank.status)) == (None, process.pid, {})
    assert "no answer within" in rank.problem


FORK = """
child = os.fork()
if child == 0:
    control.close()
    print("child", os.getpid(), control.place, flush=True)
    sys.stdin.readline()
    os._exit(0)
signal.pause()
"""


def test_a_forked_child_neither_serves_nor_takes_its_parents_socket_away(run_id, runtime):
    with job(run_id, FORK) as process:
        word, child, where = process.stdout.readline().split()
        assert (word, where) == ("child", "None")

        assert works(run_id)  # the parent, after the child has closed its copy
        assert one(run_id).pid == process.pid
        process.kill()
        process.wait()
        os.kill(int(child), 0)  # the child lives on

        assert live.ranks(run_id) == []
        assert list((runtime / "dcpsvc").iterdir()) == []
        process.stdin.write("\n")


def test_a_client_that_breaks_off_does_not_kill_a_script_that_restored_sigpipe(run_id):
    with job(
        run_id, "signal.signal(signal.SIGPIPE, signal.SIG_DFL); print('set', flush=True); signal.pause()"
    ) as process:
        assert process.stdout.readline() == "set\n"
        (at,) = place.found(run_id)
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(at.path))
                client.sendall(line(command="status"))

        assert works(run_id)
        assert process.poll() is None


def test_two_processes_that_say_they_are_one_rank_are_not_commanded(run_id, tmp_path, training, control):
    (tmp_path / "run.json").write_text(json.dumps({"format": 1, "run_id": run_id, "created": "now"}))
    second = {"rank": 3, "path": control.place.path.with_name(f"{run_id}-{os.getppid()}.sock")}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(second["path"]))
        listener.listen()

        def serve():
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(line(event="hello", rank=3, pid=1) + line(event="done", answer={"step": 1}))

        with ThreadPoolExecutor(1) as threads:
            threads.submit(serve)
            with pytest.raises(live.NotDoneError, match="both say they are rank 3"):
                live.speaker(str(tmp_path))


def test_nothing_is_left_after_the_end(run_id, training):
    before = (len(list(Path("/proc/self/fd").iterdir())), threading.active_count())
    for _ in range(5):
        control = Control(run_id, 0, training)
        path = control.place.path
        with connected(control) as client:
            client.sendall(line(command="save"))
            training.await_asked(1)
            control.close()
            control.close()

    assert (len(list(Path("/proc/self/fd").iterdir())), threading.active_count()) == before
    assert not path.exists()


def test_control_and_its_tools_need_no_torch():
    modules = "dcpsvc.control, dcpsvc.tools.live, dcpsvc.tools.drill, dcpsvc.cli"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- a request --------------------------------------------------------------------------------------


def test_the_first_word_about_a_request_stands():
    done, failed = Request(), Request()
    done.resolve({"step": 1})
    done.fail(RuntimeError("late"))
    failed.fail(RuntimeError("first"))
    failed.resolve({"step": 1})

    assert done.wait(0) == {"step": 1}
    with pytest.raises(RuntimeError, match="first"):
        failed.wait(0)


def test_waiting_for_a_request_is_bounded():
    with pytest.raises(WaitTimeoutError, match="still waiting for: the answer to a command"):
        Request().wait(0.01)


def test_a_listener_that_comes_late_is_told_at_once():
    request, told = Request(), threading.Event()
    request.agree(4)
    request.listen(told.set)

    assert told.is_set()

"""The ranks' store when it does not answer: nobody hangs, it works again afterwards, and nothing late does harm."""

import contextlib
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from dcpsvc.ranks.c10d import C10dStore, Group
from dcpsvc.ranks.line import NoAnswerError

PATIENCE_S, SOON_S = 1.0, 20.0
SILENCE_S = 5.0


class Network:
    """Stands between clients and the server of a store, and can be cut: bytes wait, connections stay.

    A cut network, and a server that was stopped, look like this to a client.
    """

    def __init__(self):
        self.server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._whole = threading.Event()
        self._whole.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads, self._sockets, self._forgotten = [], [], set()
        self._start(self._accept)

    def client(self, timeout_s=5.0):
        port = self._listener.getsockname()[1]
        return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=timeout_s))

    def cut(self):
        self._whole.clear()

    def heal(self):
        self._whole.set()

    def forget_connections(self):
        """As a firewall that restarts: nothing passes on what was connected before, and nobody is told."""
        self._forgotten |= set(self._sockets)

    def reset_connections(self):
        for end in list(self._sockets):
            _shut(end)

    def close(self):
        self.heal()
        _shut(self._listener)
        self.reset_connections()
        for thread in self._threads:
            thread.join(SOON_S)
        for end in (self._listener, *self._sockets):
            end.close()

    def _accept(self):
        try:
            while True:
                self._whole.wait()
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self.server.port))
                self._sockets += [near, far]
                self._start(self._pump, near, far)
                self._start(self._pump, far, near)
        except OSError:
            return

    def _pump(self, source, sink):
        try:
            while data := source.recv(65536):
                self._whole.wait()
                if source not in self._forgotten:
                    sink.sendall(data)
        except OSError:
            pass
        _shut(sink)

    def _start(self, function, *args):
        thread = threading.Thread(target=function, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()


def _shut(end):
    with contextlib.suppress(OSError):  # it is down already
        end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def network():
    network = Network()
    yield network
    network.close()
    until(lambda: not store_threads())


@pytest.fixture
def kv(network):
    kv = C10dStore(network.client(), PATIENCE_S)
    kv.set("before", "1")
    assert kv.get("before") == "1"
    yield kv
    kv.close()


def store_threads():
    return [thread for thread in threading.enumerate() if thread.name == "dcpsvc-ranks-store"]


def until(condition):
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def answers(kv, key="before", value="1"):
    try:
        return kv.get(key) == value
    except RuntimeError:
        return False


CALLS = {
    "get": lambda kv: kv.get("key"),
    "set": lambda kv: kv.set("key", "x"),
    "compare_set": lambda kv: kv.compare_set("key", "x"),
}

# --- nobody hangs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [False, True], ids=["it stood still", "the connection is gone"])
def test_a_call_is_answered_after_a_silence_longer_than_one_connection_is_trusted(network, lost):
    kv = C10dStore(network.client(), 3 * SILENCE_S)
    kv.set("before", "1")
    if lost:
        network.forget_connections()
    else:
        network.cut()
        threading.Timer(1.2 * SILENCE_S, network.heal).start()
    assert kv.get("before") == "1"
    kv.close()


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_gets_no_answer_raises_in_time_and_says_what_it_wanted(network, kv, call):
    network.cut()
    began = time.monotonic()
    with pytest.raises(NoAnswerError, match=rf"{call} key: .*has not answered for 1\.\d s"):
        CALLS[call](kv)
    assert time.monotonic() - began < SOON_S


def test_while_a_call_hangs_the_others_fail_at_once_and_none_is_kept_for_later(network, kv):
    network.cut()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(kv.get, f"key {number}") for number in range(8)]
        errors = [future.exception(SOON_S) for future in waiting]
    assert {type(error) for error in errors} == {NoAnswerError}
    began = time.monotonic()
    for number in range(1000):
        with pytest.raises(NoAnswerError):
            kv.get(f"further key {number}")
    assert time.monotonic() - began < 1000 * PATIENCE_S / 10
    assert kv._exchange._line._desk.calls.qsize() < 8
    assert len(store_threads()) == 2  # the one that hangs, and one that tries to connect anew


def test_a_call_behind_one_that_hangs_waits_no_longer_than_that_one(network):
    patience_s = 3.0
    kv = C10dStore(network.client(), patience_s)
    network.cut()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(kv.get, "key")
        until(lambda: time.monotonic() - kv._exchange._line._desk.busy_since > patience_s / 2)
        second = pool.submit(kv.get, "key")
        silences = [float(str(future.exception(SOON_S)).split()[-2]) for future in (first, second)]
    assert all(patience_s <= silence < 1.4 * patience_s for silence in silences), silences
    kv.close()


def test_a_store_that_cannot_be_reached_at_all_is_an_error_in_time_and_leaves_no_thread(network):
    client = network.client()
    network.cut()
    with pytest.raises(NoAnswerError, match="connect"):
        C10dStore(client, PATIENCE_S)
    network.heal()
    until(lambda: not store_threads())


def test_the_store_of_the_job_is_asked_in_time_and_the_trainings_own_connection_stays_as_it_was(network):
    dist.init_process_group("gloo", store=network.client(), rank=0, world_size=1)
    try:
        theirs = dist.distributed_c10d._get_default_store()
        timeout = theirs.timeout
        kv = C10dStore.of_default_group(timeout_s=PATIENCE_S)
        kv.set("before", "1")
        network.cut()
        with pytest.raises(NoAnswerError):
            kv.get("before")
        network.heal()
        until(lambda: answers(kv))
        assert theirs.timeout == timeout
        kv.close()
    finally:
        dist.destroy_process_group()


# --- afterwards -----------------------------------------------------------------------------------


def test_when_the_network_heals_the_store_works_again_and_what_was_sent_has_arrived(network, kv):
    network.cut()
    with pytest.raises(NoAnswerError):
        kv.compare_set("sent", "late")
    network.heal()
    until(lambda: answers(kv, "sent", "late"))
    until(lambda: answers(kv) and len(store_threads()) == 1)


def test_a_verdict_that_comes_late_does_not_displace_the_first(network, kv):
    network.cut()
    with pytest.raises(NoAnswerError):
        kv.compare_set("verdict", "late")
    assert network.server.compare_set("dcpsvc/verdict", "", "first") == b"first"
    network.heal()
    until(lambda: answers(kv) and len(store_threads()) == 1)  # the late one has been answered
    assert kv.get("verdict") == "first"
    assert kv.compare_set("verdict", "again") == "first"


def test_what_was_given_up_before_it_was_sent_is_never_sent(network, kv):
    network.cut()
    with ThreadPoolExecutor(2) as pool:
        ahead = pool.submit(kv.compare_set, "ahead", "x")
        until(lambda: kv._exchange._line._desk.busy_since < time.monotonic())
        behind = pool.submit(kv.set, "behind", "x")
        assert [type(future.exception(SOON_S)) for future in (ahead, behind)] == [NoAnswerError] * 2
    network.heal()
    until(lambda: answers(kv, "ahead", "x") and len(store_threads()) == 1)
    assert kv.get("behind") is None


def test_a_connection_that_stays_silent_is_replaced_while_the_old_one_still_hangs(network, kv):
    network.forget_connections()
    with pytest.raises(NoAnswerError):
        kv.get("before")
    until(lambda: answers(kv))
    assert len(store_threads()) == 2
    assert kv.compare_set("verdict", "new") == "new"
    network.reset_connections()
    until(lambda: len(store_threads()) <= 2 and answers(kv))


def test_a_connection_that_broke_is_replaced(network, kv):
    network.reset_connections()
    with pytest.raises(RuntimeError):
        kv.get("before")
    until(lambda: answers(kv) and len(store_threads()) == 1)


def test_a_store_that_is_gone_for_good_fails_every_call_at_once_and_heaps_up_no_threads(network, kv):
    network.close()
    with pytest.raises(RuntimeError):
        kv.get("before")
    began, most = time.monotonic(), 0
    while time.monotonic() - began < 2 * PATIENCE_S:
        with pytest.raises(NoAnswerError, match="no connection to the ranks' store"):
            kv.get("before")
        most = max(most, len(store_threads()))
        time.sleep(0.001)
    assert most <= 3  # one of them at its end


# --- the end --------------------------------------------------------------------------------------


def test_close_ends_the_thread_and_further_calls_say_so(network):
    kv = C10dStore(network.client(), PATIENCE_S)
    kv.close()
    assert not store_threads()
    with pytest.raises(RuntimeError, match="closed"):
        kv.get("key")
    kv.close()


def test_close_does_not_wait_for_a_call_that_hangs_and_the_thread_ends_when_the_network_is_back(network, kv):
    network.cut()
    with pytest.raises(NoAnswerError):
        kv.get("before")
    began = time.monotonic()
    kv.close()
    assert time.monotonic() - began < 5 * PATIENCE_S  # it waits a moment, and the call hangs for ever
    network.heal()
    until(lambda: not store_threads())


def test_a_store_that_was_dropped_without_a_word_leaves_no_thread(network):
    kv = C10dStore(network.client(), PATIENCE_S)
    network.reset_connections()
    with pytest.raises(RuntimeError):
        kv.get("key")
    del kv
    until(lambda: not store_threads())


def test_a_forked_child_is_refused_at_once(kv):
    child = os.fork()
    if child == 0:
        try:
            kv.get("before")
        except NoAnswerError:
            os._exit(1)
        except RuntimeError:
            os._exit(0)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


# --- other stores ---------------------------------------------------------------------------------


class Slow(dist.Store):
    """A custom store, without ``clone()``, whose calls hang until they are let go."""

    def __init__(self):
        super().__init__()
        self.values, self.go, self.inside = {}, threading.Event(), 0
        self.go.set()

    def check(self, keys):
        self.inside += 1
        self.go.wait()
        self.inside -= 1
        return all(key in self.values for key in keys)

    def get(self, key):
        return self.values[key]

    def set(self, key, value):
        self.values[key] = value.encode() if isinstance(value, str) else value


def test_a_custom_store_that_cannot_be_cloned_is_used_itself_and_by_one_thread_only():
    store = Slow()
    kv = C10dStore(store, PATIENCE_S)
    kv.set("key", "x")
    assert kv.get("key") == "x"
    store.go.clear()
    began = time.monotonic()
    while time.monotonic() - began < 2 * PATIENCE_S:
        with pytest.raises(NoAnswerError):
            kv.get("key")
        assert store.inside == 1
        time.sleep(0.001)
    store.go.set()
    until(lambda: answers(kv, "key", "x"))
    kv.close()


def test_a_store_in_memory_keeps_its_own_timeout():
    store = dist.HashStore()
    before = store.timeout
    kv = C10dStore(store, PATIENCE_S)
    assert (kv.compare_set("key", "x"), kv.get("key"), kv.get("other")) == ("x", "x", None)
    assert store.timeout == before
    kv.close()


# --- the gloo group -------------------------------------------------------------------------------


def group(rank, world_size=2):
    return Group(rank=rank, world_size=world_size, namespace="run", timeout_s=PATIENCE_S)


def test_a_group_is_not_waited_for_longer_than_its_timeout_and_the_next_generation_stands(network):
    dist.init_process_group("gloo", store=network.client(), rank=0, world_size=1)
    try:
        first, second = group(0), group(1)
        network.cut()
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="connecting a gloo group"):
            first.renew(0)
        assert time.monotonic() - began < SOON_S
        assert first.poisoned
        network.heal()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda one: one.renew(1), (first, second)))
            gathered = list(pool.map(lambda one: one.all_gather(b"x" * one.generation), (first, second)))
        assert gathered == [[b"x", b"x"]] * 2
        assert not first.poisoned
        first.close()
        second.close()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("usual", [0, 1])
@pytest.mark.parametrize("longest", [{}, {0: 70_000}, {15: 1 << 20}, {1: 5, 2: 6, 3: 7, 4: 1000}])
def test_all_hear_what_each_has_to_say_however_much_more_some_have_than_the_rest(network, longest, usual):
    dist.init_process_group("gloo", store=network.client(), rank=0, world_size=1)
    said = [bytes([rank]) * longest.get(rank, usual * (rank % 3)) for rank in range(16)]
    try:
        groups = [group(rank, len(said)) for rank in range(len(said))]
        with ThreadPoolExecutor(len(said)) as pool:
            list(pool.map(lambda one: one.renew(0), groups))
            for heard in pool.map(lambda one, data: one.all_gather(data), groups, said):
                assert heard == said
        for one in groups:
            one.close()
    finally:
        dist.destroy_process_group()

"""The hosts themselves: reached, cut off, parted and removed as the other tests take for granted."""

import os
import select
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.hosts.network import enter

PORT = 4000
SOON_S = 20.0
REPOSITORY = Path(__file__).parents[2]


def on(hosts, host, function):
    """Call a function on a host."""
    found = []

    def work():
        enter(hosts.namespace(host))
        found.append(function())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def reaches(hosts, near, far, tries=10):
    """Several times, because an address that could not be resolved is not asked for again at once."""

    def connect():
        try:
            socket.create_connection((hosts.address(far), PORT), timeout=1.0).close()
        except TimeoutError:
            return False
        return True

    return any(on(hosts, near, connect) for _ in range(tries))


@pytest.fixture
def three(hosts):
    made = hosts(3)
    listening = [on(made, host, lambda: socket.create_server(("", PORT))) for host in range(3)]
    yield made
    for listener in listening:
        listener.close()


def test_a_host_that_is_cut_off_reaches_nobody_and_nobody_is_refused_and_all_is_well_when_it_is_back(three):
    assert reaches(three, 0, 2)
    three.cut_off(2)
    assert not reaches(three, 0, 2, tries=1)
    assert not reaches(three, 2, 1, tries=1)
    assert reaches(three, 0, 1)
    assert reaches(three, 2, 2)
    three.heal(2)
    assert reaches(three, 0, 2)


def test_hosts_that_are_parted_reach_all_but_each_other(three):
    three.part(1, 2)
    assert not reaches(three, 1, 2, tries=1)
    assert reaches(three, 0, 1)
    assert reaches(three, 2, 0)
    three.unite(1, 2)
    assert reaches(three, 1, 2)


def test_the_hosts_of_a_test_run_that_is_killed_vanish_with_it():
    program = "from pathlib import Path; from tests.hosts.network import Hosts; hosts = Hosts(1, Path())"
    program += "; print(*(place.pid for place in hosts._namespaces), flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    run = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, text=True, **pipes)
    keepers = [os.pidfd_open(int(pid)) for pid in run.stdout.readline().split()]
    assert len(keepers) == 2
    run.kill()
    run.communicate()
    for keeper in keepers:
        assert select.select([keeper], [], [], SOON_S)[0], "a process is left, and a namespace with it"
        os.close(keeper)

"""Hosts cost privileges and seconds; each test gets its own, and they are gone afterwards whatever happened."""

from pathlib import Path

import pytest

from tests.hosts import network
from tests.hosts.cluster import Cluster

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything here, so that no file can forget to; a stuck rank is the cluster's to find."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("hosts")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(200))


@pytest.fixture(autouse=True)
def possible():
    """Skip where nobody lets us make hosts."""
    if reason := network.why_not():
        pytest.skip(f"no hosts on this machine: {reason}")


@pytest.fixture
def hosts(tmp_path):
    """Makes hosts; see :class:`network.Hosts`."""
    made = []

    def make(count):
        made.append(network.Hosts(count, tmp_path))
        return made[-1]

    yield make
    for one in made:
        one.remove()


@pytest.fixture
def start(tmp_path, hosts):
    """Starts a job of so many ranks on so many hosts, or on some of a job's hosts; see :class:`Cluster`."""
    jobs = []

    def begin(*, world, on=2, beside=None, **options):
        there = hosts(on) if beside is None else beside.hosts
        jobs.append(Cluster(there, list(range(on)) if beside is None else on, world, tmp_path, **options))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.end()

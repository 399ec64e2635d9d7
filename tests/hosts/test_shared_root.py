"""A run root that several hosts have mounted is read once for all of them, and crosses each cable once."""

import contextlib
import os
import subprocess
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import dcpsvc
from tests.hosts import network
from tests.ranks.harness import Job, run_jobs, values

HOSTS, PER_HOST, PORT = 2, 2, 4000
WORLD = HOSTS * PER_HOST
MIB = 1 << 20
SECTOR = 512


def model(value):
    """96 MiB that every rank holds."""
    made = torch.nn.Linear(4096, 6144, bias=False)
    torch.nn.init.constant_(made.weight, value)
    return made


def run(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=50).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as err:
        pytest.skip(f"no file system can be mounted on this machine: {err}: {getattr(err, 'stderr', '')}")


def given_out(mounted):
    """Bytes that the disk behind a mount has given so far; what its page cache had is not among them."""
    disk = Path(f"/sys/block/loop{os.minor(mounted.stat().st_dev)}/stat")
    return int(disk.read_text().split()[2]) * SECTOR


def received(hosts, host):
    """Bytes that have come out of a host's cable so far."""
    found = []

    def look():
        network.enter(hosts.namespace(host))
        lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
        found.extend(int(line.split()[1]) for line in lines if line.strip().startswith(f"{network.INTERFACE}:"))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A file system with a run."""
    folder = tmp_path_factory.mktemp("served")
    with dcpsvc.Checkpointer(
        folder / "files" / "run", {"model": model(1.0)}, local=folder / "nvme", save_last=False
    ) as ckpt:
        ckpt.save(1).wait(60)
    run("truncate", "-s", "160M", str(folder / "image"))
    run("mkfs.ext4", "-q", "-d", str(folder / "files"), str(folder / "image"))
    return folder / "image"


@pytest.fixture
def mounted(image, tmp_path):
    """The same files as so many hosts see them, each through a page cache of its own."""
    with contextlib.ExitStack() as after:

        def mount(count):
            places = [tmp_path / f"mounted-{number}" for number in range(count)]
            for place in places:
                place.mkdir()
                disk = run("losetup", "--find", "--show", "--read-only", str(image))
                after.callback(subprocess.run, ["losetup", "--detach", disk], check=True, timeout=50)
                run("mount", "-o", "ro,noload", disk, str(place))
                after.callback(subprocess.run, ["umount", str(place)], check=True, timeout=50)
            return places

        yield mount


def load(_rank, _world, rank, namespace, address, root, read_together):
    network.enter(namespace)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "GLOO_SOCKET_IFNAME": network.INTERFACE}
    patience = timedelta(seconds=40)
    store = dist.TCPStore(address, PORT, is_master=rank == 0, timeout=patience)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=patience)
    loaded = model(0.0)
    dcpsvc.load(root, {"model": loaded}, read_together=read_together)
    dist.barrier()  # the first of them serves the store
    return bool((loaded.weight == 1.0).all())


def load_everywhere(hosts, roots, read_together=None):
    """Ranks in blocks, each with the root as its host has mounted it."""
    before = [given_out(root) for root in roots], [received(hosts, host) for host in range(HOSTS)]
    places = [(rank, rank // PER_HOST) for rank in range(WORLD)]
    jobs = [
        Job(0, load, (rank, hosts.namespace(host), hosts.address(0), roots[host % len(roots)] / "run", read_together))
        for rank, host in places
    ]
    assert all(value for outcomes in run_jobs(jobs) for value in values(outcomes))
    fetched = sum(given_out(root) for root in roots) - sum(before[0])
    return fetched, [received(hosts, host) - before[1][host] for host in range(HOSTS)]


def test_a_root_that_two_hosts_have_mounted_is_fetched_once_and_each_host_is_sent_once_what_the_other_read(
    hosts, mounted
):
    fetched, came = load_everywhere(hosts(HOSTS), mounted(HOSTS))
    print(f"fetched {fetched / MIB:.1f} MiB, came over the cables {[round(nbytes / MIB, 1) for nbytes in came]} MiB")
    assert 95 * MIB < fetched < 106 * MIB
    assert all(48 * MIB < nbytes < 56 * MIB for nbytes in came)


def test_hosts_told_to_read_by_themselves_fetch_it_once_each_and_send_each_other_nothing(hosts, mounted):
    fetched, came = load_everywhere(hosts(HOSTS), mounted(HOSTS), read_together=False)
    print(f"fetched {fetched / MIB:.1f} MiB, came over the cables {[round(nbytes / MIB, 1) for nbytes in came]} MiB")
    assert HOSTS * 95 * MIB < fetched < HOSTS * 106 * MIB
    assert all(nbytes < MIB for nbytes in came)


def test_ranks_behind_one_page_cache_have_it_from_there_and_send_each_other_nothing(hosts, mounted):
    fetched, came = load_everywhere(hosts(HOSTS), mounted(1))
    print(f"fetched {fetched / MIB:.1f} MiB, came over the cables {[round(nbytes / MIB, 1) for nbytes in came]} MiB")
    assert 95 * MIB < fetched < 106 * MIB
    assert all(nbytes < MIB for nbytes in came)

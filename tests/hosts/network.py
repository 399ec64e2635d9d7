"""Hosts for tests: network namespaces on one switch, each with an address, a disk and a cable of its own."""

from __future__ import annotations

import ctypes
import os
import subprocess
from functools import cache
from pathlib import Path

INTERFACE = "e0"
_CLONE_NEWNET = 0x40000000
_KEEP = ("unshare", "--net", "sh", "-c", "echo; exec cat")


class NoNetworkError(Exception):
    """This machine lets nobody here make hosts; the text says why."""


class _Namespace:
    """A network of its own, which lasts as long as a process that does nothing else.

    It has no name, so test runs cannot collide; and the process reads from us, so it ends when we do,
    however that may be.
    """

    def __init__(self) -> None:
        try:
            self._keeper = subprocess.Popen(
                _KEEP, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        except FileNotFoundError as err:
            raise NoNetworkError(str(err)) from None
        assert self._keeper.stdout is not None
        if self._keeper.stdout.readline() != "\n":
            raise NoNetworkError(self._keeper.communicate()[1].strip())

    @property
    def pid(self) -> str:
        return str(self._keeper.pid)

    @property
    def path(self) -> Path:
        return Path("/proc", self.pid, "ns", "net")

    def ip(self, *arguments: str) -> None:
        self.run("ip", *arguments)

    def run(self, *command: str) -> None:
        whole = ["nsenter", f"--net={self.path}", *command]
        done = subprocess.run(whole, capture_output=True, text=True, check=False, timeout=20)
        if done.returncode:
            raise NoNetworkError(f"{' '.join(command)}: {done.stderr.strip()}")

    def end(self) -> None:
        """With it go its links and addresses, once no process is left in it."""
        self._keeper.communicate()


class Hosts:
    """A switch and the hosts plugged into it. Nothing of it is visible outside, or can be reached from there.

    A host whose cable is out still sees its link up: packets go into the void, and nobody is told. That is
    what a partition looks like; a refused connection or a lost carrier would be told at once.

    Args:
        count: Hosts.
        directory: For their disks.

    Raises:
        NoNetworkError: No privileges, or a command is missing.
    """

    def __init__(self, count: int, directory: Path) -> None:
        self.count, self._directory = count, directory
        self._namespaces: list[_Namespace] = []
        try:
            self._build()
        except BaseException:
            self.remove()
            raise

    @staticmethod
    def address(host: int) -> str:
        return f"10.77.0.{host + 1}"

    def namespace(self, host: int) -> Path:
        """To :func:`enter`."""
        return self._namespaces[host].path

    def nvme(self, host: int) -> Path:
        """The host's own disk."""
        disk = self._directory / f"nvme-{host}"
        disk.mkdir(exist_ok=True)
        return disk

    def cut_off(self, host: int) -> None:
        """Pull the host's cable out of the switch."""
        self._switch.ip("link", "set", _port(host), "nomaster")

    def heal(self, host: int) -> None:
        self._switch.ip("link", "set", _port(host), "master", "switch")

    def part(self, *hosts: int) -> None:
        """These do not reach each other any more; all others still reach them, and they the others."""
        for host in hosts:
            self._switch.run("bridge", "link", "set", "dev", _port(host), "isolated", "on")

    def unite(self, *hosts: int) -> None:
        for host in hosts:
            self._switch.run("bridge", "link", "set", "dev", _port(host), "isolated", "off")

    def remove(self) -> None:
        """Everything; the processes on the hosts must have ended."""
        for namespace in self._namespaces:
            namespace.end()
        self._namespaces = []

    @property
    def _switch(self) -> _Namespace:
        return self._namespaces[-1]

    def _build(self) -> None:
        for _ in range(self.count + 1):
            self._namespaces.append(_Namespace())
        self._switch.ip("link", "add", "name", "switch", "type", "bridge")
        self._switch.ip("link", "set", "switch", "up")
        for host, namespace in enumerate(self._namespaces[:-1]):
            self._plug_in(host, namespace)

    def _plug_in(self, host: int, namespace: _Namespace) -> None:
        port = _port(host)
        namespace.ip("link", "add", INTERFACE, "type", "veth", "peer", "name", port, "netns", self._switch.pid)
        self._switch.ip("link", "set", port, "master", "switch", "up")
        namespace.ip("address", "add", f"{self.address(host)}/24", "dev", INTERFACE)
        namespace.ip("link", "set", INTERFACE, "up")
        namespace.ip("link", "set", "lo", "up")  # ranks of one host reach each other over it


def enter(namespace: Path) -> None:
    """Move the calling thread, and those it will start, into a host's network."""
    with namespace.open() as file:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), str(namespace))


@cache
def why_not() -> str:
    """Why there can be no hosts on this machine; empty if there can. Tries it once."""
    try:
        Hosts(1, Path()).remove()
    except NoNetworkError as err:
        return str(err)
    return ""


def _port(host: int) -> str:
    return f"port{host}"

"""Machines on one Ethernet segment: network namespaces on a bridge, for tests of what the kernel and neighbours do.

Invariants: nothing outside the namespaces is touched; however a test ends, they go with it. Names are unique, so tests
may run side by side. It needs root.
"""

import ctypes
import ipaddress
import itertools
import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INTERFACE = "eth0"
_CLONE_NEWNET = 0x40000000
_numbers = itertools.count()


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


class Machine:
    """A network namespace with one Ethernet interface, and two addresses of its own."""

    def __init__(self, name: str, number: int, switch: str) -> None:
        self.name = name
        self.ipv4 = f"192.0.2.{number}"
        self.ipv6 = f"2001:db8::{number}"
        _run("ip", "netns", "add", name)
        port = f"p{number}"
        self.ip("link", "add", INTERFACE, "type", "veth", "peer", "name", port, "netns", switch)
        _run("ip", "-n", switch, "link", "set", port, "master", "br0", "up")
        self.ip("link", "set", "lo", "up")
        self.ip("link", "set", INTERFACE, "up")
        self.ip("address", "add", f"{self.ipv4}/24", "dev", INTERFACE)
        self.ip("address", "add", f"{self.ipv6}/64", "dev", INTERFACE, "nodad")

    def ip(self, *arguments: str) -> str:
        return _run("ip", "-n", self.name, *arguments)

    def shell(self, script: str) -> str:
        return _run("ip", "netns", "exec", self.name, "sh", "-c", script)

    @property
    def mac(self) -> str:
        mac: str = self._links()[0]["address"]
        return mac

    def _links(self, *arguments: str) -> list[dict[str, Any]]:
        links: list[dict[str, Any]] = json.loads(self.ip("-j", "address", "show", "dev", INTERFACE, *arguments))
        return links

    def addresses(self) -> dict[str, dict[str, Any]]:
        """What is on its interface: "ip/prefix" and how."""
        every = [one for link in self._links() for one in link.get("addr_info", ())]
        return {f"{one['local']}/{one['prefixlen']}": one for one in every}

    def neighbour(self, ip: str) -> str:
        """The MAC address that it has in mind for a neighbour; empty if none."""
        entries = json.loads(self.ip("-j", "neighbour", "show", "to", ip, "dev", INTERFACE) or "[]")
        return next((entry.get("lladdr", "") for entry in entries), "")

    def socket(self, family: socket.AddressFamily, kind: socket.SocketKind, protocol: int = 0) -> socket.socket:
        """A socket of this machine, for the test itself to use: it stays where it was made."""
        made: list[socket.socket] = []

        def make() -> None:  # a thread of its own is in the namespace, and ends there
            with Path("/run/netns", self.name).open("rb") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            made.append(socket.socket(family, kind, protocol))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        return made[0]


class Segment:
    """A client and two nodes that see each other."""

    def __init__(self, prefix: str) -> None:
        self._switch = f"{prefix}-switch"
        _run("ip", "netns", "add", self._switch)
        _run("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "br0", "up")
        self.client = Machine(f"{prefix}-client", 1, self._switch)
        self.node_a = Machine(f"{prefix}-a", 11, self._switch)
        self.node_b = Machine(f"{prefix}-b", 12, self._switch)


@contextmanager
def segment() -> Iterator[Segment]:
    """A segment that is gone afterwards."""
    prefix = f"ha{os.getpid()}-{next(_numbers)}"
    try:
        yield Segment(prefix)
    finally:
        for name in ("switch", "client", "a", "b"):
            if Path("/run/netns", f"{prefix}-{name}").exists():
                _run("ip", "netns", "delete", f"{prefix}-{name}")


def family_of(ip: str) -> socket.AddressFamily:
    return socket.AF_INET if ipaddress.ip_address(ip).version == 4 else socket.AF_INET6

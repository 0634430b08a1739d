"""The machines of a cluster as network namespaces: client, nodes and witness on a LAN, the nodes on a link, too.

Job: machines, cables, and what can go wrong with them: a cable out, an interface down, packets dropped, power off, a
wall clock that jumps.
Invariants: nothing outside the namespaces is touched; however a test ends, `close` kills what runs in them and removes
them. Names are unique, so clusters may run side by side. It needs root.
Neighbours: `cluster` runs the daemons in them.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import is_running, wait_for

LAN, LINK = "lan0", "link0"
NODES = ("node-a", "node-b")
# Host -> the last number of its addresses.
_HOSTS = {"client": 1, "node-a": 11, "node-b": 12, "witness": 31}
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Addressing:
    """Of a LAN and a link; an address is what is here and a number."""

    lan: str
    link: str
    prefix_length: int
    how: str = ""  # besides, when an address is given to an interface

    def floating(self, number: int = 0) -> str:
        """Of a group."""
        return f"{self.lan}{21 + number}"


IPV4 = Addressing("192.0.2.", "198.51.100.", 24)
IPV6 = Addressing("2001:db8:1::", "2001:db8:2::", 64, "nodad")
FLOATING = IPV4.floating()


def endpoint(ip: str, port: int) -> str:
    """As it is written."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def _run(*command: str, text: str = "") -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, input=text)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}\n{text}"
    return done.stdout


class Machine:
    """A host: a namespace with an interface on the LAN, a node also with one on the link."""

    def __init__(self, name: str, namespace: str, switch: str, directory: Path, addressing: Addressing) -> None:
        self.name = name
        self._addressing = addressing
        self.namespace = namespace
        self.switch = switch
        number = _HOSTS[name]
        self.lan_ip = f"{addressing.lan}{number}"
        self.link_ip = f"{addressing.link}{number}"
        self.interfaces = (LAN, LINK) if name in NODES else (LAN,)
        self._boot_id = directory / f"{name}.boot_id"
        self._wall_clock = directory / f"{name}.wall_clock"
        self.new_boot()
        _run("ip", "netns", "add", namespace)
        self._plug_in()

    @property
    def ports(self) -> list[str]:
        """The other ends of its cables, in the namespace of the switches."""
        return [f"{self.name}-{interface}" for interface in self.interfaces]

    def _plug_in(self) -> None:
        inside, outside = ["link set lo up"], []
        for interface in self.interfaces:
            port, ip = f"{self.name}-{interface}", self.lan_ip if interface == LAN else self.link_ip
            inside += [
                f"link add {interface} type veth peer name {port} netns {self.switch}",
                f"link set {interface} up",
                f"address add {ip}/{self._addressing.prefix_length} dev {interface} {self._addressing.how}",
            ]
            outside.append(f"link set {port} master {interface} up")
        self.ip_batch(inside)
        _ip_batch(self.switch, outside)

    def ip(self, *arguments: str) -> str:
        return _run("ip", "-n", self.namespace, *arguments)

    def ip_batch(self, lines: Sequence[str]) -> None:
        _ip_batch(self.namespace, lines)

    def command(self, command: Sequence[str | Path]) -> list[str]:
        """The command that runs there; it sees a boot ID of its own, so that the machine can restart."""
        bind = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'
        enter = ["ip", "netns", "exec", self.namespace, "sh", "-c", bind, str(self._boot_id)]
        return [*enter, *self._with_wall_clock(), *map(str, command)]

    def _with_wall_clock(self) -> list[str]:
        """What goes before a command so that it sees `_wall_clock`, if that was ever set; no other clock is touched."""
        if not self._wall_clock.exists():
            return []
        (library,) = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
        shm = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'  # where it leaves files behind
        variables = {
            "LD_PRELOAD": library,
            "FAKETIME_TIMESTAMP_FILE": self._wall_clock,
            "FAKETIME_NO_CACHE": 1,
            "FAKETIME_DONT_FAKE_MONOTONIC": 1,
            "DONT_FAKE_MONOTONIC": 1,
            "FAKETIME_FORCE_MONOTONIC_FIX": 0,  # it would make threads spin that wait with a deadline
        }
        return ["sh", "-c", shm, "sh", "env", *(f"{name}={value}" for name, value in variables.items())]

    def new_boot(self) -> None:
        """What starts from now on finds that the machine has been started anew: what was only cached is lost to it."""
        self._boot_id.write_text(f"{uuid.uuid4()}\n")

    def set_wall_clock(self, ahead_s: int) -> None:
        """Its wall clock is so much ahead of the real one. Counts at once for what was started after the first time."""
        new = self._wall_clock.with_suffix(".new")
        new.write_text(f"{ahead_s:+d}\n")
        new.rename(self._wall_clock)

    # --- What it has ---

    def pids(self) -> list[int]:
        """Everything that runs there."""
        own = Path("/run/netns", self.namespace).stat().st_ino
        found = []
        for path in Path("/proc").glob("[0-9]*/ns/net"):
            with contextlib.suppress(OSError):
                if path.stat().st_ino == own:
                    found.append(int(path.parts[2]))
        return found

    @property
    def mac(self) -> str:
        mac: str = json.loads(self.ip("-j", "link", "show", "dev", LAN))[0]["address"]
        return mac

    def has_address(self, ip: str) -> bool:
        links = json.loads(self.ip("-j", "address", "show", "dev", LAN))
        return any(one["local"] == ip for link in links for one in link.get("addr_info", ()))

    def neighbour(self, ip: str) -> str:
        """The MAC address that it has in mind for a neighbour; empty if none."""
        entries = json.loads(self.ip("-j", "neighbour", "show", "to", ip, "dev", LAN) or "[]")
        return next((entry.get("lladdr", "") for entry in entries), "")

    def connections(self, to: str) -> set[int]:
        """The own ports of the TCP connections that it has to this address and port."""
        there = ("state", "established", "dst", to)
        lines = _run("ip", "netns", "exec", self.namespace, "ss", "--tcp", "--numeric", "--no-header", *there)
        return {int(line.split()[2].rpartition(":")[2]) for line in lines.splitlines()}

    def abort_connections(self, port: int) -> None:
        """To this TCP port: nothing that its ended clients had sent is sent again."""
        _run("ip", "netns", "exec", self.namespace, "ss", "--kill", "--tcp", f"dport = {port}")

    # --- What happens to it ---

    def drop(self, sources: Iterable[str] = (), tcp_ports: Iterable[int] = ()) -> None:
        """Lose every packet that comes from these addresses, and everything from or to these TCP ports."""
        rules = [f"{'ip6' if ':' in ip else 'ip'} saddr {ip} drop" for ip in sources]
        for port in tcp_ports:
            rules += [f"tcp dport {port} drop", f"tcp sport {port} drop"]
        self._nft(_chain("input", rules))

    def isolate(self) -> None:
        """Nothing reaches it and nothing leaves it, though its interfaces are up."""
        chains = _chain("input", ['iif != "lo" drop']), _chain("output", ['oif != "lo" drop'])
        self._nft(*chains)

    def drop_nothing(self) -> None:
        self._nft()

    def _nft(self, *chains: str) -> None:
        """These and no others."""
        text = "\n".join(["flush ruleset", "table inet failures {", *chains, "}"])
        _run("ip", "netns", "exec", self.namespace, "nft", "-f", "-", text=text)

    def interfaces_down(self, interfaces: Iterable[str]) -> None:
        self.ip_batch([f"link set {interface} down" for interface in interfaces])

    def interfaces_up(self) -> None:
        self.ip_batch([f"link set {interface} up" for interface in self.interfaces])

    def cables_out(self) -> None:
        """The carrier is gone on every interface, at once."""
        _ip_batch(self.switch, [f"link set {port} down" for port in self.ports])

    def cables_in(self) -> None:
        _ip_batch(self.switch, [f"link set {port} up" for port in self.ports])

    @contextlib.contextmanager
    def port_taken(self, port: int) -> Iterator[None]:
        """Some program there has this TCP port, at every address; it closes whatever connection comes."""
        program = f"""
import socket
listener = socket.create_server(("", {port}))
print(flush=True)
while True:
    listener.accept()[0].close()
"""
        command = self.command([sys.executable, "-c", program])
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline()
                yield
            finally:
                process.kill()

    def forget_floating_addresses(self) -> None:
        """As a loss of power does: those with a lifetime, which its own do not have."""
        self.ip_batch([f"addr flush dev {interface} dynamic" for interface in self.interfaces])

    def kill_all(self) -> None:
        """SIGKILL to everything there; returns when all of it has ended."""
        pids = self.pids()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(f"everything on {self.name} has ended", lambda: not any(map(is_running, pids)))

    def close(self) -> None:
        if Path("/run/netns", self.namespace).exists():
            self.kill_all()
            _run("ip", "netns", "delete", self.namespace)


class Network:
    """The machines, and the switches between them."""

    def __init__(self, directory: Path, addressing: Addressing = IPV4) -> None:
        self._prefix = f"hf{os.getpid()}-{next(_numbers)}"
        self._switch = f"{self._prefix}-switch"
        self.machines: dict[str, Machine] = {}
        try:
            _run("ip", "netns", "add", self._switch)
            bridges = [f"link add {name} type bridge" for name in (LAN, LINK)]
            _ip_batch(self._switch, bridges + [f"link set {name} up" for name in (LAN, LINK)])
            for name in _HOSTS:
                namespace = f"{self._prefix}-{name}"
                self.machines[name] = Machine(name, namespace, self._switch, directory, addressing)
        except BaseException:
            self.close()
            raise

    @property
    def client(self) -> Machine:
        return self.machines["client"]

    @property
    def witness(self) -> Machine:
        return self.machines["witness"]

    def heal(self) -> None:
        """Everything reaches everything."""
        for machine in self.machines.values():
            machine.drop_nothing()
            machine.cables_in()
            machine.interfaces_up()

    def close(self) -> None:
        for machine in self.machines.values():
            machine.close()
        if Path("/run/netns", self._switch).exists():
            _run("ip", "netns", "delete", self._switch)


def _chain(hook: str, rules: Sequence[str]) -> str:
    return "\n".join([f"chain {hook} {{", f"type filter hook {hook} priority 0;", *rules, "}"])


def _ip_batch(namespace: str, lines: Sequence[str]) -> None:
    _run("ip", "-n", namespace, "-batch", "-", text="\n".join(lines) + "\n")

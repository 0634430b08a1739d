"""Floating addresses on real interfaces, with real neighbours: rule 12, and what clients notice of a move."""

import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import PROGRAM, program_environment, wait_for
from namespaces import INTERFACE, Machine, Segment, family_of, segment

GROUP = "rg-a"
FLOATING = {4: "192.0.2.21", 6: "2001:db8::21"}
PREFIX = {4: 24, 6: 64}
ON_INTERFACE = {version: f"{FLOATING[version]}/{PREFIX[version]}" for version in FLOATING}
BOTH = {GROUP: [[address, INTERFACE] for address in ON_INTERFACE.values()]}
HOLDER = Path(__file__).with_name("address_holder.py")

# The kernel's lifetime of an address, the fuzz of its timer, and something for a busy machine.
EXPIRED_S = 2.0 + 0.5 + 1.0
# Long enough for any renewal that is due.
RENEWAL_S = 1.0

both_versions = pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])


class Holder:
    """A process on a machine that holds addresses."""

    def __init__(self, machine: Machine, groups: dict[str, list[list[str]]], log: Path, user: str = "") -> None:
        command = ["ip", "netns", "exec", machine.name, *user.split(), sys.executable, str(HOLDER), json.dumps(groups)]
        self.log = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                command,
                env=program_environment() | {"PYTHONWARNINGS": "error"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        assert self._answer() == ""

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        answer: str = json.loads(line)
        return answer

    def tell(self, what: str, group: str = GROUP, **more: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, "group": group, **more}) + "\n")
        self.process.stdin.flush()

    def do(self, what: str, group: str = GROUP, **more: Any) -> str:
        """Carried out when this returns; the problem with the group."""
        self.tell(what, group, **more)
        return self._answer()

    def claim(self, group: str = GROUP, endpoints: list[list[Any]] | None = None) -> str:
        return self.do("claim", group, endpoints=endpoints or [])

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def close(self) -> None:
        """However it is: no bug may be in its log."""
        with self.process:
            self.process.kill()
        assert "Traceback" not in self.log.read_text(), self.log.read_text()


MakeHolder = Callable[..., Holder]


@pytest.fixture
def lan() -> Iterator[Segment]:
    if os.geteuid() != 0:
        pytest.skip("Network namespaces need root.")
    with segment() as made:
        yield made


@pytest.fixture
def make_holder(lan: Segment, tmp_path: Path) -> Iterator[MakeHolder]:
    del lan  # it is there before its processes, and goes after them
    made: list[Holder] = []

    def make(machine: Machine, groups: dict[str, list[list[str]]] = BOTH, **more: Any) -> Holder:
        made.append(Holder(machine, groups, tmp_path / f"holder-{len(made)}", **more))
        return made[-1]

    yield make
    for holder in made:
        holder.close()


def is_on(machine: Machine, version: int) -> bool:
    return ON_INTERFACE[version] in machine.addresses()


def has_both(machine: Machine) -> bool:
    return set(ON_INTERFACE.values()) <= set(machine.addresses())


def is_clean(machine: Machine) -> bool:
    return not set(ON_INTERFACE.values()) & set(machine.addresses())


def assert_stays(what: str, is_so: Callable[[], bool], for_s: float = RENEWAL_S) -> None:
    """It is so at every look for so long: there is no event to wait for when nothing may happen."""
    end_s = time.monotonic() + for_s
    while time.monotonic() < end_s:
        assert is_so(), what


# --- Where an address is ----------------------------------------------------------------------


@both_versions
def test_a_claimed_address_has_a_lifetime_and_is_renewed(lan: Segment, make_holder: MakeHolder, version: int) -> None:
    assert make_holder(lan.node_a).claim() == ""
    address = lan.node_a.addresses()[ON_INTERFACE[version]]
    assert 0 < address["valid_life_time"] <= 2
    assert address["preferred_life_time"] == 0  # no connection of the node's own begins there
    assert not address.get("tentative", False)
    assert_stays("it is on the interface", lambda: is_on(lan.node_a, version), EXPIRED_S)


@both_versions
def test_the_kernel_removes_the_address_of_a_killed_process(
    lan: Segment, make_holder: MakeHolder, version: int
) -> None:
    holder = make_holder(lan.node_a)
    holder.claim()
    holder.signal(signal.SIGKILL)
    wait_for("the kernel removes the address", lambda: not is_on(lan.node_a, version), EXPIRED_S)
    assert f"{lan.node_a.ipv4}/24" in lan.node_a.addresses()


@both_versions
def test_the_kernel_removes_the_address_of_a_process_whose_event_loop_hangs(
    lan: Segment, make_holder: MakeHolder, version: int
) -> None:
    holder = make_holder(lan.node_a)
    holder.claim()
    holder.tell("hang", seconds=60)
    wait_for("the kernel removes the address", lambda: not is_on(lan.node_a, version), EXPIRED_S)


def test_a_process_that_was_stopped_does_not_bring_its_addresses_back(lan: Segment, make_holder: MakeHolder) -> None:
    holder = make_holder(lan.node_a)
    holder.do("lease", seconds=0.5)
    holder.claim()
    holder.signal(signal.SIGSTOP)
    wait_for("the kernel removes them", lambda: is_clean(lan.node_a), EXPIRED_S)
    holder.signal(signal.SIGCONT)
    wait_for("it notices", lambda: "not sure" in holder.do("ask"))
    assert_stays("they are gone", lambda: is_clean(lan.node_a))


def test_an_owner_that_was_stopped_and_still_owns_has_its_addresses_again(
    lan: Segment, make_holder: MakeHolder
) -> None:
    holder = make_holder(lan.node_a)
    holder.claim()
    holder.signal(signal.SIGSTOP)
    wait_for("the kernel removes them", lambda: is_clean(lan.node_a), EXPIRED_S)
    holder.signal(signal.SIGCONT)
    wait_for("they are back", lambda: has_both(lan.node_a), EXPIRED_S)


def test_addresses_expire_while_ownership_is_not_sure_and_come_back_after(
    lan: Segment, make_holder: MakeHolder
) -> None:
    holder = make_holder(lan.node_a)
    holder.do("lease", seconds=0)
    assert holder.claim() == ""  # whoever claims knows
    wait_for("they expire", lambda: is_clean(lan.node_a), 2 * EXPIRED_S)
    assert "not sure that this node owns it" in holder.do("ask")
    holder.do("lease", seconds=60)
    wait_for("they are back", lambda: has_both(lan.node_a), EXPIRED_S)
    assert holder.do("ask") == ""


def test_a_released_address_is_gone_at_once_and_stays_away(lan: Segment, make_holder: MakeHolder) -> None:
    holder = make_holder(lan.node_a)
    holder.claim()
    assert holder.do("release") == ""
    assert is_clean(lan.node_a)
    assert_stays("they are gone", lambda: is_clean(lan.node_a))


def test_an_orderly_end_removes_the_addresses(lan: Segment, make_holder: MakeHolder) -> None:
    holder = make_holder(lan.node_a)
    holder.claim()
    assert holder.process.stdin is not None
    holder.process.stdin.close()
    assert holder.process.wait(10) == 0
    assert is_clean(lan.node_a)


@both_versions
def test_left_overs_are_removed_at_start_wherever_they_are(lan: Segment, make_holder: MakeHolder, version: int) -> None:
    other_prefix = {4: 32, 6: 128}[version]
    lan.node_a.ip("link", "add", "other", "type", "veth", "peer", "name", "end")
    lan.node_a.ip("link", "set", "other", "up")
    lan.node_a.ip("address", "add", ON_INTERFACE[version], "dev", INTERFACE)
    lan.node_a.ip("address", "add", f"{FLOATING[version]}/{other_prefix}", "dev", "other")
    make_holder(lan.node_a)
    assert f"{FLOATING[version]}/" not in lan.node_a.ip("address", "show")
    assert f"{lan.node_a.ipv4}/24" in lan.node_a.addresses()


@both_versions
def test_an_address_that_was_put_there_for_good_becomes_temporary(
    lan: Segment, make_holder: MakeHolder, version: int
) -> None:
    holder = make_holder(lan.node_a)
    lan.node_a.ip("address", "add", ON_INTERFACE[version], "dev", INTERFACE)
    assert holder.claim() == ""
    assert lan.node_a.addresses()[ON_INTERFACE[version]]["valid_life_time"] <= 2
    assert "put there by something else" in holder.log.read_text()


def test_the_end_of_an_address_leaves_others_of_its_subnet_alone(lan: Segment, make_holder: MakeHolder) -> None:
    """Whatever came first: the kernel would take the later ones along."""
    lan.node_a.shell("echo 0 | tee /proc/sys/net/ipv4/conf/*/promote_secondaries")
    lan.node_a.ip("address", "flush", "dev", INTERFACE, "scope", "global")
    other = "192.0.2.22/24"
    holder = make_holder(lan.node_a, {GROUP: [[ON_INTERFACE[4], INTERFACE]], "rg-b": [[other, INTERFACE]]})
    holder.claim()
    holder.claim("rg-b")
    lan.node_a.ip("address", "add", f"{lan.node_a.ipv4}/24", "dev", INTERFACE)
    holder.do("release")
    left = set(lan.node_a.addresses())
    assert {other, f"{lan.node_a.ipv4}/24"} <= left
    assert ON_INTERFACE[4] not in left


def test_the_end_of_an_address_leaves_the_route_of_its_network_alone(lan: Segment, make_holder: MakeHolder) -> None:
    """An address that a router has assigned: its route has a lifetime, which ours must not replace."""
    lan.node_a.ip("address", "flush", "dev", INTERFACE, "scope", "global")
    own = ("2001:db8::11/64", "dev", INTERFACE, "nodad", "valid_lft", "3600", "preferred_lft", "1800")
    lan.node_a.ip("address", "add", *own)
    holder = make_holder(lan.node_a)
    holder.claim()
    route = json.loads(lan.node_a.ip("-6", "-j", "route", "show", "2001:db8::/64"))
    assert route[0]["expires"] > 1000
    holder.do("release")
    assert json.loads(lan.node_a.ip("-6", "-j", "route", "show", "2001:db8::/64")) != []


# --- Problems ---------------------------------------------------------------------------------


def test_a_missing_interface_is_said_and_used_when_it_appears(lan: Segment, make_holder: MakeHolder) -> None:
    holder = make_holder(lan.node_a, {GROUP: [["198.51.100.21/24", "late0"]]})
    assert holder.claim() == "198.51.100.21/24 belongs on late0, but there is no such interface."
    lan.node_a.ip("link", "add", "late0", "type", "veth", "peer", "name", "late1")
    lan.node_a.ip("link", "set", "late1", "up")
    wait_for("it is said that it is down", lambda: holder.do("ask") == "Interface late0 is down.")
    lan.node_a.ip("link", "set", "late0", "up")
    wait_for("all is well", lambda: holder.do("ask") == "")
    assert "198.51.100.21/24" in lan.node_a.ip("address", "show", "dev", "late0")


def test_a_lost_carrier_is_said(lan: Segment, make_holder: MakeHolder) -> None:
    lan.node_a.ip("link", "add", "late0", "type", "veth", "peer", "name", "late1")
    lan.node_a.ip("link", "set", "late0", "up")
    holder = make_holder(lan.node_a, {GROUP: [["198.51.100.21/24", "late0"]]})
    assert holder.claim() == "Interface late0 has no carrier."


def test_an_interface_without_ipv6_is_said(lan: Segment, make_holder: MakeHolder) -> None:
    lan.node_a.shell(f"echo 1 > /proc/sys/net/ipv6/conf/{INTERFACE}/disable_ipv6")
    problem = make_holder(lan.node_a).claim()
    assert problem.startswith(f"{ON_INTERFACE[6]} could not be added to {INTERFACE}: ")
    assert "is IPv6 disabled" in problem
    assert is_on(lan.node_a, 4)  # the other address does not suffer


def test_a_missing_permission_is_said(lan: Segment, make_holder: MakeHolder) -> None:
    holder = make_holder(lan.node_a, user="setpriv --bounding-set -all --inh-caps -all --no-new-privs")
    assert "it needs CAP_NET_ADMIN" in holder.claim()
    assert not is_on(lan.node_a, 4)


def test_a_missing_permission_to_announce_is_said(lan: Segment, make_holder: MakeHolder) -> None:
    holder = make_holder(lan.node_a, user="setpriv --bounding-set -net_raw --inh-caps -all --no-new-privs")
    holder.claim()
    wait_for("it is said", lambda: "it needs CAP_NET_RAW" in holder.do("ask"))
    assert is_on(lan.node_a, 4)


# --- What others notice -----------------------------------------------------------------------


def make_known(client: Machine, ip: str, mac: str) -> None:
    """The client talks to an address, and so finds out who has it."""
    with client.socket(family_of(ip), socket.SOCK_DGRAM) as sender:
        sender.sendto(b"anybody?", (ip, 9))
    wait_for(f"{ip} is known", lambda: client.neighbour(ip) == mac)


@both_versions
def test_neighbours_follow_an_address_that_is_handed_over(lan: Segment, make_holder: MakeHolder, version: int) -> None:
    old, new = make_holder(lan.node_a), make_holder(lan.node_b)
    old.claim()
    make_known(lan.client, FLOATING[version], lan.node_a.mac)
    old.do("release")
    new.claim()
    wait_for("the client knows", lambda: lan.client.neighbour(FLOATING[version]) == lan.node_b.mac, EXPIRED_S - 2)


@both_versions
def test_neighbours_follow_an_address_whose_owner_hangs(lan: Segment, make_holder: MakeHolder, version: int) -> None:
    """The old owner answers for the address until the kernel has removed it; in the end the new one is known."""
    old, new = make_holder(lan.node_a), make_holder(lan.node_b)
    old.claim()
    make_known(lan.client, FLOATING[version], lan.node_a.mac)
    old.signal(signal.SIGSTOP)
    new.claim()
    wait_for("the client knows", lambda: lan.client.neighbour(FLOATING[version]) == lan.node_b.mac, EXPIRED_S - 2)
    known = ("lladdr", lan.node_a.mac, "dev", INTERFACE, "nud", "stale")
    lan.client.ip("neighbour", "replace", FLOATING[version], *known)
    wait_for("it is told again", lambda: lan.client.neighbour(FLOATING[version]) == lan.node_b.mac, 3)


@pytest.fixture
def connected(lan: Segment, make_holder: MakeHolder, version: int) -> Iterator[tuple[socket.socket, Holder]]:
    """A client with an idle connection to the floating address on node a, and the process there."""
    holder = make_holder(lan.node_a)
    holder.claim()
    family = family_of(FLOATING[version])
    with (
        lan.node_a.socket(family, socket.SOCK_STREAM) as listener,
        lan.client.socket(family, socket.SOCK_STREAM) as client,
    ):
        listener.bind((FLOATING[version], 10809))
        listener.listen()
        client.settimeout(10)
        client.connect((FLOATING[version], 10809))
        server, _ = listener.accept()
        with server:
            yield client, holder


def endpoint_of(client: socket.socket) -> list[Any]:
    return [*client.getsockname()[:2], *client.getpeername()[:2]]


def was_reset(client: socket.socket, within_s: float) -> bool:
    waiting = select.poll()
    waiting.register(client, select.POLLIN)
    return bool(waiting.poll(within_s * 1000)) and client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == (
        errno.ECONNRESET
    )


@both_versions
def test_idle_clients_of_a_vanished_owner_are_reset(
    lan: Segment, make_holder: MakeHolder, connected: tuple[socket.socket, Holder], version: int
) -> None:
    client, _ = connected
    lan.node_a.ip("link", "set", INTERFACE, "down")
    odd: list[list[Any]] = [["127.0.0.1", 5000, FLOATING[4], 10809], ["", 0, "/run/nbd.sock", 0], ["x"]]
    new = make_holder(lan.node_b)
    assert new.claim(endpoints=[*odd, endpoint_of(client)]) == ""
    assert was_reset(client, 3), version


@both_versions
def test_clients_of_a_new_owner_are_reset_although_it_listens_already(
    lan: Segment, make_holder: MakeHolder, connected: tuple[socket.socket, Holder], version: int
) -> None:
    client, old = connected
    old.do("release")
    with lan.node_b.socket(family_of(FLOATING[version]), socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND: the address is not here yet
        listener.bind((FLOATING[version], 10809))
        listener.listen()
        make_holder(lan.node_b).claim(endpoints=[endpoint_of(client)])
        assert was_reset(client, 3)


@both_versions
def test_a_client_that_has_no_other_server_is_left_alone(
    lan: Segment, make_holder: MakeHolder, connected: tuple[socket.socket, Holder], version: int
) -> None:
    """A connection to an address that is not here is not spoken for."""
    client, _ = connected
    elsewhere = {GROUP: [[f"{FLOATING[version]}2/{PREFIX[version]}", INTERFACE]]}
    make_holder(lan.node_b, elsewhere).claim(endpoints=[endpoint_of(client)])
    assert not was_reset(client, 1)


# --- The command ------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A cluster file with the floating addresses of these tests."""
    floating = [{"address": address, "interface": INTERFACE} for address in ON_INTERFACE.values()]
    group = {
        "preferred_owner": "node-a",
        "nbd": "0.0.0.0:10809",
        "floating": floating,
        "link_ports": {"node-a": 7790, "node-b": 7790},
        "volumes": {"vm-a": {"backing": str(tmp_path / "vm-a.img"), "size": "1MiB"}},
    }
    cluster = {
        "cluster": "test",
        "key_file": str(tmp_path / "cluster.key"),
        "arbiter": {"kind": "manual"},
        "nodes": {"node-a": {"address": "192.0.2.11"}, "node-b": {"address": "192.0.2.12"}},
        "groups": {GROUP: group},
    }
    path = tmp_path / "cluster.yaml"
    path.write_text(json.dumps(cluster))
    return path


def release_addresses(machine: Machine, config: Path) -> "subprocess.CompletedProcess[str]":
    command = ["ip", "netns", "exec", machine.name, *PROGRAM, "release-addresses", "--config", str(config)]
    return subprocess.run(
        [*command, "--name", "node-a"], env=program_environment(), capture_output=True, text=True, check=False
    )


def test_a_command_removes_what_a_killed_node_has_left(lan: Segment, make_holder: MakeHolder, config: Path) -> None:
    holder = make_holder(lan.node_a)
    holder.claim()
    for address in ON_INTERFACE.values():  # they stay until somebody removes them
        lan.node_a.ip("address", "replace", address, "dev", INTERFACE, "valid_lft", "60", "preferred_lft", "0")
    holder.signal(signal.SIGKILL)
    holder.process.wait()
    done = release_addresses(lan.node_a, config)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == sorted(
        f"{ip} has been removed from {INTERFACE}." for ip in FLOATING.values()
    )
    assert is_clean(lan.node_a)


def test_a_command_has_nothing_to_do_where_nothing_is_left(lan: Segment, config: Path) -> None:
    done = release_addresses(lan.node_a, config)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert f"{lan.node_a.ipv4}/24" in lan.node_a.addresses()

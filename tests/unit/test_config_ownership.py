"""What the configuration says of ownership: key, heartbeats, arbiter, failover, floating addresses, failback, cache."""

from pathlib import Path

import pytest
from config_texts import TWO_MACHINES, VALID, changed, load_text, problems_in

from stortrends_ha.config import Address, Etcd, Failover, FenceAgent, Fencing, Floating, Manual, Witness

WITNESS = "arbiter: {kind: witness, address: 127.0.0.1:7900}"
FENCING = """\
arbiter:
  kind: fencing
  agents:
    node-a: {agent: fence_ipmilan, options: {ip: 203.0.113.11, lanplus: 1, password: 'a = b'}}
    node-b: {agent: /opt/fence}
"""
NBD_A = "    nbd: 127.0.0.1:10809\n"
# The first group on a floating address.
FLOATING = changed(
    TWO_MACHINES,
    (NBD_A, "    nbd: 203.0.113.21:10809\n    floating: [{address: 203.0.113.21/24, interface: eth1}]\n"),
)


def with_arbiter(arbiter: str) -> str:
    return changed(VALID, (WITNESS, arbiter))


def with_heartbeats(first: str, second: str) -> str:
    return changed(VALID, ("[127.0.0.1:7811]", first), ("[127.0.0.1:7812]", second))


def with_failover(**durations: str) -> str:
    return f"{VALID}failover: {{{', '.join(f'{key}: {value}' for key, value in durations.items())}}}\n"


class TestKeyFile:
    def test_one_path_serves_both_nodes(self, tmp_path: Path) -> None:
        path = tmp_path / "cluster.key"
        assert load_text(tmp_path, VALID).key_file == {"node-a": path, "node-b": path}

    def test_each_node_may_have_its_own(self, tmp_path: Path) -> None:
        text = changed(VALID, ("key_file: cluster.key", "key_file: {node-a: /k/a, node-b: /k/b}"))
        assert load_text(tmp_path, text).key_file == {"node-a": Path("/k/a"), "node-b": Path("/k/b")}

    def test_the_file_is_not_looked_at(self, tmp_path: Path) -> None:
        assert not (tmp_path / "cluster.key").exists()
        load_text(tmp_path, VALID)

    def test_it_is_not_a_volume(self, tmp_path: Path) -> None:
        (problem,) = problems_in(tmp_path, changed(VALID, ("key_file: cluster.key", "key_file: b/vm-b.img")))
        assert "expected one that groups.rg-b.volumes.vm-b.backing does not use" in problem


class TestHeartbeat:
    def test_without_any_given_the_path_is_the_nodes_address(self, tmp_path: Path) -> None:
        text = changed(TWO_MACHINES, ("192.0.2.2", '"2001:db8::2"'), ("192.0.2.1,", '"2001:db8::1",'))
        nodes = load_text(tmp_path, text).nodes
        assert [str(node.heartbeat[0]) for node in nodes.values()] == ["[2001:db8::1]:7800", "[2001:db8::2]:7800"]

    def test_paths_keep_their_order(self, tmp_path: Path) -> None:
        text = with_heartbeats("[127.0.0.1:1, 127.0.0.2:2]", '[127.0.0.1:3, "localhost:4"]')
        heartbeats = [node.heartbeat for node in load_text(tmp_path, text).nodes.values()]
        assert heartbeats == [
            (Address("127.0.0.1", 1), Address("127.0.0.2", 2)),
            (Address("127.0.0.1", 3), Address("localhost", 4)),
        ]

    @pytest.mark.parametrize(
        ("first", "problem"),
        [
            ("[]", "nodes.node-a.heartbeat: found 0, expected a list of 1 to 4, each an address and port"),
            ("[127.0.0.1:1, 127.0.0.1:2, 127.0.0.1:3, 127.0.0.1:4, 127.0.0.1:5]", "nodes.node-a.heartbeat: found 5"),
            ("127.0.0.1:1", "nodes.node-a.heartbeat: found '127.0.0.1:1', expected a list of 1 to 4"),
            ("[127.0.0.1]", "nodes.node-a.heartbeat[0]: found '127.0.0.1', expected an address and port"),
            ("[0.0.0.0:7811]", "nodes.node-a.heartbeat[0]: found '0.0.0.0:7811', expected an address and port"),
            ("[[]]", "nodes.node-a.heartbeat[0]: found a list, expected an address and port"),
            ("[~]", "nodes.node-a.heartbeat[0]: found nothing, expected an address and port"),
        ],
    )
    def test_a_wrong_list_is_named_by_its_place(self, tmp_path: Path, first: str, problem: str) -> None:
        assert problems_in(tmp_path, with_heartbeats(first, "[127.0.0.1:7812]"))[0].startswith(problem)

    def test_a_wrong_item_in_a_list_over_several_lines_has_its_own(self, tmp_path: Path) -> None:
        text = with_heartbeats("\n    [127.0.0.1:7811,\n    nothing]", "[127.0.0.1:7812, 127.0.0.1:7813]")
        (problem,) = problems_in(tmp_path, text)
        assert problem.startswith("nodes.node-a.heartbeat[1]: found 'nothing', expected ")
        assert problem.endswith("(line 5)")

    def test_both_nodes_have_as_many_paths(self, tmp_path: Path) -> None:
        (problem,) = problems_in(tmp_path, with_heartbeats("[127.0.0.1:1, 127.0.0.1:2]", "[127.0.0.1:3]"))
        assert problem.startswith("nodes.node-b.heartbeat: found 1, expected 2 as in nodes.node-a.heartbeat: one for ")

    def test_a_path_is_of_one_family(self, tmp_path: Path) -> None:
        (problem,) = problems_in(tmp_path, with_heartbeats("[127.0.0.1:1]", '["[::1]:2"]'))
        assert problem.startswith("nodes.node-b.heartbeat[0]: found '[::1]:2', expected an IPv4 address like nodes.nod")

    def test_on_two_machines_none_is_a_loopback_address(self, tmp_path: Path) -> None:
        text = changed(TWO_MACHINES, ("127.0.0.1:9812", "127.0.0.1:9812, heartbeat: [127.0.0.1:7800]"))
        (problem,) = problems_in(tmp_path, text)
        assert problem.startswith("nodes.node-b.heartbeat[0]: found 127.0.0.1, expected an address that the other node")

    @pytest.mark.parametrize(
        ("second", "uses"),
        [
            ("127.0.0.1:7811", "nodes.node-a.heartbeat[0]"),
            ("127.0.0.1:9811", "nodes.node-a.metrics"),
            ("127.0.0.1:7801", "nodes.node-b.heartbeat[0]"),
            ("127.0.0.1:10810", "nodes.node-b.heartbeat[0]"),
            ("127.0.0.1:7900", "nodes.node-b.heartbeat[0]"),
        ],
    )
    def test_a_port_is_its_own(self, tmp_path: Path, second: str, uses: str) -> None:
        (problem,) = problems_in(tmp_path, with_heartbeats("[127.0.0.1:7811]", f"[{second}]"))
        assert f"expected one that {uses} does not use" in problem

    def test_two_nodes_on_one_machine_do_not_get_the_same_one_by_default(self, tmp_path: Path) -> None:
        text = changed(VALID, (", heartbeat: [127.0.0.1:7811]", ""), (", heartbeat: [127.0.0.1:7812]", ""))
        (problem,) = problems_in(tmp_path, text)
        assert problem.startswith("nodes.node-b.heartbeat[0]: found '127.0.0.1:7800', expected one that nodes.node-a.")


class TestArbiter:
    def test_a_witness(self, tmp_path: Path) -> None:
        assert load_text(tmp_path, VALID).arbiter == Witness(Address("127.0.0.1", 7900))

    def test_etcd(self, tmp_path: Path) -> None:
        text = with_arbiter('arbiter: {kind: etcd, endpoints: [http://e1:2379/, "https://[2001:DB8::1]:2379"]}')
        assert load_text(tmp_path, text).arbiter == Etcd(("http://e1:2379", "https://[2001:DB8::1]:2379"))

    def test_fencing(self, tmp_path: Path) -> None:
        options = {"ip": "203.0.113.11", "lanplus": "1", "password": "a = b"}
        arbiter = load_text(tmp_path, with_arbiter(FENCING)).arbiter
        assert arbiter == Fencing({"node-a": FenceAgent("fence_ipmilan", options), "node-b": FenceAgent("/opt/fence")})
        assert "a = b" not in repr(arbiter)

    def test_manual(self, tmp_path: Path) -> None:
        assert load_text(tmp_path, with_arbiter("arbiter: {kind: manual}")).arbiter == Manual()

    @pytest.mark.parametrize(
        ("arbiter", "problem"),
        [
            ("", "arbiter: missing, expected a mapping with the key kind (witness, etcd, fencing or manual)"),
            ("arbiter: witness", "arbiter: found 'witness', expected a mapping with the key kind (witness, etcd,"),
            ("arbiter: {}", "arbiter.kind: missing, expected witness, etcd, fencing or manual"),
            ("arbiter: {kind: quorum, a: 1}", "arbiter.kind: found 'quorum', expected witness, etcd, fencing or manua"),
            ("arbiter: {kind: [etcd]}", "arbiter.kind: found a list, expected witness, etcd, fencing or manual"),
            ("arbiter: {kind: witness}", "arbiter.address: missing, expected an address and port"),
            ("arbiter: {kind: etcd}", "arbiter.endpoints: missing, expected a list of 1 to 7, each a URL"),
            ("arbiter: {kind: etcd, endpoints: [e1:2379]}", "arbiter.endpoints[0]: found 'e1:2379', expected a URL"),
            ("arbiter: {kind: etcd, endpoints: [http://e1]}", "arbiter.endpoints[0]: found 'http://e1', expected a UR"),
            ("arbiter: {kind: etcd, endpoints: [ftp://e1:1]}", "arbiter.endpoints[0]: found 'ftp://e1:1', expected"),
            ("arbiter: {kind: etcd, endpoints: [http://e1:1/v3]}", "arbiter.endpoints[0]: found 'http://e1:1/v3', "),
            ("arbiter: {kind: manual, address: e1:1}", "arbiter.address: found an unknown key, expected one of kind"),
            (
                "arbiter: {kind: etcd, endpoints: [http://e1:1], adress: e1:1}",
                "arbiter.adress: found an unknown key, expected one of kind, endpoints",
            ),
        ],
    )
    def test_a_mistake_is_named(self, tmp_path: Path, arbiter: str, problem: str) -> None:
        (found,) = problems_in(tmp_path, with_arbiter(arbiter))
        assert found.startswith(problem)

    @pytest.mark.parametrize(
        ("old", "new", "problem"),
        [
            ("    node-b: {agent: /opt/fence}\n", "", "arbiter.agents.node-b: missing, expected a mapping with the ke"),
            ("    node-b:", "    node-c: {agent: x}\n    node-b:", "arbiter.agents.node-c: found an unknown node"),
            ("/opt/fence", "bin/fence", "arbiter.agents.node-b.agent: found 'bin/fence', expected the name of a fence"),
            ("{agent: /opt/fence}", "{}", "arbiter.agents.node-b.agent: missing, expected the name of a fence agent"),
            ("{agent: /opt/fence}", "fence_x", "arbiter.agents.node-b: found 'fence_x', expected a mapping with"),
            ("lanplus: 1", "lanplus:", "arbiter.agents.node-a.options.lanplus: found nothing, expected one line"),
            ("lanplus: 1", "lanplus: [1]", "arbiter.agents.node-a.options.lanplus: found a list, expected one line"),
            ("lanplus: 1", "'lan plus': 1", "arbiter.agents.node-a.options.'lan plus': found 'lan plus' as an option'"),
            ("lanplus: 1", "action: off", "arbiter.agents.node-a.options.action: found an option that the node gives"),
            ("'a = b'", '"a\\nb"', "arbiter.agents.node-a.options.password: found a text, expected one line of printa"),
            ("  agents:", "  timeout_s: 0\n  agents:", "arbiter.timeout_s: found '0', expected seconds from 1 to 3600"),
        ],
    )
    def test_a_mistake_in_fencing_is_named(self, tmp_path: Path, old: str, new: str, problem: str) -> None:
        (found,) = problems_in(tmp_path, with_arbiter(changed(FENCING, (old, new))))
        assert found.startswith(problem)

    @pytest.mark.parametrize("port", [7801, 7811, 9812, 10809])
    def test_a_witness_on_the_same_machine_has_its_own_port(self, tmp_path: Path, port: int) -> None:
        (problem,) = problems_in(tmp_path, with_arbiter(f"arbiter: {{kind: witness, address: localhost:{port}}}"))
        assert problem.startswith(f"arbiter.address: found 'localhost:{port}', expected one that ")

    def test_a_witness_on_a_third_machine_may_have_any_port(self, tmp_path: Path) -> None:
        assert load_text(tmp_path, TWO_MACHINES).arbiter == Witness(Address("192.0.2.3", 7801))

    @pytest.mark.parametrize(
        ("host", "whose"),
        [("192.0.2.2", "node-b's"), ("127.0.0.1", "each node's own"), ("203.0.113.21", "that of groups.rg-a.floating")],
    )
    def test_a_witness_that_goes_with_a_node_is_refused(self, tmp_path: Path, host: str, whose: str) -> None:
        (problem,) = problems_in(tmp_path, changed(FLOATING, ("192.0.2.3:7801", f"{host}:7999")))
        assert problem.startswith(f"arbiter.address: found '{host}:7999', expected an address of a third machine, beca")
        assert f"{host} is {whose}" in problem


class TestFailover:
    def test_the_defaults_are_those_of_the_model(self, tmp_path: Path) -> None:
        assert load_text(tmp_path, VALID).failover == Failover()

    def test_every_value_arrives(self, tmp_path: Path) -> None:
        text = with_failover(heartbeat_interval_s="0.2", suspect_after_s="0.6", lease_s="1.01", hold_down_s="0")
        assert load_text(tmp_path, text).failover == Failover(0.2, 0.6, 1.01, 0.0)

    @pytest.mark.parametrize(("interval", "suspect"), [("0.1", "0.3"), ("0.7", "2.1"), ("0.01", "0.03")])
    def test_three_intervals_are_enough_to_suspect_whatever_their_fraction(
        self, tmp_path: Path, interval: str, suspect: str
    ) -> None:
        text = with_failover(heartbeat_interval_s=interval, suspect_after_s=suspect, lease_s="10")
        assert load_text(tmp_path, text).failover.suspect_after_s == float(suspect)

    def test_fewer_are_refused_with_the_reason(self, tmp_path: Path) -> None:
        (problem,) = problems_in(tmp_path, with_failover(heartbeat_interval_s="0.1", suspect_after_s="0.29"))
        assert problem.startswith("failover.suspect_after_s: found 0.29, expected at least 0.3, three heartbeat ")
        assert "because one or two lost datagrams must not make a node seem gone" in problem

    @pytest.mark.parametrize("lease", ["0.5", "0.9"])
    def test_a_lease_that_ends_before_an_owner_can_ask_is_refused_with_the_reason(
        self, tmp_path: Path, lease: str
    ) -> None:
        (problem,) = problems_in(tmp_path, with_failover(lease_s=lease))
        assert problem.startswith(f"failover.lease_s: found {lease}, expected more than 0.9, failover.suspect_after_s ")
        assert "because an owner has to notice that the other node is silent" in problem

    def test_all_of_it_is_said_at_once(self, tmp_path: Path) -> None:
        text = with_failover(heartbeat_interval_s="9", hold_down="1", hold_down_s="-1")
        assert [problem.split(":")[0] for problem in problems_in(tmp_path, text)] == [
            "failover.hold_down",
            "failover.hold_down_s",
            "failover.suspect_after_s",
            "failover.lease_s",
        ]


class TestFloating:
    def test_without_any_there_are_none(self, tmp_path: Path) -> None:
        group = load_text(tmp_path, VALID).groups["rg-a"]
        assert group.floating == ()
        assert group.uri("vm-a") == "nbd://127.0.0.1:10809/vm-a"

    def test_addresses_with_one_interface_for_both_nodes_or_one_for_each(self, tmp_path: Path) -> None:
        text = changed(
            FLOATING,
            ("interface: eth1}", 'interface: eth1}, {address: "2001:DB8::21/64", interface: {node-a: b.1, node-b: c}}'),
        )
        group = load_text(tmp_path, text).groups["rg-a"]
        assert group.floating == (
            Floating("203.0.113.21/24", {"node-a": "eth1", "node-b": "eth1"}),
            Floating("2001:db8::21/64", {"node-a": "b.1", "node-b": "c"}),
        )
        assert [floating.host for floating in group.floating] == ["203.0.113.21", "2001:db8::21"]

    @pytest.mark.parametrize(
        ("nbd", "uri"), [("0.0.0.0:10809", "203.0.113.21:10809"), ('"[::]:10809"', "[2001:db8::21]:10809")]
    )
    def test_clients_of_a_group_on_every_address_use_a_floating_one(self, tmp_path: Path, nbd: str, uri: str) -> None:
        text = changed(
            FLOATING,
            ("nbd: 203.0.113.21:10809", f"nbd: {nbd}"),
            ("interface: eth1}", "interface: eth1}, {address: '2001:db8::21/64', interface: eth1}"),
        )
        assert load_text(tmp_path, text).groups["rg-a"].uri("vm-a") == f"nbd://{uri}/vm-a"

    @pytest.mark.parametrize(
        ("old", "new", "problem"),
        [
            ("203.0.113.21/24", "203.0.113.21", "floating[0].address: found '203.0.113.21', expected an address with"),
            ("203.0.113.21/24", "203.0.113.21/33", "floating[0].address: found '203.0.113.21/33', expected an address"),
            ("203.0.113.21/24", "203.0.113.0/24", "floating[0].address: found '203.0.113.0/24', expected an address"),
            ("203.0.113.21/24", "203.0.113.255/24", "floating[0].address: found '203.0.113.255/24', expected an"),
            ("203.0.113.21/24", "203.0.113.21/255.255.255.0", "floating[0].address: found '203.0.113.21/255.255.255.0"),
            ("203.0.113.21/24", "224.0.0.1/24", "floating[0].address: found '224.0.0.1/24', expected an address with"),
            ("203.0.113.21/24", "host/24", "floating[0].address: found 'host/24', expected an address with its prefix"),
            ("interface: eth1", "interface: an interface", "floating[0].interface: found 'an interface', expected the"),
            ("interface: eth1", "interface: " + "e" * 16, "floating[0].interface: found 'eeeeeeeeeeeeeeee', expected"),
            ("interface: eth1", "interface: {node-a: eth1}", "floating[0].interface.node-b: missing, expected the nam"),
            (", interface: eth1", "", "floating[0].interface: missing, expected for each node the name of a network"),
            ("[{address: 203.0.113.21/24, interface: eth1}]", "203.0.113.21/24", "floating: found '203.0.113.21/24', "),
        ],
    )
    def test_a_mistake_is_named(self, tmp_path: Path, old: str, new: str, problem: str) -> None:
        (found,) = problems_in(tmp_path, changed(FLOATING, (old, new)))
        assert found.startswith(f"groups.rg-a.{problem}")

    def test_a_network_of_two_has_no_addresses_of_its_own(self, tmp_path: Path) -> None:
        text = changed(FLOATING, ("203.0.113.21/24", "203.0.113.20/31"), ("203.0.113.21:", "203.0.113.20:"))
        assert load_text(tmp_path, text).groups["rg-a"].floating[0].host == "203.0.113.20"

    @pytest.mark.parametrize("address", ["203.0.113.21/24", "203.0.113.21/25"])
    def test_one_address_is_of_one_group(self, tmp_path: Path, address: str) -> None:
        floating = f"    nbd: 0.0.0.0:10810\n    floating: [{{address: {address}, interface: eth1}}]\n"
        (problem,) = problems_in(tmp_path, changed(FLOATING, ("    nbd: 127.0.0.1:10810\n", floating)))
        assert problem.startswith("groups.rg-b.floating[0].address: found 203.0.113.21, expected one that groups.rg-a.")

    def test_it_is_no_nodes_own(self, tmp_path: Path) -> None:
        text = changed(FLOATING, ("203.0.113.21/24", "192.0.2.2/24"), ("203.0.113.21:", "192.0.2.2:"))
        (problem,) = problems_in(tmp_path, text)
        assert problem.endswith("found 192.0.2.2, expected an address that no node has: it is node-b's (line 9)")

    @pytest.mark.parametrize("nbd", ["203.0.113.22:10809", "127.0.0.1:10809", "storage.example:1", "192.0.2.1:1"])
    def test_the_group_listens_on_one_of_them(self, tmp_path: Path, nbd: str) -> None:
        (problem,) = problems_in(tmp_path, changed(FLOATING, ("203.0.113.21:10809", nbd)))
        assert problem.startswith(f"groups.rg-a.nbd: found '{nbd}', expected an address that floating has (203.0.113.2")
        assert "so that clients find the group on either node" in problem

    def test_every_ipv6_address_has_no_ipv4_one(self, tmp_path: Path) -> None:
        (problem,) = problems_in(tmp_path, changed(FLOATING, ("203.0.113.21:10809", '"[::]:10809"')))
        assert problem.startswith("groups.rg-a.nbd: found '[::]:10809', expected floating to have an IPv6 address")

    def test_without_any_the_group_does_not_listen_where_clients_find_one_node_alone(self, tmp_path: Path) -> None:
        (problem,) = problems_in(tmp_path, changed(TWO_MACHINES, (NBD_A, "    nbd: 192.0.2.2:10809\n")))
        assert problem.startswith("groups.rg-a.nbd: found '192.0.2.2:10809', expected one that floating has or that bo")
        assert problem.endswith("192.0.2.2 is node-b's alone (line 8)")

    @pytest.mark.parametrize("nbd", ["127.0.0.1:10809", "0.0.0.0:10809", "storage.example:10809", "203.0.113.21:10809"])
    def test_without_any_the_group_may_listen_where_both_nodes_can(self, tmp_path: Path, nbd: str) -> None:
        load_text(tmp_path, changed(TWO_MACHINES, (NBD_A, f"    nbd: {nbd}\n")))


def test_failback_and_cache_arrive(tmp_path: Path) -> None:
    cache = ("size: 1GiB", "size: 1GiB\n        cache: never")
    text = changed(VALID, (NBD_A, f"{NBD_A}    failback: automatic\n"), cache)
    first, second = load_text(tmp_path, text).groups.values()
    assert (first.failback, second.failback) == ("automatic", "manual")
    assert (first.volumes[0].cache, second.volumes[0].cache) == ("never", "mirrored")


def test_words_that_are_not_known_are_named_with_those_that_are(tmp_path: Path) -> None:
    text = changed(VALID, (NBD_A, f"{NBD_A}    failback: true\n"), ("size: 1GiB", "size: 1GiB\n        cache: off"))
    assert problems_in(tmp_path, text) == [
        "groups.rg-a.failback: found 'true', expected manual or automatic (line 9)",
        "groups.rg-a.volumes.vm-a.cache: found 'off', expected mirrored, always or never (line 15)",
    ]

"""The configuration file: what loads, and what is said of each mistake."""

import functools
import itertools
import os
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import config_texts
import pytest
from config_texts import REPOSITORY, TWO_MACHINES, VALID, changed, examples, problems_in

from stortrends_ha.cli.check import check
from stortrends_ha.config import (
    Address,
    Cluster,
    Etcd,
    Fencing,
    Limits,
    Manual,
    Volume,
    Witness,
    load,
)
from stortrends_ha.config.document import Mapping, Problems, Scalar, Sequence, Tree, parse
from stortrends_ha.config.keys import FILE
from stortrends_ha.config.kinds import (
    EMPTY,
    EMPTY_LIST,
    Choice,
    Kind,
    ListOf,
    Named,
    PerNode,
    Table,
    tables_below,
    walk,
)
from stortrends_ha.config.reference import reference_table
from stortrends_ha.errors import ConfigError

REFERENCE = REPOSITORY / "docs" / "configuration.md"

VM_A = "groups.rg-a.volumes.vm-a"
VM_B = "groups.rg-b.volumes.vm-b"

Load = Callable[[str], Cluster]
ProblemsOf = Callable[..., list[str]]


@pytest.fixture
def load_text(tmp_path: Path) -> Load:
    return functools.partial(config_texts.load_text, tmp_path)


@pytest.fixture
def problems_of(tmp_path: Path) -> ProblemsOf:
    """The problems in the valid file after replacing some of its text."""

    def problems_of(*changes: tuple[str, str], text: str = VALID) -> list[str]:
        return problems_in(tmp_path, changed(text, *changes))

    return problems_of


def test_every_value_of_a_valid_file_arrives(load_text: Load, tmp_path: Path) -> None:
    cluster = load_text(VALID)
    assert cluster.name == "demo"
    assert list(cluster.nodes) == ["node-a", "node-b"]
    node = cluster.nodes["node-b"]
    assert (node.name, node.address, node.metrics) == ("node-b", "127.0.0.1", Address("127.0.0.1", 9812))
    assert node.state_dir == tmp_path / "state-b"
    assert node.control == tmp_path / "state-b" / "control.sock"
    group = cluster.groups["rg-a"]
    assert (group.name, group.preferred_owner, str(group.nbd)) == ("rg-a", "node-a", "127.0.0.1:10809")
    assert group.nbd_unix == {"node-a": tmp_path / "a.sock"}
    assert group.link_ports == {"node-a": 7801, "node-b": 7802}
    assert cluster.groups["rg-b"].volumes == (
        Volume(
            name="vm-b",
            backing={"node-a": tmp_path / "a/vm-b.img", "node-b": tmp_path / "b/vm-b.img"},
            size_bytes=4096,
            read_only=True,
            minimum_block_bytes=512,
            preferred_block_bytes=1024**2,
            maximum_payload_bytes=2 * 1024**2,
            description="the second one",
        ),
    )
    assert cluster.limits == Limits(connections=3, link_timeout_s=0.5)


def test_what_is_left_out_has_the_defaults_of_the_model(load_text: Load) -> None:
    cluster = load_text(VALID.replace("limits: {connections: 3, link_timeout_s: 0.5}", ""))
    volume = cluster.groups["rg-a"].volumes[0]
    assert cluster.limits == Limits()
    assert volume == Volume(name="vm-a", backing=volume.backing, size_bytes=1024**3)
    assert cluster.groups["rg-b"].nbd_unix == {}


def test_keys_with_nothing_after_them_are_as_good_as_left_out(load_text: Load) -> None:
    text = VALID.replace("{connections: 3, link_timeout_s: 0.5}", "").replace("{node-a: a.sock}", "~")
    assert load_text(text).limits == Limits()
    assert load_text(text).groups["rg-a"].nbd_unix == {}


def test_one_backing_path_serves_two_machines(load_text: Load) -> None:
    text = TWO_MACHINES.replace("{node-a: a/vm-b.img, node-b: b/vm-b.img}", "/dev/vg0/vm-b")
    backing = load_text(text).groups["rg-b"].volumes[0].backing
    assert backing == {"node-a": Path("/dev/vg0/vm-b"), "node-b": Path("/dev/vg0/vm-b")}


def test_relative_paths_start_at_the_file_wherever_it_is_loaded_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "cluster.yaml").write_text(VALID, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load(Path("etc/cluster.yaml")).nodes["node-a"].state_dir == tmp_path / "etc" / "state-a"


def test_the_peer_is_the_other_node(load_text: Load) -> None:
    cluster = load_text(VALID)
    assert cluster.peer_of("node-a").name == "node-b"
    assert cluster.peer_of("node-b").name == "node-a"
    with pytest.raises(KeyError):
        cluster.peer_of("node-c")


def test_names_that_yaml_takes_for_other_types_stay_names(load_text: Load) -> None:
    text = VALID.replace("node-a", "no").replace("node-b", "1").replace("rg-a", "null").replace("vm-a", "0x1F")
    cluster = load_text(text)
    assert list(cluster.nodes) == ["no", "1"]
    assert cluster.groups["null"].volumes[0].name == "0x1F"


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("1", 1), ("512", 512), ("4KiB", 4096), ("3MiB", 3 * 2**20), ("1GiB", 2**30), ("2TiB", 2**41)],
)
def test_sizes_are_bytes_or_have_a_binary_unit(load_text: Load, text: str, size_bytes: int) -> None:
    assert load_text(VALID.replace("1GiB", text)).groups["rg-a"].volumes[0].size_bytes == size_bytes


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0.0.0.0:1", Address("0.0.0.0", 1)),
        ("'[::1]:65535'", Address("::1", 65535)),
        ("'[fe80::1%eth0]:10809'", Address("fe80::1%eth0", 10809)),
        ("storage-1.example:10809", Address("storage-1.example", 10809)),
    ],
)
def test_addresses_are_read_and_written_alike(load_text: Load, text: str, address: Address) -> None:
    read = load_text(VALID.replace("127.0.0.1:10809", text)).groups["rg-a"].nbd
    assert read == address
    assert str(read) == text.strip("'")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "1GiB",
            "lots",
            f"{VM_A}.size: found 'lots', expected a size such as 1GiB (line 13)",
        ),
        ("1GiB", "-1", f"{VM_A}.size: found '-1', expected a size such as 1GiB (line 13)"),
        ("1GiB", "0", f"{VM_A}.size: found '0', expected a size such as 1GiB (line 13)"),
        ("1GiB", "9999999TiB", f"{VM_A}.size: found '9999999TiB', expected a size"),
        ("1GiB", "1.5GiB", f"{VM_A}.size: found '1.5GiB', expected a size"),
        ("1GiB", "[1]", f"{VM_A}.size: found a list, expected a size"),
        ("1GiB", "{a: 1}", f"{VM_A}.size: found a mapping, expected a size"),
        ("1GiB", "", f"{VM_A}.size: missing, expected a size"),
        ("connections: 3", "connections: true", "limits.connections: found 'true', expected a whole number"),
        ("connections: 3", "connections: 0", "limits.connections: found '0', expected a whole number from 1"),
        ("connections: 3", "connections: 012", "limits.connections: found '012', expected a whole number"),
        ("connections: 3", "connections: 2.0", "limits.connections: found '2.0', expected a whole number"),
        ("_s: 0.5", "_s: .nan", "limits.link_timeout_s: found '.nan', expected seconds from 0.1 to 3600"),
        ("_s: 0.5", "_s: .inf", "limits.link_timeout_s: found '.inf', expected seconds"),
        ("_s: 0.5", "_s: -1", "limits.link_timeout_s: found '-1', expected seconds"),
        ("_s: 0.5", "_s: 1e3", "limits.link_timeout_s: found '1e3', expected seconds"),
        (
            "read_only: true",
            "read_only: 1",
            f"{VM_B}.read_only: found '1', expected true or",
        ),
        (
            "0.0.1:10809",
            "0.0.1:65536",
            "groups.rg-a.nbd: found '127.0.0.1:65536', expected an address and port",
        ),
        ("127.0.0.1:10809", "10809", "groups.rg-a.nbd: found '10809', expected an address and port"),
        ("127.0.0.1:10809", "::1:10809", "groups.rg-a.nbd: found '::1:10809', expected an address and port"),
        (
            "127.0.0.1:10809",
            "300.0.0.1:10809",
            "groups.rg-a.nbd: found '300.0.0.1:10809', expected an address",
        ),
        ("node-a: 7801", "node-a: 0", "groups.rg-a.link_ports.node-a: found '0', expected a port from 1 to"),
        ("{address: 127.0.0.1", "{address: 0.0.0.0", "nodes.node-a.address: found '0.0.0.0', expected an IP"),
        ("{address: 127.0.0.1", "{address: a b", "nodes.node-a.address: found 'a b', expected an IP address"),
        ("state_dir: state-a", "state_dir: 42", "nodes.node-a.state_dir: found '42', expected a path"),
        (
            "state_dir: state-a",
            'state_dir: "a\\0"',
            "nodes.node-a.state_dir: found 'a\\x00', expected a path",
        ),
        ("state_dir: state-a", "state_dir: ''", "nodes.node-a.state_dir: found '', expected a path"),
        (
            "the second one",
            '"two\\nlines"',
            f"{VM_B}.description: found 'two\\nlines', expected",
        ),
        ("cluster: demo", "cluster: a b", "cluster: found 'a b', expected a name of 1 to 64"),
        ("cluster: demo", "", "cluster: missing, expected a name"),
        ("  rg-a:", "  'rg a':", "groups.'rg a': found 'rg a' as the group's name, expected a name"),
        (
            "      vm-a:",
            "      -a:",
            "groups.rg-a.volumes.-a: found '-a' as the volume's name, expected a name",
        ),
        (
            "minimum: 512",
            "minimum: 3",
            f"{VM_B}.block.minimum: found '3', expected a power of",
        ),
        (
            "minimum: 512",
            "minimum: 128KiB",
            f"{VM_B}.block.minimum: found '128KiB', expected",
        ),
        (
            "preferred: 1MiB",
            "preferred: 256",
            f"{VM_B}.block.preferred: found '256', expected",
        ),
        (
            "maximum: 2MiB",
            "maximum: 33MiB",
            f"{VM_B}.block.maximum: found '33MiB', expected",
        ),
        ("limits: {", "limits: 3 #", "limits: found '3', expected a mapping with the keys connections,"),
        ("{node-a: a.sock}", "a.sock", "groups.rg-a.nbd_unix: found 'a.sock', expected for any of the nodes"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(
    problems_of: ProblemsOf, old: str, new: str, problem: str
) -> None:
    problems = problems_of((old, new))
    assert len(problems) == 1
    assert problems[0].startswith(problem)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "size: 4096",
            "size: 4097",
            f"{VM_B}.size: found 4097, expected a multiple",
        ),
        (
            "maximum: 2MiB",
            "maximum: 1048577",
            f"{VM_B}.block.maximum: found 1048577, expected",
        ),
        (
            "maximum: 2MiB",
            "maximum: 512KiB",
            f"{VM_B}.block.maximum: found 524288, expected at",
        ),
        (
            "{minimum: 512, preferred: 1MiB",
            "{minimum: 4KiB, preferred: 512",
            f"{VM_B}.block.preferred: found 512",
        ),
        (
            "connections: 3",
            "window_bytes: 1MiB",
            "limits.window_bytes: found 1048576, expected at least",
        ),
        (
            "owner: node-a",
            "owner: node-c",
            "groups.rg-a.preferred_owner: found 'node-c', expected one",
        ),
        (
            "{node-a: a.sock",
            "{node-c: a.sock",
            "groups.rg-a.nbd_unix.node-c: found an unknown node",
        ),
        (", node-b: 7802", "", "groups.rg-a.link_ports.node-b: missing, expected a port from 1 to 65535"),
        (", node-b: /dev/vg0/vm-a", "", f"{VM_A}.backing.node-b: missing, expected a path"),
        (
            "      vm-b:",
            "      vm-a:",
            "groups.rg-b.volumes.vm-a: found a name that groups.rg-a.volumes.vm-a has",
        ),
        ("a.sock", "a" * 108, "groups.rg-a.nbd_unix.node-a: found a socket's path of "),
    ],
)
def test_values_that_do_not_fit_together_are_named(problems_of: ProblemsOf, old: str, new: str, problem: str) -> None:
    problems = problems_of((old, new))
    assert len(problems) == 1
    assert problems[0].startswith(problem)


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        ("state_dir: state-b", "state_dir: state-a", "nodes.node-b.state_dir"),
        ("state_dir: state-b", "state_dir: x/../state-a", "nodes.node-b.state_dir"),
        ("127.0.0.1:9812", "127.0.0.1:9811", "nodes.node-b.metrics"),
        ("127.0.0.1:9812", "localhost:9811", "nodes.node-b.metrics"),
        ("127.0.0.1:9812", "0.0.0.0:7801", "groups.rg-a.link_ports.node-a"),
        ("127.0.0.1:10810", "127.0.0.1:10809", "groups.rg-b.nbd"),
        ("127.0.0.1:10810", "'[::]:10809'", "groups.rg-b.nbd"),
        ("127.0.0.1:10809", "0.0.0.0:10810", "groups.rg-b.nbd"),
        ("node-b: 7802", "node-b: 7801", "groups.rg-a.link_ports.node-b"),
        ("node-b: 7804", "node-b: 10809", "groups.rg-b.link_ports.node-b"),
        ("b/vm-b.img", "a/vm-b.img", f"{VM_B}.backing"),
        ("b/vm-b.img", "/dev/vg0/vm-a", f"{VM_B}.backing"),
        ("{node-a: a/vm-b.img, node-b: b/vm-b.img}", "b/vm-b.img", f"{VM_B}.backing"),
        ("node-a: a/vm-b.img", "node-a: a.sock", f"{VM_B}.backing"),
        ("a.sock", "state-b/control.sock", "groups.rg-a.nbd_unix.node-a"),
    ],
)
def test_two_nodes_on_one_machine_cannot_share(problems_of: ProblemsOf, old: str, new: str, path: str) -> None:
    problems = problems_of((old, new))
    assert len(problems) == 1
    assert problems[0].startswith(f"{path}: found ")


def test_different_loopback_addresses_are_one_machine(problems_of: ProblemsOf) -> None:
    changes = [("node-b: {address: 127.0.0.1", "node-b: {address: 127.0.0.2"), ("state-b", "state-a")]
    problems = problems_of(*changes)
    assert len(problems) == 1
    assert "node-a and node-b are on one machine" in problems[0]


def test_two_machines_may_use_the_same_paths_and_ports(load_text: Load) -> None:
    text = TWO_MACHINES
    for old, new in [
        ("state-b", "state-a"),
        ("9812", "9811"),
        ("7802", "7801"),
        ("{node-a: a.sock}", "{node-a: a.sock, node-b: a.sock}"),
        ("b/vm-b.img", "a/vm-b.img"),
    ]:
        text = text.replace(old, new)
    assert load_text(text).nodes["node-a"].state_dir == load_text(text).nodes["node-b"].state_dir


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        ("127.0.0.1:10810", "127.0.0.1:10809", "groups.rg-b.nbd"),
        ("127.0.0.1:10809", "0.0.0.0:7802", "groups.rg-a.link_ports.node-b"),
        ("node-a: a/vm-b.img", "node-a: a/vm-a.img", f"{VM_B}.backing"),
    ],
)
def test_what_clashes_on_one_of_two_machines_is_named(problems_of: ProblemsOf, old: str, new: str, path: str) -> None:
    problems = problems_of((old, new), text=TWO_MACHINES)
    assert len(problems) == 1
    assert problems[0].startswith(f"{path}: found ")


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(problems_of: ProblemsOf) -> None:
    problems = problems_of(
        ("link_timeout_s: 0.5", "link_timeout: 0.5"),
        ("1GiB", "lots"),
        ("127.0.0.1:10810", "127.0.0.1:10809"),
        ("cluster: demo", "cluster: demo\nclusters: demo"),
        ("preferred_owner: node-a", ""),
    )
    assert [problem.split(": ")[0] for problem in problems] == [
        "clusters",
        "groups.rg-a.preferred_owner",
        f"{VM_A}.size",
        "groups.rg-b.nbd",
        "limits.link_timeout",
    ]


def test_an_unknown_key_brings_the_nearest_known_one(problems_of: ProblemsOf) -> None:
    assert problems_of(("read_only: true", "readonly: true")) == [
        f"{VM_B}.readonly: found an unknown key, expected 'read_only' (the nearest known key) (line 23)"
    ]
    assert problems_of(("read_only: true", "colour: red")) == [
        f"{VM_B}.colour: found an unknown key, "
        "expected one of size, backing, read_only, block, description, cache (line 23)"
    ]


@pytest.mark.parametrize(
    ("old", "new", "path", "lines"),
    [
        ("limits: {", "cluster: other\nlimits: {", "cluster", (26, 1)),
        ("limits: {", "limits: {connections: 4, ", "limits.connections", (26, 26)),
        (
            "        size: 1GiB",
            "        size: 1GiB\n        size: 2GiB",
            f"{VM_A}.size",
            (14, 13),
        ),
    ],
)
def test_a_key_given_twice_is_a_problem_at_every_level(
    problems_of: ProblemsOf, old: str, new: str, path: str, lines: tuple[int, int]
) -> None:
    again, first = lines
    assert problems_of((old, new)) == [f"{path}: given again on line {again}, expected once (line {first})"]


@pytest.mark.parametrize("extra", ["", "  node-c: {address: 192.0.2.3}\n"])
def test_there_are_exactly_two_nodes(load_text: Load, extra: str) -> None:
    nodes = "  node-a: {address: 192.0.2.1}\n" + ("  node-b: {address: 192.0.2.2}\n" + extra if extra else "")
    with pytest.raises(ConfigError) as caught:
        load_text(f"cluster: demo\nnodes:\n{nodes}groups:\n")
    found = 3 if extra else 1
    assert f"nodes: found {found}, expected exactly 2 nodes by name (line 2)" in caught.value.problems


def test_there_are_at_most_64_groups(problems_of: ProblemsOf) -> None:
    groups = "".join(
        f"  g{number}: {{preferred_owner: node-a, nbd: '127.0.0.1:{20000 + number}',"
        f" link_ports: {{node-a: {21000 + number}, node-b: {22000 + number}}},"
        f" volumes: {{v{number}: {{size: 1, backing: {{node-a: a{number}, node-b: b{number}}}}}}}}}\n"
        for number in range(63)
    )
    assert problems_of(("groups:\n", f"groups:\n{groups}")) == [
        "groups: found 65, expected 1 to 64 groups by name (line 5)"
    ]


def test_without_nodes_the_names_of_nodes_are_not_complained_about(problems_of: ProblemsOf) -> None:
    problems = problems_of(("nodes:", "nodes: 5\nlimits:"), ("limits: {", "#"))
    assert [problem.split(":")[0] for problem in problems] == ["nodes", "limits.node-a", "limits.node-b"]


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_file_lacks_every_required_key(load_text: Load, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(text)
    required = ["cluster", "key_file", "nodes", "arbiter", "groups"]
    assert [problem.split(":")[0] for problem in caught.value.problems] == required


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: b: c\n", "line 1: not readable as YAML: mapping values are not allowed here"),
        ("a: 1\nb: [1\n", "line 3: not readable as YAML: while parsing a flow sequence"),
        ("a: 1\nb: \x07\n", "line 2: not readable as YAML: the character '\\x07' is not allowed"),
        ('a: "\\UFFFFFFFF"\n', "line 1: not readable as YAML: "),
        ("a: &x [1]\nb: *x\n", "line 1: not readable as YAML: anchors (&) and aliases (*) are not allowed"),
        ("a: &x [*x]\n", "line 1: not readable as YAML: anchors (&) and aliases (*) are not allowed"),
        ("a: 1\nb: !!python/object:os.system x\n", "line 2: not readable as YAML: tags (!) are not allowed"),
        ("a: 1\n---\nb: 2\n", "line 2: not readable as YAML: a second document begins here"),
        ("? [a]\n: b\n", "line 1: not readable as YAML: a mapping or list as a key"),
        ("a: " + "[" * 10000, "line 1: not readable as YAML: more than 16 levels deep"),
        ("a: [" + "x," * 257 + "]", "line 1: not readable as YAML: a list of more than 256 items"),
        ("[]", "the file: found a list, expected a mapping with the keys cluster, key_file, nodes, arbiter, groups, "),
        ("demo", "the file: found 'demo', expected a mapping"),
    ],
)
def test_what_cannot_be_read_is_one_problem_with_its_line(load_text: Load, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(text)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(problem)


def test_a_file_that_is_not_utf8_is_refused_with_the_line(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_bytes(VALID.encode() + b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"cluster.yaml: the file is not UTF-8 text \(line 29\)"):
        load(file)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + VALID.encode())
    assert load(file).name == "demo"


def test_a_file_above_1_mib_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_bytes(b"a: [" + b"x," * 2**19)
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        load(file)


@pytest.mark.parametrize("name", ["missing.yaml", ".", "nul\0.yaml"])
def test_a_file_that_cannot_be_read_is_a_sentence_with_its_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / name)
    assert caught.value.problems[0].startswith(f"{tmp_path / name}: the file cannot be read: ")


def test_a_problem_is_one_line_whatever_the_file_holds(problems_of: ProblemsOf) -> None:
    problems = problems_of(("cluster: demo", '"clu\\nster\\e[31m": 1\ncluster: "' + "x" * 1000 + '\\n"'))
    assert len(problems) == 2
    assert all(problem.isprintable() and len(problem) < 300 for problem in problems)


# The example and the reference say the same as the code.


def example_values(kind: Kind, tree: Tree, name: str = "", path: str = "") -> Iterator[tuple[str, str, Tree]]:
    """Every key in the example, written as in the reference, with its path and value."""
    for below, table in tables_below(kind):
        for path_to, of in entries_of(kind, tree, path):
            assert isinstance(of, Mapping)
            for key, value in of.entries.items():
                found = f"{name}{below}{key}".lstrip("."), f"{path_to}.{key}".lstrip(".")
                yield *found, value
                yield from example_values(table.keys[key].kind, value, *found)


def entries_of(kind: Kind, tree: Tree, path: str) -> Iterator[tuple[str, Tree]]:
    """The tables in a value, with their paths."""
    match kind, tree:
        case ((Named() | PerNode()), Mapping(entries)):
            yield from ((f"{path}.{name}", entry) for name, entry in entries.items())
        case ListOf(), Sequence(items):
            yield from ((f"{path}[{place}]", item) for place, item in enumerate(items))
        case ((Table() | Choice()), _):
            yield path, tree


def comment_above(text: str, path: str, problems: Problems) -> str:
    """The comment above the line of a key."""
    problems.add(path, "here")
    with pytest.raises(ConfigError) as caught:
        problems.raise_if_any()
    said = next(said for said in caught.value.problems if said.startswith(f"{path}: "))
    line = int(said.rpartition("(line ")[2].rstrip(")"))
    above = itertools.takewhile(lambda said: said.lstrip().startswith("#"), reversed(text.splitlines()[: line - 1]))
    return " ".join(said.lstrip("# ") for said in reversed(list(above)))


def comments_in_example() -> dict[str, str]:
    """The first comment above each key, written as in the reference."""
    comments: dict[str, str] = {}
    for text in examples():
        tree = parse(text, problems := Problems())
        for name, path, _ in example_values(FILE, tree):
            if not comments.get(name):
                comments[name] = comment_above(text, path, problems)
    return comments


COMMENTS = comments_in_example()


@pytest.mark.parametrize(("place", "kind"), [*enumerate([Witness, Etcd, Fencing, Manual])])
def test_the_example_loads_as_it_stands_and_with_each_other_arbiter(load_text: Load, place: int, kind: type) -> None:
    cluster = load_text(examples()[place])
    assert {group.preferred_owner for group in cluster.groups.values()} == set(cluster.nodes)
    assert type(cluster.arbiter) is kind


def test_the_compose_file_has_a_right_cluster() -> None:
    assert load(REPOSITORY / "config" / "cluster.compose.yaml").name == "compose"


def test_the_example_shows_every_key_and_the_true_defaults() -> None:
    shown = {name: value for text in examples() for name, _, value in example_values(FILE, parse(text, Problems()))}
    keys = dict(walk(FILE))
    assert shown.keys() == keys.keys()
    for path, key in keys.items():
        if key.default not in (None, EMPTY, EMPTY_LIST) and not key.derive:
            assert shown[path] == Scalar(key.default.strip('"')), path


@pytest.mark.parametrize("path", [path for path, _ in walk(FILE)])
def test_the_example_explains_each_key_with_its_default_and_unit(path: str) -> None:
    key = dict(walk(FILE))[path]
    default = "Required." if key.default is None else f"Default: {key.default}, "
    assert default in COMMENTS[path]
    assert key.unit in COMMENTS[path]


def test_the_reference_has_a_row_for_every_key() -> None:
    assert reference_table() in REFERENCE.read_text(encoding="utf-8")


def test_the_small_cluster_of_the_reference_loads(load_text: Load) -> None:
    section = REFERENCE.read_text(encoding="utf-8").partition("## A small cluster\n")[2].partition("##")[0]
    assert load_text(section).name == "demo"


def test_each_arbiter_of_the_reference_loads(load_text: Load) -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    small = textwrap.dedent(text.partition("## A small cluster\n")[2].partition("##")[0])
    section = text.partition("## The arbiter\n")[2].partition("\n## ")[0]
    arbiters = re.findall(r"^    arbiter:.*\n(?:     .*\n)*", section, re.MULTILINE)
    kinds = [type(load_text(re.sub("(?m)^arbiter: .*$", textwrap.dedent(of), small)).arbiter) for of in arbiters]
    assert kinds == [Witness, Etcd, Fencing, Manual]


# stortrends-ha check


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    """The valid file, with its key."""
    file = tmp_path / "cluster.yaml"
    file.write_text(VALID, encoding="utf-8")
    write_key(tmp_path / "cluster.key")
    return file


def write_key(path: Path) -> None:
    path.write_text(os.urandom(32).hex())
    path.chmod(0o600)


def test_check_describes_a_right_file(valid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(valid) == 0
    output = capsys.readouterr()
    assert output.err == ""
    for part in (
        "cluster demo",
        "2 groups, 2 volumes",
        "node-a",
        "node-b",
        "rg-a",
        "nbd://127.0.0.1:10809/vm-a",
        "read-only",
        "heartbeat at 127.0.0.1:7812",
        "Who may go on alone is decided by the witness at 127.0.0.1:7900",
    ):
        assert part in output.out


def test_check_describes_the_example_and_every_other_arbiter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for text in examples():
        config_texts.load_text(tmp_path, text)
        assert check(tmp_path / "cluster.yaml") == 0
        said.append(capsys.readouterr().out)
    assert re.search(r"floating address +203\.0\.113\.21/24 on eth1 of node-a, on eno2 of node-b\n", said[0])
    for text, words in zip(
        said, ("witness at 198", "etcd at http", "a fence agent: fence_ipmilan for node-a,", "operator"), strict=True
    ):
        assert words in text
    assert "password_script" not in said[2]


def test_check_says_what_is_wrong_with_a_key_that_is_here(valid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = valid.parent / "cluster.key"
    key.chmod(0o644)
    assert check(valid) == 1
    output = capsys.readouterr()
    assert output.out == ""
    said, count = output.err.splitlines()
    assert said.startswith(f"key_file: The key file {key} is open to others")
    assert count == f"{valid}: 1 problem"


def test_check_warns_of_a_key_that_is_not_here(valid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = valid.parent / "cluster.key"
    key.unlink()
    assert check(valid) == 0
    output = capsys.readouterr()
    assert "is right" in output.out
    (warning,) = output.err.splitlines()
    assert warning == f"Not checked: the key file {key}, which is not on this machine."


def test_check_compares_two_keys_that_are_here(valid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.key", "b.key"):
        write_key(valid.parent / name)
    valid.write_text(changed(VALID, ("key_file: cluster.key", "key_file: {node-a: a.key, node-b: b.key}")))
    assert check(valid) == 1
    assert "key_file: node-a and node-b have different keys, expected the same" in capsys.readouterr().err


def test_check_lists_every_problem_and_their_count_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(VALID.replace("1GiB", "lots").replace("cluster:", "claster:"), encoding="utf-8")
    assert check(file) == 1
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "cluster",
        "claster",
        f"{VM_A}.size",
        os.fspath(file),
    ]
    assert lines[-1].endswith(": 3 problems")


def test_check_says_that_a_file_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path / "none.yaml") == 1
    assert "none.yaml: the file cannot be read: No such file or directory" in capsys.readouterr().err

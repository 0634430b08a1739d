"""Two copies of a group without a common history: `group diff` and `group resolve`, with real nodes and deaths."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clients import nbdsh, qemu_io
from files import MIB
from harness import GROUP, OWNER, PROGRAM, SECONDARY, Cluster, free_ports, program_environment, wait_for
from test_replace import FAST, typed

A, B = OWNER, SECONDARY
KIB = 1 << 10


def diverge(cluster: Cluster, differing_mib: int = 0) -> Cluster:
    """node-b is made the owner though node-a has more; then node-a is back. What differs is known."""
    cluster.start()
    qemu_io(cluster.uri(), "write -P 0x11 0 8M", "flush")
    cluster.secondary.stop()
    cluster.owner.wait_state("alone")
    qemu_io(cluster.uri(), "write -P 0x22 1M 128k", "write -P 0x22 20M 64k", "flush")  # only on node-a
    if differing_mib:
        qemu_io(cluster.uri(), f"write -P 0x23 32M {differing_mib}M", "flush")
    cluster.owner.kill()
    cluster.secondary.start()
    cluster.secondary.wait_state("held")
    code, out, errors = typed(cluster, B, "group", "force-own", GROUP, "--name", B, "--accept-data-loss")
    assert code == 0, out + errors
    qemu_io(cluster.uri(), "write -P 0x33 2M 64k", "write -z 3M 64k", "flush")  # only on node-b
    cluster.owner.start()
    cluster.owner.wait("refuses", lambda group: "no common history" in group["why"] and group["owner_lineage"])
    return cluster


DIFFERENT = [[MIB, 128 * KIB], [2 * MIB, 64 * KIB], [3 * MIB, 64 * KIB], [20 * MIB, 64 * KIB]]


@pytest.fixture(scope="module")
def diverged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = diverge(Cluster(tmp_path_factory.mktemp("diverged"), witness=True, failover=FAST))
    yield cluster
    cluster.close()


def content(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        return os.pread(file.fileno(), length, offset)


def kept(cluster: Cluster, node: str = A) -> list[Path]:
    return sorted((cluster.nodes[node].state_dir / "kept").glob("*"))


def refused(cluster: Cluster, node: str, *command: str) -> str:
    code, out, errors = typed(cluster, node, *command)
    assert code == 1, out + errors
    return errors


# --- Shown, and refused -----------------------------------------------------------------------------


def test_status_says_what_to_do(diverged: Cluster) -> None:
    for node in diverged.nodes.values():
        why = node.wait("says it", lambda group: "no common history" in group["why"])["why"]
        assert "`stortrends-ha group diff rg-a` shows where they differ, `group resolve` keeps one of them" in why


def test_diff_shows_what_differs_and_both_histories(diverged: Cluster) -> None:
    code, out, errors = typed(diverged, A, "group", "diff", GROUP)
    assert code == 0, errors
    assert "Volume vm-a: 0.31 of 64 MiB differ, at offsets:" in out
    ranges = [line.split() for line in out.splitlines() if line.endswith(" bytes")]
    assert [[int(start), int(length)] for start, _, _, length, _ in ranges] == DIFFERENT
    assert "lineage" in out.partition("node-b, which owns")[2].partition("which does not own")[0]
    assert "forced here by the operator" in out
    assert "taken from node-a, which copied everything" in out  # of node-b, before
    assert "made here, when this node owned first" in out
    assert "in sync node-a" in out  # from the records
    assert "stortrends-ha group resolve rg-a --keep node-b" in out.splitlines()[-1]


def test_diff_for_programs_from_a_machine_that_has_both_nodes(diverged: Cluster) -> None:
    code, out, errors = typed(diverged, B, "group", "diff", GROUP, "--json")
    assert code == 0, errors
    found: dict[str, Any] = json.loads(out)
    assert (found["group"], found["node"]) == (GROUP, A)
    assert found["differing_bytes"] == 320 * KIB
    assert found["volumes"]["vm-a"]["ranges"] == DIFFERENT
    assert set(found["past"]) == {A, B}


def test_diff_changes_nothing_and_clients_work_meanwhile(diverged: Cluster) -> None:
    before = [path.read_bytes() for path in diverged.backings()]
    assert typed(diverged, A, "group", "diff", GROUP)[0] == 0
    qemu_io(diverged.uri(), "read -P 0x33 2M 64k")
    assert [path.read_bytes() for path in diverged.backings()] == before
    assert not kept(diverged)


def test_owner_killed_in_the_middle_of_a_comparison_does_not_end_it(diverged: Cluster) -> None:
    """The other side waits, and goes on where it was."""
    os.kill(diverged.secondary.data_pid, signal.SIGSTOP)
    pid = diverged.secondary.data_pid
    command = [*("group", "diff", GROUP, "--json")]
    watching = subprocess.Popen(
        [sys.executable, "-m", "stortrends_ha", *command, "--config", str(diverged.owner.config)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    diverged.owner.wait("waits", lambda group: group["comparison"] and group["comparison"]["state"] != "done")
    os.kill(pid, signal.SIGKILL)
    out, _ = watching.communicate(timeout=60)
    assert json.loads(out)["volumes"]["vm-a"]["ranges"] == DIFFERENT
    diverged.wait_served_by(B)


def test_what_is_refused(diverged: Cluster) -> None:
    before = [path.read_bytes() for path in diverged.backings()]
    resolve = ("group", "resolve", GROUP)
    said = refused(diverged, A, *resolve, "--keep", A, "--yes")
    assert (
        "No: node-b owns group rg-a, and its clients have written to its copy. To keep the copy of node-a all" in said
    )
    assert "has no node 'node-c'" in refused(diverged, A, *resolve, "--keep", "node-c", "--yes")
    assert "has no group 'rg-x'" in refused(diverged, A, "group", "resolve", "rg-x", "--keep", B, "--yes")
    assert "nobody can be asked here" in refused(diverged, A, *resolve, "--keep", B)
    said = refused(diverged, A, "volume", "replace", "vm-a", "--node", A, "--yes")
    assert "No: the copies of group rg-a on node-b and node-a have no common history, so what is here may be" in said
    said = refused(diverged, B, "volume", "replace", "vm-a", "--node", B, "--yes")
    assert "No: node-b alone has everything" in said
    assert not kept(diverged)
    assert [path.read_bytes() for path in diverged.backings()] == before
    assert diverged.owner.group()["fit"]["needs_sync"] is False


def test_without_room_for_the_file_nothing_is_overwritten(diverged: Cluster) -> None:
    directory = diverged.owner.state_dir / "kept"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(directory)], check=True)
    before = [path.read_bytes() for path in diverged.backings()]
    try:
        said = refused(diverged, A, "group", "resolve", GROUP, "--keep", B, "--yes")
        assert "what differs needs 1.3 MiB in" in said
        assert "0.2 MiB are free there" in said
        assert "nothing was overwritten" in said
        assert not kept(diverged)
    finally:
        subprocess.run(["umount", str(directory)], check=True)
    assert [path.read_bytes() for path in diverged.backings()] == before
    assert diverged.owner.group()["fit"]["needs_sync"] is False


def test_owner_that_is_gone_is_no_reason_to_overwrite_and_the_other_side_can_still_be_had(diverged: Cluster) -> None:
    diverged.secondary.kill()
    wait_for("it is missed", lambda: diverged.owner.status()["nodes"][B]["state"] == "not answering")
    said = refused(diverged, A, "group", "resolve", GROUP, "--keep", B, "--yes")
    assert "No: node-b has not been heard for" in said
    assert "may have the last good copy" in said
    diverged.secondary.start()
    diverged.wait_served_by(B)
    diverged.owner.wait("has met the owner", lambda group: group["owner_lineage"])


# --- Looked into --------------------------------------------------------------------------------------


@contextlib.contextmanager
def exported(cluster: Cluster, *options: str) -> Iterator["subprocess.Popen[str]"]:
    command = ["group", "diff", GROUP, "--export", A, *options, "--config", str(cluster.owner.config)]
    showing = subprocess.Popen(
        [*PROGRAM, *command], env=program_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield showing
    finally:
        showing.kill()
        showing.communicate()


def test_the_copy_that_does_not_own_can_be_read_and_not_written_until_ctrl_c(diverged: Cluster) -> None:
    (port,) = free_ports(1)
    uri = f"nbd://127.0.0.1:{port}/vm-a"
    with exported(diverged, "--listen", f"127.0.0.1:{port}") as showing:
        assert showing.stdout is not None
        assert showing.stdout.readline().startswith(f"{uri} is volume vm-a as it is on node-a, read-only")
        before = diverged.backing(A).read_bytes()
        script = "h.connect_uri(uri[0]); assert h.is_read_only(); assert h.pread(512, 1 << 20) == b'\\x22' * 512"
        nbdsh(f"{script}; h.flush()", uri)
        nbdsh(
            "h.connect_uri(uri[0]); h.set_strict_mode(0)\n"
            "try:\n  h.pwrite(b'x' * 512, 0)\nexcept nbd.Error as e:\n  assert e.errno == 'EPERM', e\n"
            "else:\n  raise AssertionError('written')", uri,
        )  # fmt: skip
        assert diverged.backing(A).read_bytes() == before
        assert typed(diverged, A, "group", "diff", GROUP)[0] == 0  # at the same time
        showing.send_signal(signal.SIGINT)
        assert showing.wait(30) == 130
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            pass


def test_exported_copy_does_not_outlive_whoever_shows_it_or_the_role_of_its_node(diverged: Cluster) -> None:
    (port,) = free_ports(1)

    def is_there() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with exported(diverged, "--listen", f"127.0.0.1:{port}") as showing:
        assert showing.stdout is not None
        showing.stdout.readline()
    assert is_there()
    wait_for("nobody renews it", lambda: not is_there())
    with exported(diverged, "--listen", f"127.0.0.1:{port}") as showing:
        assert showing.stdout is not None
        showing.stdout.readline()
        data_pid = diverged.owner.data_pid
        diverged.secondary.kill()
        wait_for("it is missed", lambda: diverged.owner.status()["nodes"][B]["state"] == "not answering")
        diverged.secondary.start()
        diverged.wait_served_by(B)  # the healthy side comes and goes as if nobody looked at the other one
        assert is_there()
        assert diverged.owner.data_pid == data_pid


def test_what_is_not_exported(diverged: Cluster) -> None:
    diff = ("group", "diff", GROUP)
    said = refused(diverged, B, *diff, "--export", B)
    assert f"node-b owns group rg-a, which is served already: {diverged.uri()}" in said
    said = refused(diverged, A, *diff, "--export", A, "--listen", f"127.0.0.1:{diverged.nbd_port}")
    assert "in use" in said
    assert "has no node 'node-c'" in refused(diverged, A, *diff, "--export", "node-c")


# --- Resolved: the last tests with this cluster -------------------------------------------------------


def test_resolve_keeps_what_differs_and_copies_what_differs(diverged: Cluster, tmp_path: Path) -> None:
    lost = diverged.backing(A).read_bytes()
    code, out, errors = typed(diverged, A, "group", "resolve", GROUP, "--keep", B, "--yes")
    assert code == 0, errors
    assert "Kept as it is: the copy of group rg-a on node-b, which serves its clients" in out
    assert "Overwritten: the copy on node-a, wherever it differs." in out
    (file,) = kept(diverged)
    assert f"Kept: {file} (0.3 MiB differed)." in out
    diverged.wait_in_sync()
    diverged.settle()
    diverged.assert_identical()
    diverged.assert_holds(2 * MIB, b"\x33" * 64 * KIB)
    diverged.assert_holds(MIB, b"\x11" * 64 * KIB)

    assert "there is nothing to resolve" in refused(diverged, A, "group", "resolve", GROUP, "--keep", B, "--yes")
    assert "there is nothing to resolve" in refused(diverged, A, "group", "diff", GROUP)
    said = refused(diverged, A, "group", "diff", GROUP, "--export", A)
    assert "node-a mirrors node-b now, which serves the same data" in said

    code, out, _ = typed(diverged, A, "group", "resolve", GROUP, "--list")
    assert (code, f"{file}: 0.3 MiB of node-a, given up at" in out) == (0, True)

    # A copy of the volume as it is now becomes what it was on the node that was given up.
    (tmp_path / "vm-a.img").write_bytes(diverged.backing(B).read_bytes())
    code, out, errors = typed(diverged, A, "group", "resolve", GROUP, "--extract", str(file), "--to", str(tmp_path))
    assert (code, errors) == (0, "")
    assert (tmp_path / "vm-a.img").read_bytes() == lost

    assert "nobody can be asked here" in refused(diverged, A, "group", "resolve", GROUP, "--drop", str(file))
    assert kept(diverged) == [file]
    assert typed(diverged, A, "group", "resolve", GROUP, "--drop", str(file), "--yes")[0] == 0
    assert not kept(diverged)
    assert "Nothing of group rg-a is kept" in typed(diverged, A, "group", "resolve", GROUP, "--list")[1]


@pytest.mark.parametrize("when", ["begun", "*.part", "*.blocks"])
def test_loser_that_is_killed_is_as_it_was_or_has_kept_everything(tmp_path: Path, when: str) -> None:
    cluster = Cluster(tmp_path, witness=True, failover=FAST)
    try:
        lost = killed_while_it_resolves(diverge(cluster, differing_mib=24), when)
        (file,) = [path for path in kept(cluster) if path.suffix == ".blocks"][-1:]
        cluster.wait_in_sync()
        cluster.settle()
        cluster.assert_identical()
        image = tmp_path / "images" / "vm-a.img"
        image.parent.mkdir()
        image.write_bytes(cluster.backing(B).read_bytes())
        assert typed(cluster, A, "group", "resolve", GROUP, "--extract", str(file), "--to", str(image.parent))[0] == 0
        assert image.read_bytes() == lost
    finally:
        cluster.close()


def killed_while_it_resolves(cluster: Cluster, when: str) -> bytes:
    """What the loser had. It has given up at the end, by itself or by being asked again."""
    lost = cluster.backing(A).read_bytes()
    node, directory = cluster.owner, cluster.owner.state_dir / "kept"
    command = ["group", "resolve", GROUP, "--keep", B, "--yes"]
    asking = subprocess.Popen(
        [*PROGRAM, *command, "--config", str(node.config)], env=program_environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    if when == "begun":
        node.wait("has begun", lambda group: group["comparison"])
    else:
        wait_for(f"{when} is there", lambda: any(directory.glob(when)))
    node.kill()
    asking.wait(60)
    state = json.loads(cluster.state_file(A).read_text())
    node.start()
    if not (state["given_up_for"] or state["filling"] or state["needs_sync"]):
        assert cluster.backing(A).read_bytes() == lost
        node.wait("has met the owner", lambda group: group["owner_lineage"])
        code, _, errors = typed(cluster, A, *command)
        assert code == 0, errors
    return lost


def test_copy_that_does_not_own_can_be_kept_by_what_the_refusal_says(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, witness=True, failover=FAST)
    try:
        diverge(cluster)
        said = refused(cluster, A, "group", "resolve", GROUP, "--keep", A, "--yes")
        assert "stop node-b, make node-a the owner" in said
        cluster.secondary.stop()
        wait_for("it is missed", lambda: cluster.owner.status()["nodes"][B]["state"] == "not answering")
        code, out, errors = typed(cluster, A, "group", "force-own", GROUP, "--name", A, "--accept-data-loss")
        assert code == 0, out + errors
        cluster.secondary.start()
        cluster.secondary.wait("has met the owner", lambda group: group["owner_lineage"])
        code, out, errors = typed(cluster, B, "group", "resolve", GROUP, "--keep", A, "--yes")
        assert code == 0, out + errors
        cluster.wait_in_sync()
        cluster.settle()
        cluster.assert_identical()
        cluster.assert_holds(20 * MIB, b"\x22" * 64 * KIB)
        assert len(kept(cluster, B)) == 1
    finally:
        cluster.close()

"""`stortrends-ha verify` against real nodes, with real rot: while clients write, from either machine, interrupted."""

import json
import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import clients
import pytest
from data_process import DataProcess
from data_process import Pair as ProcessPair
from faulty_disk import FaultyDisk
from files import MIB
from harness import GROUP, OWNER, PATIENT, PROGRAM, SECONDARY, Cluster, program_environment, wait_for

A, B = OWNER, SECONDARY
BLOCK = 64 << 10
SIZE = 64 * MIB
QUIET = 40 * MIB  # from here on the load writes nothing


class Said(NamedTuple):
    code: int
    out: str
    err: str


class Site:
    """A cluster, and somebody who types commands on the machine of a node or (with none) of both."""

    def __init__(self, directory: Path, failover: dict[str, Any], **limits: Any) -> None:
        volumes: dict[str, Any] = {"vm-a": {}, "vm-b": {}}
        self.cluster = Cluster(directory, volumes, size_bytes=SIZE, failover=failover, limits=limits).start()
        clients.fio(self.cluster.uri(), rw="write", bs="1m", offset=QUIET, size=16 * MIB)
        self._configs = {"": self.cluster.owner.config}
        for here, there in ((A, B), (B, A)):
            away = self.cluster.changed_spec(
                lambda spec, there=there: spec["nodes"][there].update(state_dir=str(directory / "away"))  # type: ignore[misc]
            )
            self._configs[here] = directory / f"at-{here}.yaml"
            self._configs[here].write_text(json.dumps(away))

    def start(self, *command: str, at: str = "") -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*PROGRAM, *command, "--config", str(self._configs[at])], env=program_environment(),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def type(self, *command: str, at: str = "") -> Said:
        return self.ended(self.start(*command, at=at))

    @staticmethod
    def ended(process: "subprocess.Popen[str]") -> Said:
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert "Traceback" not in err, err
        return Said(process.returncode, out, err)

    def verify(self, *options: str, at: str = "") -> tuple[int, dict[str, Any]]:
        said = self.type("verify", *options, "--json", at=at)
        assert not said.err, said
        groups: dict[str, Any] = json.loads(said.out)["groups"]
        return said.code, groups[GROUP]

    def flip(self, node: str, *places: int, volume: str = "vm-a") -> None:
        """Bits of a replica change by themselves."""
        with self.cluster.backing(node, volume).open("r+b", buffering=0) as file:
            for at in places:
                byte = os.pread(file.fileno(), 1, at)[0]
                os.pwrite(file.fileno(), bytes([byte ^ 1]), at)

    def known(self, node: str, volume: str = "vm-a") -> dict[str, Any]:
        found: dict[str, Any] = self.cluster.nodes[node].group()["verify"]["volumes"][volume]
        return found

    def wait_known(self, differing_bytes: int, volume: str = "vm-a") -> None:
        for node in self.cluster.nodes.values():
            node.wait(
                f"knows that {differing_bytes} bytes differ",
                lambda group: group["verify"]["volumes"].get(volume, {}).get("differing_bytes") == differing_bytes,
            )

    def metrics(self, node: str) -> str:
        port = self.cluster.spec["nodes"][node]["metrics"]
        with urllib.request.urlopen(f"http://{port}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
        return text

    def wait_running(self) -> dict[str, Any]:
        group = self.cluster.serving.wait("verifies", lambda group: group["verify"]["running"])
        running: dict[str, Any] = group["verify"]["running"]
        return running


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("verify"), {}, resync_min_rate="64MiB")
    try:
        clients.fio(site.cluster.uri("vm-b"), rw="write", bs="1m", size=4 * MIB)
        yield site
        site.cluster.assert_identical()
    finally:
        site.cluster.close()


@pytest.fixture
def slow_site(tmp_path: Path) -> Iterator[Site]:
    """A verify takes minutes there while clients work."""
    site = Site(tmp_path, PATIENT, resync_min_rate="64KiB", resync_latency_factor=1.1)
    try:
        yield site
    finally:
        site.cluster.close()


def test_replicas_that_are_the_same(site: Site) -> None:
    said = site.type("verify", GROUP)
    assert (said.code, said.err) == (0, "")
    assert "vm-a: both replicas are the same." in said.out
    assert "vm-b: both replicas are the same." in said.out
    assert site.known(A)["verified_s"] > 1.6e9
    assert re.search(r"vm-a was verified \d+ s ago", site.type("status", "--verbose").out)
    site.cluster.secondary.wait("knows it, too", lambda group: group["verify"]["volumes"]["vm-b"]["verified_s"])
    for node in (A, B):
        assert f'stortrends_ha_volume_verified_timestamp_seconds{{group="{GROUP}",volume="vm-a"}} 1' in (
            site.metrics(node)
        )


def test_flips_are_found_and_repaired_while_clients_write_and_nothing_else_is(site: Site) -> None:
    places = (QUIET, QUIET + BLOCK, QUIET + 5 * MIB + 17, SIZE - 1)
    found = [[QUIET, 2 * BLOCK], [QUIET + 5 * MIB, BLOCK], [SIZE - BLOCK, BLOCK]]
    with clients.load(site.cluster.uri()) as load:
        assert site.verify("vm-a")[0] == 0
        site.flip(B, *places)
        code, outcome = site.verify("vm-a")
        assert (code, outcome["why"], outcome["volumes"]["vm-a"]["found"]) == (2, "", found)
        assert list(outcome["volumes"]) == ["vm-a"]
        site.wait_known(4 * BLOCK)
        assert f'differing_bytes{{group="{GROUP}",volume="vm-a"}} 262144.0' in site.metrics(B)
        page = " ".join(site.type("status").out.split())
        assert f"256 KiB of vm-a differ between the nodes (128 KiB at byte {QUIET}, 64 KiB" in page

        said = site.type("verify", "vm-a", "--repair")  # neither disk has said that it is bad
        assert said.code == 2
        assert f"stortrends-ha verify vm-a --repair --from NODE ({A} or {B})" in said.out
        refused = site.type("verify", "vm-a", "--repair", "--from", B)
        assert refused.code == 1
        assert f"first `stortrends-ha group move {GROUP} --to {B}`, then ask again" in refused.err

        said = site.type("verify", "vm-a", "--repair", "--from", A)
        assert (said.code, said.err) == (0, "")
        assert "256 KiB were repaired, stable on both nodes, and are the same now." in said.out
        load.finish()
    site.wait_known(0)
    assert "differ between" not in " ".join(site.type("status").out.split())
    site.cluster.settle()
    site.cluster.assert_identical()


def test_repair_from_the_other_node_after_a_move_and_what_is_known_survives_both(site: Site) -> None:
    at = 32 * MIB  # never written, so it is in no intent log
    site.flip(A, at, volume="vm-b")
    assert site.verify("vm-b")[0] == 2
    os.kill(site.cluster.owner.data_pid, signal.SIGKILL)
    site.wait_known(BLOCK, "vm-b")
    site.cluster.wait_in_sync()
    site.cluster.move(B)
    code, outcome = site.verify("vm-b", "--repair", "--from", B)
    assert (code, outcome["volumes"]["vm-b"]["repaired_bytes"]) == (0, BLOCK)
    site.wait_known(0, "vm-b")
    site.cluster.assert_holds(at, bytes(BLOCK), "vm-b")
    site.cluster.move(A)


def test_from_the_machine_of_the_secondary(site: Site) -> None:
    site.flip(B, QUIET)
    code, outcome = site.verify("vm-a", at=B)
    assert (code, outcome["volumes"]["vm-a"]["found"]) == (2, [[QUIET, BLOCK]])
    assert site.verify(GROUP, "--repair", "--from", A, at=B)[0] == 0
    refused = site.type("verify", GROUP, "--stop", at=B)
    assert (refused.code, refused.err) == (1, f"stortrends-ha: No verify of group {GROUP} is under way.\n")


def test_all_is_what_the_nodes_of_this_machine_own(site: Site) -> None:
    assert site.verify("--all", at=A)[0] == 0
    said = site.type("verify", "--all", at=B)
    assert (said.code, said.out) == (0, "")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((), "Say which groups or volumes are to be verified, or --all."),
        (("nothing",), "has no group and no volume 'nothing'"),
        ((GROUP, "--from", A), "--from says which copy counts in a repair"),
        ((GROUP, "--repair", "--from", "node-x"), "has no node 'node-x'"),
        ((GROUP, "--stop"), f"No verify of group {GROUP} is under way."),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(site: Site, command: tuple[str, ...], words: str) -> None:
    said = site.type("verify", *command)
    assert said.code == 1
    assert words in said.err


def test_it_lets_clients_go_first_and_can_be_watched_stopped_and_interrupted(slow_site: Site) -> None:
    site = slow_site
    with clients.load(site.cluster.uri()) as load:
        watching = site.start("verify", GROUP)
        site.wait_running()
        site.cluster.owner.wait(
            "is held back for clients",
            lambda group: "clients are served first" in (group["verify"]["running"] or {"why": ""})["why"],
        )
        page = " ".join(site.type("status").out.split())
        assert "Verifies Group With Progress Done Rate Left" in page
        assert f"The verify of {GROUP}: clients are served first" in page
        site.cluster.secondary.wait("is told of it", lambda group: group["verify"]["running"])
        again = site.type("verify", GROUP)
        assert again.code == 1
        assert "a verify is under way already" in again.err
        watching.send_signal(signal.SIGINT)
        said = site.ended(watching)
        assert (said.code, f"`stortrends-ha verify {GROUP} --stop` ends it" in said.err) == (130, True)
        site.wait_running()

        assert site.type("verify", GROUP, "--stop").code == 0
        site.cluster.owner.wait("has ended it", lambda group: not group["verify"]["running"])
        assert site.cluster.owner.group()["verify"]["last"]["why"] == "it was stopped"

        watching = site.start("verify", GROUP)
        site.wait_running()
        os.kill(site.cluster.secondary.data_pid, signal.SIGKILL)  # the link breaks
        said = site.ended(watching)
        assert said.code == 1
        assert "MiB were compared: the link broke. Begin again when both nodes are in sync." in said.err
        site.cluster.wait_in_sync()

        watching = site.start("verify", GROUP, at=B)
        site.wait_running()
        assert load.running
        site.cluster.move(B)  # which fio does not survive
        said = site.ended(watching)
        assert said.code == 1
        assert "the group is being moved" in said.err


# --- Disks ------------------------------------------------------------------------------------------


class FaultyPair(ProcessPair):
    """A pair whose secondary has a disk that rots and fails."""

    def __init__(self, directory: Path) -> None:
        self.disk = FaultyDisk(directory / "disk", "vm-a.img", 16 * MIB)
        super().__init__(directory)

    def backing(self, node: str) -> Path:
        return self.disk.path if node == B else super().backing(node)


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[FaultyPair]:
    pair = FaultyPair(tmp_path)
    try:
        with pair:
            yield pair
    finally:
        pair.disk.close()


def verified(owner: DataProcess, run: str, *, repair: bool = False, source: str = "") -> dict[str, Any]:
    """What a verify came to."""
    owner.order("verify", run=run, volumes=["vm-a"], repair=repair, source=source)
    status = owner.wait("has ended it", lambda status: (status["verify"]["last"] or {"run": ""})["run"] == run)
    last: dict[str, Any] = status["verify"]["last"]
    return last


def test_rot_below_the_page_cache_is_found_and_a_bad_sector_repaired_from_the_other_side(faulty: FaultyPair) -> None:
    owner, secondary, _ = faulty.in_sync()
    clients.fio(f"nbd://127.0.0.1:{faulty.nbd_port}/vm-a", rw="write", bs="1m", size=4 * MIB, end_fsync=1)
    assert verified(owner, "1")["volumes"]["vm-a"]["found"] == []
    faulty.disk.rot(MIB)  # it is cached, and was read a moment ago
    faulty.disk.fail_sector(2 * MIB)
    last = verified(owner, "2", repair=True)
    assert last["volumes"]["vm-a"] == {
        "found_bytes": 2 * BLOCK, "found": [[MIB, BLOCK], [2 * MIB, BLOCK]], "repaired_bytes": BLOCK,
        "left_bytes": BLOCK,
    }  # fmt: skip
    assert (last["why"], last["unreadable_bytes"]) == ("", BLOCK)
    assert verified(owner, "3", repair=True, source=A)["volumes"]["vm-a"]["left_bytes"] == 0
    faulty.disk.forget_cache()
    faulty.assert_identical()
    assert not secondary.status["fit"]["failure"]


def test_a_bad_sector_that_is_not_to_be_repaired_takes_the_secondary_out(faulty: FaultyPair) -> None:
    owner, secondary, _ = faulty.in_sync()
    clients.fio(f"nbd://127.0.0.1:{faulty.nbd_port}/vm-a", rw="write", bs="1m", size=4 * MIB, end_fsync=1)
    faulty.disk.fail_sector(2 * MIB)
    last = verified(owner, "1")
    assert last["why"] == "the link broke"
    secondary.wait("has failed", lambda status: "Input/output error" in status["fit"]["failure"])


def test_it_is_refused_while_the_secondary_is_not_in_sync(tmp_path: Path) -> None:
    with ProcessPair(tmp_path) as pair:
        owner, secondary, record = pair.in_sync()
        secondary.kill()
        owner.wait("has lost it", lambda status: not status["session"])
        ask = {"run": "1", "volumes": ["vm-a"], "repair": False, "source": ""}
        said = owner.begin("verify", **ask)()
        assert said.startswith(f"Group {GROUP} cannot be verified now: no link to {B}")
        owner.lead(record.owned_alone(A))
        secondary = pair.start(B)
        said = secondary.begin("verify", **ask)()
        assert said == f"Node {B} has no part in group {GROUP} now."
        secondary.follow(record.owned_alone(A))
        owner.wait("has it all", lambda status: status["joinable"])
        said = owner.begin("verify", **ask)()
        assert said == f"Group {GROUP} cannot be verified now: {B} is not in sync; what it lacks is copied first."
        assert secondary.begin("verify", **ask)() == said
        wait_for("nothing is under way", lambda: not owner.status["verify"]["running"])

"""The arbiter fails, or is one of the other kinds."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import wait_for

from .clients import under_load
from .cluster import Cluster
from .network import Machine

MakeCluster = Callable[..., Cluster]


class TestWitness:
    def test_it_is_killed(self, cluster: Cluster) -> None:
        """Row 8: a warning, and nothing else."""
        assert cluster.witness is not None
        owner, _ = cluster.pair()
        with under_load(cluster) as clients:
            epoch = owner.group()["epoch"]
            with clients.event():
                cluster.witness.kill()
                owner.wait("says that the arbiter does not answer", lambda of: of["arbiter"])
            assert owner.group()["state"] == "in-sync"
            assert owner.group()["epoch"] == epoch
            with clients.event():
                cluster.witness.start()
                owner.wait("finds it again", lambda of: not of["arbiter"])

    def test_it_is_killed_and_then_the_owner(self, cluster: Cluster) -> None:
        """Row 9: the survivor holds, and says why; it goes on when the witness is back."""
        assert cluster.witness is not None
        owner, secondary = cluster.pair()
        with under_load(cluster) as clients:
            with clients.event():
                cluster.witness.kill()
                owner.kill()
                secondary.wait_held("granted")
                clients.wait_held()
                cluster.witness.start()
            assert cluster.owner() is secondary
            with clients.event():
                owner.start()
                cluster.wait_in_sync()

    def test_it_is_killed_then_the_owner_which_returns(self, cluster: Cluster) -> None:
        """Row 9: what a killed owner was doing is made equal on both, for which nobody has to be asked."""
        assert cluster.witness is not None
        owner, secondary = cluster.pair()
        with under_load(cluster) as clients:
            with clients.event():
                cluster.witness.kill()
                owner.kill()
                secondary.wait_held("granted")
                owner.start()
            assert cluster.owner() is owner
            cluster.witness.start()
            cluster.wait_in_sync()

    def test_it_is_killed_and_then_the_secondary(self, cluster: Cluster) -> None:
        """Row 9, for the owner: writes are held, not failed (rule 2); it goes on when the secondary is back."""
        assert cluster.witness is not None
        owner, secondary = cluster.pair()
        with under_load(cluster) as clients:
            with clients.event():
                cluster.witness.kill()
                secondary.kill()
                owner.wait_held("granted")
                clients.wait_held()
                secondary.start()
            assert cluster.owner() is owner

    def test_its_disk_is_lost(self, cluster: Cluster) -> None:
        """Row 24: both nodes give it their record again."""
        assert cluster.witness is not None
        owner, secondary = cluster.pair()
        with under_load(cluster) as clients:
            epoch = owner.group()["epoch"]
            with clients.event():
                cluster.witness.kill()
                cluster.witness.lose_disk()
                log = cluster.witness.log_since()
                cluster.witness.start()
                wait_for("it is given the record", lambda: f"is at epoch {epoch}" in log())
            with clients.event():
                owner.kill()
            assert cluster.owner() is secondary


class Etcd:
    """Three members, on the machine of the witness."""

    def __init__(self, machine: Machine, directory: Path) -> None:
        self._machine = machine
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []
        self.endpoints = [f"http://{machine.lan_ip}:{port}" for port in (2379, 2381, 2383)]
        self._peers = [f"http://{machine.lan_ip}:{port}" for port in (2380, 2382, 2384)]

    def start(self) -> None:
        cluster = ",".join(f"m{number}={url}" for number, url in enumerate(self._peers))
        for number, (client, peer) in enumerate(zip(self.endpoints, self._peers, strict=True)):
            command: list[str | Path] = [
                "etcd", "--name", f"m{number}", "--data-dir", self._directory / f"m{number}", "--logger", "zap",
                "--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", peer,
                "--initial-advertise-peer-urls", peer, "--initial-cluster", cluster,
                "--heartbeat-interval", "50", "--election-timeout", "500",
            ]  # fmt: skip
            with (self._directory / f"m{number}.log").open("ab") as log:
                self._processes.append(
                    subprocess.Popen(self._machine.command(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                )

    def kill_one(self) -> None:
        self._processes[0].kill()
        self._processes[0].wait()

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def test_etcd_with_one_of_three_members_killed(make_cluster: MakeCluster) -> None:
    made: list[Etcd] = []

    def arbiter(cluster: Cluster) -> dict[str, Any]:
        made.append(Etcd(cluster.network.witness, cluster.directory))
        return {"kind": "etcd", "endpoints": made[0].endpoints}

    cluster = make_cluster(arbiter=arbiter)
    (etcd,) = made
    try:
        etcd.start()
        cluster.start()
        owner, secondary = cluster.pair()
        with under_load(cluster) as clients:
            with clients.event():
                etcd.kill_one()
                owner.kill()
            assert cluster.owner() is secondary
            with clients.event():
                owner.start()
                cluster.wait_in_sync()
    finally:
        etcd.close()


def test_nobody_decides_by_itself_with_the_manual_arbiter(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(arbiter={"kind": "manual"}).start()
    owner, secondary = cluster.pair()
    with under_load(cluster) as clients:
        with clients.wait_known().event():
            cluster.move(to=secondary)
        with clients.event():
            cluster.wait_in_sync()
            clients.wait_known()
            cluster.move(to=owner)
        with clients.event():
            owner.kill()
            secondary.wait_held("only the operator can decide")
            clients.wait_held()
            owner.start()

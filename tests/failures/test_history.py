"""Faults in random order, while three clients read and write the same blocks: their history is checked as a whole.

A seed decides what happens, but not when exactly; it is in the output of the test, HISTORY_SEED repeats it, and what
happened is printed when it fails. A history that is wrong is kept where HISTORY_DIR says.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from test_power_loss import Disk, run

from tests.history.check import check
from tests.history.operations import Entry, History, Loss, Note, load, to_line

from .clients import Clients, Load
from .cluster import LINK_PORT, Cluster, Node
from .network import NODES

CLIENTS = 3
ROUNDS = 3
LOSSES = 2
# At most so long clients go on between two events: some faults have not been noticed by then, others have.
PAUSE_S = 1.5
STORMS = 2


def new_seed() -> int:
    """Decides what happens; drawn by the test, as all processes that run tests must find the same names."""
    seed = int(os.environ.get("HISTORY_SEED") or random.randrange(1 << 32))
    print(f"HISTORY_SEED={seed}")
    return seed


class Recording:
    """Clients whose history is recorded, and what happens meanwhile."""

    def __init__(self, cluster: Cluster, clients: Clients, files: list[Path]) -> None:
        self.cluster = cluster
        self.clients = clients
        self._files = files
        self._entries: list[Entry] = []

    def note(self, text: str) -> None:
        print(text)
        self._entries.append(Note(text, time.monotonic_ns()))

    def lost_power(self, begin: int, end: int) -> None:
        self._entries.append(Loss(begin, end))

    def check(self, path: Path) -> None:
        """The clients have ended."""
        entries = [*self._entries, *(entry for file in self._files for entry in load(file))]
        path.write_text("".join(f"{to_line(entry)}\n" for entry in entries))
        if problems := check(History.of(entries)):
            if directory := os.environ.get("HISTORY_DIR"):
                shutil.copy(path, directory)
            pytest.fail("\n\n".join([f"{len(problems)} blocks are wrong, see {path}", *problems[:5]]))


@contextmanager
def recording(cluster: Cluster, seed: int, **more: object) -> Iterator[Recording]:
    files = [cluster.directory / f"history-{seed}-{number}.jsonl" for number in range(1, CLIENTS + 1)]
    with ExitStack() as stack:
        loads = []
        for number, file in enumerate(files, 1):
            options = {
                "to": cluster.nbd(),
                "export": cluster.volume(),
                "file": file,
                "client": number,
                "run": seed,
                **more,
            }
            arguments = [f"--{key}={value}" for key, value in options.items()]
            command = [sys.executable, "-m", "tests.history.record", *arguments]
            loads.append(
                Load(f"recorder {number}", cluster.client, command, cluster.directory / f"recorder-{number}.log")
            )
            stack.callback(loads[-1].close)
        clients = Clients(cluster, loads)
        clients.wait_answers()
        made = Recording(cluster, clients, files)
        yield made
        clients.finish()
        made.check(cluster.directory / f"history-{seed}.jsonl")
    cluster.assert_identical()


# What can happen to a node while all is well. The cluster goes on, or has not noticed.
FAULTS: dict[str, Callable[[Cluster, Node], None]] = {
    "kill": lambda _, node: node.kill(),
    "kill the data process of": lambda _, node: node.kill_data_process(),
    "power off": lambda _, node: node.power_off(),
    "stop": lambda _, node: node.signal(signal.SIGSTOP),
    "move away from": lambda cluster, node: cluster.move(to=cluster.peer_of(node)),
    "cut the link of": lambda _, node: node.machine.drop(tcp_ports=[LINK_PORT]),
    "cut the other node from": lambda cluster, node: cluster.cut(node, cluster.peer_of(node)),
    "let the other node not hear": lambda cluster, node: cluster.cut(node, cluster.peer_of(node), both_ways=False),
    "cut everything from": lambda _, node: node.machine.isolate(),
}


def storm(made: Recording, rng: random.Random) -> None:
    """One fault after the other; before it is put right, perhaps, either node is killed, too."""
    cluster, clients = made.cluster, made.clients
    for fault in rng.sample([*FAULTS], ROUNDS):
        clients.wait_known()
        node = rng.choice(cluster.pair())
        made.note(f"{fault} {node.name}; {cluster.owner().name} is the owner")
        FAULTS[fault](cluster, node)
        if rng.random() < 0.5:
            clients.wait_answers()
            made.note("somebody goes on")
        else:
            time.sleep(rng.uniform(0, PAUSE_S))  # that is what happens, and not to wait for something
        victim = rng.choice([*cluster.nodes.values(), None])
        if victim is not None and victim.running:
            made.note(f"kill {victim.name}")
            victim.kill()
            time.sleep(rng.uniform(0, PAUSE_S))
        made.note("all is put right")
        cluster.repair()
        clients.wait_answers()


@pytest.mark.parametrize("_number", range(STORMS))
def test_storm(cluster: Cluster, _number: int) -> None:
    seed = new_seed()
    with recording(cluster, seed) as made:
        storm(made, random.Random(seed))


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[dict[Path, Disk]]:
    """File systems of the nodes that can lose what was only cached, by where they are mounted."""
    shared = tmp_path / "disks"
    shared.mkdir()
    with ExitStack() as stack:
        # What is mounted or unmounted there is so for all machines, too, though each has its own mounts.
        run("mount", "--bind", shared, shared)
        stack.callback(run, "umount", shared)
        run("mount", "--make-shared", shared)
        made = {}
        for name in NODES:
            where = shared / name
            made[where] = Disk(tmp_path, where)
            stack.callback(made[where].close)
        yield made


def test_both_lose_power_and_what_was_cached(disks: dict[Path, Disk], make_cluster: Callable[..., Cluster]) -> None:
    """What was flushed is there; what was not is there or is gone, but never comes back."""
    seed = new_seed()
    cluster = make_cluster(backing=dict(zip(NODES, disks, strict=True))).start()
    with recording(cluster, seed, stable=0.01) as made:
        for _ in range(LOSSES):
            made.clients.wait_known()
            for load in made.clients.loads:
                load.wait_answers(100)
            owner, secondary = cluster.pair()
            made.note(f"{secondary.name} and {owner.name} lose power")
            secondary.power_off()
            owner.power_off()
            begin = time.monotonic_ns()
            for disk in disks.values():
                disk.lose_power()
            made.lost_power(begin, time.monotonic_ns())
            for node in (owner, secondary):
                node.power_on()
            cluster.wait_in_sync()
            made.clients.wait_answers()

"""No third machine: who is to go on without the other one turns it off. The fence agent works, fails, or hangs."""

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import wait_for

from .clients import under_load
from .cluster import GROUP, Cluster, Node
from .conftest import need_root
from .network import NODES

# A fence agent that does turn a machine off: its processes are killed and its cables are out; unless it is broken.
AGENT = """
import os, signal, subprocess, sys, time
from pathlib import Path

options = dict(line.rstrip("\\n").split("=", 1) for line in sys.stdin)
here = Path(__file__).parent
with (here / "asked").open("a") as asked:
    asked.write(options["action"] + "\\n")
match (here / "broken").read_text():
    case "fails":
        sys.exit("the power switch does not answer")
    case "hangs":
        time.sleep(600)
own = Path("/run/netns", options["plug"]).stat().st_ino
def pids():
    for path in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            if path.stat().st_ino == own:
                yield int(path.parts[2])
        except OSError:
            pass
if options["action"] == "off":
    for port in options["ports"].split():
        enter = ["nsenter", "--net=/run/netns/" + options["switch"]]
        subprocess.run([*enter, "ip", "link", "set", port, "down"], check=True)
    for pid in pids():
        os.kill(pid, signal.SIGKILL)
else:
    running = [pid for pid in pids() if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"]
    sys.exit(0 if running else 2)
"""
TIMEOUT_S = 3


class Agent:
    """The fence agent of both nodes."""

    def __init__(self, directory: Path) -> None:
        self.program = directory / "fence_test"
        self.program.write_text(f"#!{sys.executable}\n{AGENT}")
        self.program.chmod(0o755)
        self._broken = directory / "broken"
        self._asked = directory / "asked"
        self.works()

    def breaks(self, how: str) -> None:
        """From now on it `fails`, or `hangs`."""
        new = self._broken.with_suffix(".new")
        new.write_text(how)
        new.rename(self._broken)

    def works(self) -> None:
        self.breaks("")

    def asked(self) -> list[str]:
        """The actions that it was started for."""
        return self._asked.read_text().split() if self._asked.exists() else []

    def arbiter(self, cluster: Cluster) -> dict[str, Any]:
        agents = {}
        for name in NODES:
            machine = cluster.network.machines[name]
            options = {"plug": machine.namespace, "switch": machine.switch, "ports": " ".join(machine.ports)}
            agents[name] = {"agent": str(self.program), "options": options}
        return {"kind": "fencing", "agents": agents, "timeout_s": TIMEOUT_S}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Agent:
    return Agent(tmp_path_factory.mktemp("agent"))


@pytest.fixture(scope="module")
def _shared_fenced(agent: Agent, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    need_root()
    made = Cluster(tmp_path_factory.mktemp("fenced"), arbiter=agent.arbiter)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def fenced(_shared_fenced: Cluster, agent: Agent) -> Cluster:
    """A cluster in sync, whose agent works."""
    agent.works()
    return _shared_fenced.repair()


def test_the_owner_is_killed(fenced: Cluster) -> None:
    owner, secondary = fenced.pair()
    with under_load(fenced) as clients:
        with clients.event():
            owner.kill()
        assert fenced.owner() is secondary
        with clients.event():
            fenced.repair()


def test_the_owner_loses_power(fenced: Cluster) -> None:
    owner, secondary = fenced.pair()
    with under_load(fenced) as clients:
        with clients.wait_known().event():
            owner.power_off()
        assert fenced.owner() is secondary
        with clients.event():
            fenced.repair()


def test_the_nodes_do_not_see_each_other(fenced: Cluster) -> None:
    """One shoots the other, which is really off then; it does not shoot back when it returns."""
    owner, secondary = fenced.pair()
    with under_load(fenced) as clients:
        with clients.wait_known().event():
            fenced.cut(owner, secondary)
        winner = fenced.owner()
        loser = fenced.peer_of(winner)
        wait_for("the other one is off", lambda: not loser.running)
        with clients.event():
            fenced.repair()
        assert fenced.owner() is winner


@pytest.mark.parametrize(
    ("whose", "how", "why"),
    [
        ("owner", "fails", "its action off ended with exit code 1 (the power switch does not answer)"),
        ("secondary", "hangs", f"failed: not done in {TIMEOUT_S} s"),
    ],
    ids=["owner-fails", "secondary-hangs"],
)
def test_a_node_loses_power_and_the_agent_is_broken(
    fenced: Cluster, agent: Agent, whose: str, how: str, why: str
) -> None:
    """Rule 11: whoever is left holds, and says why; it goes on when the agent is mended."""
    owner, secondary = fenced.pair()
    lost, left = (owner, secondary) if whose == "owner" else (secondary, owner)
    with under_load(fenced) as clients:
        with clients.wait_known().event():
            agent.breaks(how)
            lost.power_off()
            left.wait_held(why)
            clients.wait_held()
            assert left.group()["epoch"] == epoch_of(lost)
            agent.works()
        assert fenced.owner() is left
        with clients.event():
            fenced.repair()


def epoch_of(node: Node) -> int:
    """The epoch of the record that it has saved."""
    epoch: int = json.loads((node.state_dir / "records" / f"{GROUP}.json").read_text())["record"]["epoch"]
    return epoch


def test_both_are_off_and_one_is_booted(fenced: Cluster, agent: Agent) -> None:
    """It may not fence before it has seen the other one, as that one may be the owner, and was perhaps turned on
    first; a restart of its daemon does not change that."""
    owner, secondary = fenced.pair()
    with under_load(fenced) as clients:
        with clients.wait_known().event():
            for node in (owner, secondary):  # at once: neither misses the other
                node.signal(signal.SIGSTOP)
            for node in (owner, secondary):
                node.power_off()
            before = agent.asked()
            lost_nothing(secondary)
            secondary.power_on()
            secondary.wait_held(f"{owner.name} is not fenced, as it has not been seen since this machine booted")
            clients.wait_held()
            secondary.kill()
            secondary.start()
            secondary.wait_held(f"{owner.name} is not fenced, as it has not been seen since this machine booted")
            owner.power_on()
        assert agent.asked() == before
        with clients.event():
            fenced.wait_in_sync()


def lost_nothing(node: Node) -> None:
    """As if all that it had cached had been flushed before its host went down: else it would not ask for the group."""
    path = node.state_dir / "groups" / f"{GROUP}.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"boot_id": ""}))

"""Fencing with real agents: Debian's fence_dummy, and scripts that hang, fail and lie."""

import asyncio
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvloop
from harness import is_running, wait_for

from stortrends_ha.arbiter.fence_agent import FenceError, turn_off
from stortrends_ha.arbiter.fencing import FencingArbiter
from stortrends_ha.arbiter.interface import Granted, Known, Refused, Unreachable
from stortrends_ha.config import FenceAgent
from stortrends_ha.record import Record

BOTH = Record(5, "node-a", ("node-a", "node-b"))
A_ALONE = BOTH.owned_alone("node-a")
DEVICE_PASSWORD = "correct horse"


@dataclass
class Peer:
    """node-b, which is silent unless a test says otherwise."""

    name: str = "node-b"
    answer: Granted | Refused | Unreachable = field(
        default_factory=lambda: Unreachable("node-b is silent", asked=False)
    )
    was_seen: bool = True
    is_alive: bool = False
    last_ns: int = 1
    same_arbiter: bool = True

    async def consent(self, *_: object) -> Granted | Refused | Unreachable:
        return self.answer

    async def ask(self, *_: object) -> Known | Unreachable:
        return Unreachable("node-b is silent", asked=False)

    def seen(self) -> bool:
        return self.was_seen

    def alive(self) -> bool:
        return self.is_alive

    async def will_ask_to_join(self, *_: object) -> bool:
        return True

    def asked_to_join(self, _: str) -> int:
        return 0

    def has_same_arbiter(self) -> bool:
        return self.same_arbiter

    def heard_ns(self) -> int:
        return self.last_ns

    def beat(self) -> None:
        self.last_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Fence:
    """An agent which is a script, and what it has been asked."""

    def __init__(self, directory: Path, script: str) -> None:
        self.directory = directory
        self.program = directory / "fence_test"
        self.asked_path = directory / "asked"
        self.asked_path.touch()
        self.program.write_text(
            f"#!{sys.executable}\nimport json, os, sys, time\n"
            "options = dict(line.rstrip('\\n').split('=', 1) for line in sys.stdin)\n"
            "action = options['action']\n"
            f"with open({str(self.asked_path)!r}, 'a') as file: print(json.dumps([os.getpid(), options]), file=file)\n"
            f"{script}\n"
        )
        self.program.chmod(0o755)
        self.agent = FenceAgent(str(self.program), {"ip": "192.0.2.9", "password": DEVICE_PASSWORD, "lanplus": "1"})

    @property
    def asked(self) -> list[tuple[int, dict[str, str]]]:
        return [tuple(json.loads(line)) for line in self.asked_path.read_text().splitlines()]

    @property
    def actions(self) -> list[str]:
        return [options["action"] for _, options in self.asked]


WORKS = "sys.exit(0 if action == 'off' else 2)"
MakeFence = Callable[[str], Fence]


@pytest.fixture
def make_fence(tmp_path: Path) -> MakeFence:
    return lambda script: Fence(tmp_path, script)


class Node:
    """node-a, whose peer is silent."""

    def __init__(self, agent: FenceAgent, timeout_s: float = 20.0, unanswered_s: float = 60.0) -> None:
        self.peer = Peer()
        self.records: dict[str, Record] = {}
        self.arbiter = FencingArbiter(
            self.peer, lambda group: self.records.get(group, BOTH), self.adopt, agent, timeout_s, unanswered_s
        )

    async def adopt(self, group: str, record: Record) -> bool:
        self.records[group] = record
        return True

    async def go_alone(self, group: str = "g") -> Granted | Refused | Unreachable:
        return await self.arbiter.propose(group, BOTH, A_ALONE)


# A grant that rests on fencing skips an epoch: the peer may have saved another record of the next one.
FENCED = Granted(Record(A_ALONE.epoch + 1, "node-a", ("node-a",)))


class TestFenceDummy:
    async def test_off(self, tmp_path: Path) -> None:
        status = tmp_path / "status"
        status.write_text("on")
        node = Node(FenceAgent("fence_dummy", {"type": "file", "status_file": str(status)}))
        assert await node.go_alone() == FENCED
        assert status.read_text() == "off"

    async def test_off_already(self, tmp_path: Path) -> None:
        status = tmp_path / "status"
        status.write_text("off")
        node = Node(FenceAgent("fence_dummy", {"type": "file", "status_file": str(status)}))
        assert await node.go_alone() == FENCED

    async def test_it_cannot(self) -> None:
        options = {"type": "fail", "power_timeout": "1"}  # it never reports the outlet off
        answer = await Node(FenceAgent("fence_dummy", options)).go_alone()
        assert isinstance(answer, Unreachable)
        assert answer.why.startswith("fencing node-b with fence_dummy failed: its action off ended with exit code ")
        assert "Failed" in answer.why


class TestAgents:
    async def test_options_are_given_on_stdin_and_nowhere_else(self, make_fence: MakeFence) -> None:
        fence = make_fence("open(sys.argv[0] + '.args', 'w').write(repr(sys.argv[1:]))\n" + WORKS)
        assert await Node(fence.agent).go_alone() == FENCED
        assert [options for _, options in fence.asked] == [
            {"ip": "192.0.2.9", "password": DEVICE_PASSWORD, "lanplus": "1", "action": action}
            for action in ("off", "status")
        ]
        assert Path(f"{fence.program}.args").read_text() == "[]"

    @pytest.mark.parametrize(
        ("script", "why"),
        [
            ("sys.exit(1)", "its action off ended with exit code 1"),
            ("sys.exit(2)", "its action off ended with exit code 2"),
            ("os.kill(os.getpid(), 9)", "its action off ended with signal 9"),
            ("sys.exit(0)", "its action off succeeded, but its action status says that the machine is on"),
            ("sys.exit(0 if action == 'off' else 1)", "its action status ended with exit code 1"),
            ("sys.exit(0 if action == 'off' else 'no route')", "its action status ended with exit code 1 (no route)"),
        ],
    )
    async def test_not_confirmed(self, make_fence: MakeFence, script: str, why: str) -> None:
        fence = make_fence(script)
        assert await Node(fence.agent).go_alone() == Unreachable(
            f"fencing node-b with {fence.program} failed: {why}", asked=False
        )

    async def test_not_installed(self) -> None:
        answer = await Node(FenceAgent("fence_of_nowhere")).go_alone()
        assert isinstance(answer, Unreachable)
        assert "fence_of_nowhere failed: it cannot be started: no such program" in answer.why

    async def test_not_executable(self, make_fence: MakeFence) -> None:
        fence = make_fence(WORKS)
        fence.program.write_text("no program")
        answer = await Node(fence.agent).go_alone()
        assert isinstance(answer, Unreachable)
        assert "it cannot be started: Exec format error" in answer.why

    async def test_it_hangs_and_ends_with_all_that_it_has_started(self, make_fence: MakeFence, tmp_path: Path) -> None:
        child = tmp_path / "child"
        fence = make_fence(
            "import signal, subprocess\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            f"open({str(child)!r}, 'w').write(str(subprocess.Popen(['sleep', '600']).pid))\ntime.sleep(600)"
        )
        answer = await Node(fence.agent, timeout_s=2.0).go_alone()
        assert answer == Unreachable(f"fencing node-b with {fence.program} failed: not done in 2 s", asked=False)
        for pid in (fence.asked[0][0], int(child.read_text())):
            wait_for("the agent is dead", lambda pid=pid: not is_running(pid))  # type: ignore[misc]

    async def test_given_up_by_the_caller(self, make_fence: MakeFence) -> None:
        fence = make_fence("time.sleep(600)")
        node = Node(fence.agent)
        proposal = asyncio.create_task(node.go_alone())
        while not fence.asked:
            await asyncio.sleep(0.01)
        proposal.cancel()
        with pytest.raises(asyncio.CancelledError):
            await proposal
        wait_for("the agent is dead", lambda: not is_running(fence.asked[0][0]))
        fence.program.write_text(fence.program.read_text().replace("time.sleep(600)", WORKS))
        assert await node.go_alone() == FENCED

    async def test_what_it_leaves_running_is_not_waited_for(self, make_fence: MakeFence) -> None:
        """A child that keeps stderr open."""
        fence = make_fence(f"import subprocess\nsubprocess.Popen(['sleep', '600'], start_new_session=False)\n{WORKS}")
        assert await Node(fence.agent).go_alone() == FENCED

    async def test_no_secret_is_shown(self, make_fence: MakeFence, caplog: pytest.LogCaptureFixture) -> None:
        fence = make_fence("sys.exit(f\"cannot log in to {options['ip']} with '{options['password']}' (1)\")")
        answer = await Node(fence.agent).go_alone()
        assert isinstance(answer, Unreachable)
        assert answer.why.endswith("exit code 1 (cannot log in to 192.0.2.9 with '***' (1))")
        assert DEVICE_PASSWORD not in caplog.text + repr(answer) + repr(fence.agent)

    async def test_much_to_say(self, make_fence: MakeFence) -> None:
        fence = make_fence("print('noise\\n' * 200_000, 'the reason', sep='', file=sys.stderr)\nsys.exit(1)")
        answer = await Node(fence.agent).go_alone()
        assert isinstance(answer, Unreachable)
        assert answer.why.endswith("(the reason)")

    async def test_an_option_cannot_make_another(self, make_fence: MakeFence) -> None:
        fence = make_fence(WORKS)
        agent = FenceAgent(fence.agent.agent, {"password": "x\naction=status"})
        with pytest.raises(FenceError, match="'password' cannot be passed on"):
            await turn_off("node-b", agent, 20.0)
        assert not fence.asked

    def test_in_the_event_loop_of_the_node(self, make_fence: MakeFence) -> None:
        fence = make_fence(WORKS)
        uvloop.run(turn_off("node-b", fence.agent, 20.0))
        assert fence.actions == ["off", "status"]

    async def test_no_process_is_left(self, make_fence: MakeFence) -> None:
        fence = make_fence(WORKS)
        await turn_off("node-b", fence.agent, 20.0)
        for pid, _ in fence.asked:
            wait_for("it has been waited for", lambda pid=pid: not Path(f"/proc/{pid}").exists())  # type: ignore[misc]


class TestWhenToFence:
    async def test_a_peer_that_answers_is_not_fenced(self, make_fence: MakeFence) -> None:
        fence = make_fence(WORKS)
        node = Node(fence.agent)
        for answer in (Granted(), Refused(BOTH), Refused(BOTH.owned_alone("node-b"))):
            node.peer.answer = answer
            assert await node.go_alone() == answer
        assert not fence.asked

    async def test_for_a_change_that_keeps_the_peer_it_is_not_fenced(self, make_fence: MakeFence) -> None:
        fence = make_fence(WORKS)
        node = Node(fence.agent)
        for new in (BOTH.handed_to("node-b"), BOTH.joined_by("node-b")):
            assert await node.arbiter.propose("g", BOTH, new) == node.peer.answer
        assert not fence.asked

    async def test_not_before_the_peer_has_been_seen_since_boot(self, make_fence: MakeFence) -> None:
        fence = make_fence(WORKS)
        node = Node(fence.agent)
        node.peer.was_seen = False
        answer = await node.go_alone()
        assert isinstance(answer, Unreachable)
        assert "has not been seen since this machine booted" in answer.why
        assert not fence.asked
        node.peer.was_seen = True
        assert await node.go_alone() == FENCED

    async def test_a_peer_that_is_alive_is_given_time(self, make_fence: MakeFence) -> None:
        fence = make_fence(WORKS)
        node = Node(fence.agent)
        node.peer.is_alive = True
        answer = await node.go_alone()
        assert isinstance(answer, Unreachable)
        assert "is alive" in answer.why
        assert not fence.asked

    async def test_a_peer_that_lives_with_another_arbiter_is_not(self, make_fence: MakeFence) -> None:
        fence = make_fence(WORKS)
        node = Node(fence.agent, unanswered_s=0.0)
        node.peer.is_alive, node.peer.same_arbiter = True, False
        answer = await node.go_alone()
        assert isinstance(answer, Unreachable)
        assert "its cluster file has another arbiter" in answer.why
        assert not fence.asked
        node.peer.is_alive = False
        assert await node.go_alone() == FENCED

    async def test_a_peer_that_is_alive_but_never_answers_is_fenced(self, make_fence: MakeFence) -> None:
        fence = make_fence(WORKS)
        node = Node(fence.agent, unanswered_s=0.0)
        node.peer.is_alive = True
        answer = await node.go_alone()  # its last heartbeats count still
        assert isinstance(answer, Unreachable)
        assert fence.actions == ["off", "status"]
        node.peer.is_alive = False
        assert await node.go_alone() == FENCED
        assert fence.actions == ["off", "status"]

    async def test_one_action_for_all_groups(self, make_fence: MakeFence) -> None:
        fence = make_fence("time.sleep(0.2)\n" + WORKS)
        node = Node(fence.agent)
        answers = await asyncio.gather(*(node.go_alone(f"g{number}") for number in range(20)))
        assert set(answers) == {FENCED}
        assert await node.go_alone("later") == FENCED
        assert fence.actions == ["off", "status"]

    async def test_a_peer_that_is_back_is_fenced_again(self, make_fence: MakeFence) -> None:
        fence = make_fence(WORKS)
        node = Node(fence.agent)
        assert await node.go_alone("g") == FENCED
        node.peer.beat()
        assert await node.go_alone("h") == FENCED
        assert fence.actions == ["off", "status"] * 2

    async def test_heard_although_it_is_reported_off(self, make_fence: MakeFence) -> None:
        """The agent has fenced another machine."""
        fence = make_fence(WORKS)
        node = Node(fence.agent, unanswered_s=0.0)
        node.peer.is_alive = True
        answer = await node.go_alone()
        assert isinstance(answer, Unreachable)
        assert "was reported off, but is heard" in answer.why

    async def test_nobody_is_met_while_something_is_granted_because_the_peer_is_off(
        self, make_fence: MakeFence
    ) -> None:
        fence = make_fence("time.sleep(0.2)\n" + WORKS)
        node = Node(fence.agent)
        assert not node.arbiter.fencing
        proposal = asyncio.create_task(node.go_alone())
        while not fence.asked:
            await asyncio.sleep(0.01)
        assert node.arbiter.fencing
        assert await proposal == FENCED
        assert node.arbiter.fencing
        assert FENCED.instead
        node.records["g"] = FENCED.instead  # it is saved: whoever meets this node learns of it
        assert not node.arbiter.fencing

    async def test_what_was_granted_in_vain_keeps_nobody_from_being_met(self, make_fence: MakeFence) -> None:
        """The peer had consented, after all, to a record that was learnt first: what was granted is given up."""
        node = Node(make_fence(WORKS).agent)
        assert await node.go_alone() == FENCED
        node.records["g"] = BOTH.owned_alone("node-a")
        assert not node.arbiter.fencing
        assert await node.arbiter.consider("g", node.records["g"], node.records["g"].joined_by("node-b")) == Granted()

    async def test_a_peer_that_was_fenced_in_vain_is_met_again(self, make_fence: MakeFence) -> None:
        """It was heard until just before, so nothing was granted; and nothing may ever be without it."""
        node = Node(make_fence(WORKS).agent, unanswered_s=0.0)
        node.peer.is_alive = True
        assert isinstance(await node.go_alone(), Unreachable)
        node.peer.is_alive = False
        assert not node.arbiter.fencing

    async def test_a_record_learnt_while_fencing_counts(self, make_fence: MakeFence) -> None:
        fence = make_fence("time.sleep(0.5)\n" + WORKS)
        node = Node(fence.agent)
        proposal = asyncio.create_task(node.go_alone())
        while not fence.asked:
            await asyncio.sleep(0.01)
        newer = BOTH.owned_alone("node-b")
        node.records["g"] = newer
        assert await proposal == Refused(newer)

    async def test_what_was_granted_by_fencing_is_consented_away_to_nobody(self, make_fence: MakeFence) -> None:
        node = Node(make_fence(WORKS).agent)
        assert await node.go_alone() == FENCED  # and before it is on the node's disk:
        assert await node.arbiter.consider("g", BOTH, BOTH.owned_alone("node-b")) == Refused(BOTH)

    async def test_while_it_fences_it_consents_to_nothing(self, make_fence: MakeFence) -> None:
        fence = make_fence("time.sleep(0.5)\n" + WORKS)
        node = Node(fence.agent)
        proposal = asyncio.create_task(node.go_alone())
        while not fence.asked:
            await asyncio.sleep(0.01)
        assert await node.arbiter.consider("g", BOTH, BOTH.owned_alone("node-b")) == Refused(BOTH)
        assert await proposal == FENCED

"""A real etcd as the arbiter: one member and three, members that are killed, and no quorum."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from harness import PATIENCE_S, free_ports

from stortrends_ha.arbiter.etcd_client import TIMEOUT_S, EtcdArbiter
from stortrends_ha.arbiter.interface import Granted, Known, Refused, Unreachable
from stortrends_ha.record import Record

R1 = Record(1, "node-a", ("node-a",))
R2 = R1.joined_by("node-b")
R3 = R2.owned_alone("node-b")
T = TypeVar("T")


class Etcd:
    """An etcd of some members on this machine."""

    def __init__(self, directory: Path, members: int) -> None:
        self.directory = directory
        ports = free_ports(2 * members)
        self.clients = [f"http://127.0.0.1:{port}" for port in ports[:members]]
        self.peers = [f"http://127.0.0.1:{port}" for port in ports[members:]]
        self.processes: list[subprocess.Popen[bytes] | None] = [None] * members

    def start(self, member: int) -> None:
        cluster = ",".join(f"m{number}={url}" for number, url in enumerate(self.peers))
        command = [
            "etcd", "--name", f"m{member}", "--data-dir", str(self.directory / f"m{member}"), "--logger", "zap",
            "--listen-client-urls", self.clients[member], "--advertise-client-urls", self.clients[member],
            "--listen-peer-urls", self.peers[member], "--initial-advertise-peer-urls", self.peers[member],
            "--initial-cluster", cluster, "--heartbeat-interval", "50", "--election-timeout", "500",
        ]  # fmt: skip
        with (self.directory / f"m{member}.log").open("ab") as log:
            self.processes[member] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self, member: int) -> None:
        process = self.processes[member]
        assert process
        process.kill()
        process.wait()
        self.processes[member] = None

    def signal(self, member: int, number: int) -> None:
        process = self.processes[member]
        assert process
        os.kill(process.pid, number)

    def close(self) -> None:
        for member, process in enumerate(self.processes):
            if process:
                self.kill(member)

    def arbiter(self, me: str = "node-a", cluster: str = "test") -> EtcdArbiter:
        return EtcdArbiter(self.clients, cluster, me)


@pytest.fixture
def make_etcd(tmp_path: Path) -> Iterator[Callable[[int], Etcd]]:
    made: list[Etcd] = []

    def make(members: int) -> Etcd:
        made.append(Etcd(tmp_path, members))
        for member in range(members):
            made[-1].start(member)
        return made[-1]

    yield make
    for etcd in made:
        etcd.close()


@pytest.fixture
async def one(make_etcd: Callable[[int], Etcd]) -> Etcd:
    etcd = make_etcd(1)
    await answered(lambda: etcd.arbiter().read("g"))
    return etcd


@pytest.fixture
async def three(make_etcd: Callable[[int], Etcd]) -> Etcd:
    etcd = make_etcd(3)
    for url in etcd.clients:  # each by itself
        await answered(lambda url=url: EtcdArbiter([url], "test", "node-a").read("g"))  # type: ignore[misc]
    return etcd


async def answered(ask: Callable[[], Awaitable[T | Unreachable]], within_s: float = PATIENCE_S) -> T:
    """The first answer of etcd, which may be starting or electing."""
    async with asyncio.timeout(within_s):
        while isinstance(answer := await ask(), Unreachable):
            await asyncio.sleep(0.02)
    return answer


class TestOneMember:
    async def test_from_seed_to_override(self, one: Etcd) -> None:
        arbiter = one.arbiter()
        assert await arbiter.read("g") == Known(None)
        assert await arbiter.propose("g", R1, R2) == Refused(None)
        assert await arbiter.seed("g", R1) == Granted()
        assert await arbiter.seed("g", R1) == Granted()
        assert await arbiter.seed("g", R2) == Refused(R1)
        assert await arbiter.propose("g", R1, R2) == Granted()
        assert await arbiter.propose("g", R1, R2) == Granted()  # asked twice
        assert await arbiter.propose("g", R1, R1.owned_alone("node-b")) == Refused(R2)
        assert await arbiter.force("g", R1, "an old record") == Refused(R2)
        assert await arbiter.force("g", R3, "node-a burnt down") == Granted()
        assert await arbiter.force("g", R3, "node-a burnt down") == Granted()
        assert await arbiter.force("new", R3, "no record at all") == Granted()
        assert await arbiter.read("g") == Known(R3)

    async def test_clusters_and_groups_are_separate(self, one: Etcd) -> None:
        await one.arbiter().seed("g", R1)
        assert await one.arbiter().read("h") == Known(None)
        assert await one.arbiter(cluster="other").read("g") == Known(None)

    async def test_the_override_leaves_a_trace(self, one: Etcd) -> None:
        await one.arbiter().seed("g", R1)
        await one.arbiter("node-b").force("g", R3, "node-a burnt down")
        trace = json.loads(etcdctl(one, "get", "--print-value-only", "/stortrends-ha/test/g/override"))
        assert trace == {
            "record": R3.encode(), "replaced": R1.encode(), "who": "node-b", "note": "node-a burnt down",
        }  # fmt: skip

    async def test_the_record_is_there_to_be_read_by_people(self, one: Etcd) -> None:
        await one.arbiter().seed("g", R2)
        found = etcdctl(one, "get", "--print-value-only", "/stortrends-ha/test/g")
        assert found.strip() == '{"epoch":2,"in_sync":["node-a","node-b"],"owner":"node-a"}'

    async def test_one_of_many_proposals_wins(self, one: Etcd) -> None:
        await one.arbiter().seed("g", R1)
        proposals = [R1.owned_alone(f"node-{number}") for number in range(8)]
        answers = await asyncio.gather(*(one.arbiter().propose("g", R1, new) for new in proposals))
        assert answers.count(Granted()) == 1
        winner = proposals[answers.index(Granted())]
        assert all(answer in (Granted(), Refused(winner)) for answer in answers)
        assert await one.arbiter().read("g") == Known(winner)

    @pytest.mark.parametrize("value", ["x", "[]", '{"epoch":1}', "[" * 5000])
    async def test_something_else_than_a_record(self, one: Etcd, value: str) -> None:
        etcdctl(one, "put", "--", "/stortrends-ha/test/g", value)
        for answer in (await one.arbiter().read("g"), await one.arbiter().propose("g", R1, R2)):
            assert isinstance(answer, Unreachable)
            assert "/stortrends-ha/test/g holds something else than a record" in answer.why

    async def test_a_record_written_by_hand(self, one: Etcd) -> None:
        etcdctl(one, "put", "/stortrends-ha/test/g", json.dumps(R1.encode()))
        assert await one.arbiter().read("g") == Known(R1)
        answer = await one.arbiter().propose("g", R1, R2)
        assert isinstance(answer, Unreachable)
        assert "written by hand" in answer.why

    async def test_killed_and_back(self, one: Etcd) -> None:
        arbiter = one.arbiter()
        await arbiter.seed("g", R1)
        one.kill(0)
        answer = await arbiter.propose("g", R1, R2)
        assert isinstance(answer, Unreachable)
        assert not answer.asked
        assert "connection refused" in answer.why
        one.start(0)
        assert await answered(lambda: arbiter.propose("g", R1, R2)) == Granted()

    async def test_silent(self, one: Etcd) -> None:
        arbiter = one.arbiter()
        await arbiter.seed("g", R1)
        one.signal(0, signal.SIGSTOP)
        started_s = time.monotonic()
        answer = await arbiter.propose("g", R1, R2)
        assert time.monotonic() - started_s < TIMEOUT_S + 0.5
        assert isinstance(answer, Unreachable)
        assert answer.asked
        one.signal(0, signal.SIGCONT)
        assert await answered(lambda: arbiter.propose("g", R1, R2)) == Granted()


class TestThreeMembers:
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
    async def test_one_is_lost(self, three: Etcd, number: int) -> None:
        """Whichever it is: the leader, the one that was asked last, or the third."""
        arbiter = three.arbiter()
        await arbiter.seed("g", R1)
        record = R1
        for member in range(3):
            three.signal(member, number)
            new = record.owned_alone("node-a")
            assert await answered(lambda old=record, new=new: arbiter.propose("g", old, new)) == Granted()  # type: ignore[misc]
            record = new
            if number == signal.SIGKILL:
                three.kill(member)
                three.start(member)
            else:
                three.signal(member, signal.SIGCONT)
            url = three.clients[member]
            found = await answered(lambda url=url: EtcdArbiter([url], "test", "node-a").read("g"))  # type: ignore[misc]
            assert found == Known(record)

    async def test_goes_on_at_once_with_the_member_that_answered(self, three: Etcd) -> None:
        arbiter = three.arbiter()
        await arbiter.seed("g", R1)
        followers = [member for member in range(3) if member != leader(three)]
        three.signal(followers[0], signal.SIGSTOP)
        await answered(lambda: arbiter.read("g"))
        for _ in range(5):
            started_s = time.monotonic()
            assert await arbiter.read("g") == Known(R1)
            if time.monotonic() - started_s < TIMEOUT_S / 3:
                break
        else:
            pytest.fail("the silent member is asked first, again and again")
        three.signal(followers[0], signal.SIGCONT)

    async def test_no_quorum_and_back(self, three: Etcd) -> None:
        arbiter = three.arbiter()
        await arbiter.seed("g", R1)
        three.kill(0)
        three.kill(1)
        for _ in range(3):
            started_s = time.monotonic()
            for answer in (await arbiter.read("g"), await arbiter.propose("g", R1, R2)):
                assert isinstance(answer, Unreachable)
            assert time.monotonic() - started_s < 2 * TIMEOUT_S + 1
        three.start(0)
        assert await answered(lambda: arbiter.propose("g", R1, R2)) == Granted()
        assert await arbiter.read("g") == Known(R2)

    async def test_members_killed_during_a_storm_of_proposals(self, three: Etcd) -> None:
        await answered(lambda: three.arbiter().seed("g", R1))
        granted: dict[int, Record] = {}
        done = asyncio.Event()

        async def propose(me: str) -> None:
            arbiter, made = three.arbiter(me), 0
            while not done.is_set():
                known = await arbiter.read("g")
                if isinstance(known, Unreachable) or known.current is None:
                    await asyncio.sleep(0.01)
                    continue
                made += 1
                new = known.current.owned_alone(f"{me}-{made}")
                if await arbiter.propose("g", known.current, new) == Granted():
                    assert granted.setdefault(new.epoch, new) == new
                await asyncio.sleep(0.002)

        async with asyncio.timeout(90), asyncio.TaskGroup() as tasks:
            for number in range(3):
                tasks.create_task(propose(f"node-{number}"))
            for member in (0, 1, 2, 0):
                most = max(granted, default=0)
                three.kill(member)
                await until(lambda most=most: max(granted, default=0) > most + 5)  # type: ignore[misc]
                three.start(member)
                url = three.clients[member]
                await answered(lambda url=url: EtcdArbiter([url], "test", "node-a").read("g"))  # type: ignore[misc]
            done.set()
        known = await answered(lambda: three.arbiter().read("g"))
        assert known.current
        assert granted.get(known.current.epoch, known.current) == known.current
        assert max(granted) <= known.current.epoch


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


def etcdctl(etcd: Etcd, *arguments: str) -> str:
    environment = {**os.environ, "ETCDCTL_API": "3"}
    command = ["etcdctl", "--endpoints", ",".join(etcd.clients), *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=30).stdout


def leader(etcd: Etcd) -> int:
    status = json.loads(etcdctl(etcd, "endpoint", "status", "--write-out", "json"))
    return next(
        etcd.clients.index(of["Endpoint"])
        for of in status
        if of["Status"]["leader"] == of["Status"]["header"]["member_id"]
    )


class TestNoEtcd:
    """Something else listens there."""

    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"garbage\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n\r\n[]",
            b'HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"succeeded":true}',
            b"HTTP/1.1 404 Not Found\r\n\r\n<html>",
            b'HTTP/1.1 200 OK\r\n\r\n{"kvs":5}',
            b'HTTP/1.1 200 OK\r\n\r\n{"kvs":[{"value":"!"}]}',
            b'HTTP/1.1 200 OK\r\n\r\n{"succeeded":false}',
            b'HTTP/1.1 200 OK\r\n\r\n{"succeeded":false,"responses":{}}',
            b"HTTP/1.1 503 Service Unavailable\r\n\r\n" + b"x" * 1_000_000,
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        ],
    )
    async def test_never_a_grant(self, answer: bytes) -> None:
        async def talk(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(answer)
            writer.close()

        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        arbiter = EtcdArbiter([f"http://127.0.0.1:{port}"], "test", "node-a")
        assert isinstance(await arbiter.propose("g", R1, R2), Unreachable)
        server.close()

    async def test_nobody_answers(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            arbiter = EtcdArbiter([f"http://127.0.0.1:{port}"], "test", "node-a", timeout_s=0.3)
            answer = await arbiter.propose("g", R1, R2)
            assert isinstance(answer, Unreachable)
            assert answer.asked
            assert answer.why == f"etcd cannot be asked: http://127.0.0.1:{port}: no answer in 0.3 s"

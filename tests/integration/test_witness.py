"""A real witness process, asked over TCP: by its clients, by strangers, and while it is killed again and again."""

import asyncio
import contextlib
import json
import os
import random
import resource
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
from harness import PATIENCE_S, PROGRAM, free_ports, program_environment, wait_for

from stortrends_ha.arbiter.interface import Granted, Known, Refused, Unreachable
from stortrends_ha.arbiter.witness_client import WitnessArbiter
from stortrends_ha.arbiter.witness_server import MEMBERS_MAX, STRANGERS_MAX
from stortrends_ha.config import Address
from stortrends_ha.protocol.witness import (
    CLIENT,
    WITNESS,
    Answer,
    ClientHello,
    Open,
    Propose,
    Seal,
    WitnessHello,
    decode_answer,
    encode_answer,
    encode_request,
)
from stortrends_ha.record import Record

KEYS = {"test": b"t" * 32, "other": b"o" * 32}
R1 = Record(1, "node-a", ("node-a",))
R2 = R1.joined_by("node-b")
R3 = R2.owned_alone("node-b")
T = TypeVar("T")


class Witness:
    """A `stortrends-ha witness`, which may be running or not."""

    def __init__(self, directory: Path) -> None:
        self.address = Address("127.0.0.1", free_ports(1)[0])
        self.state = directory / "witness"
        self.log_path = directory / "witness.log"
        self.log_path.touch()
        (self.state / "keys").mkdir(parents=True)
        for cluster, key in KEYS.items():
            path = self.state / "keys" / f"{cluster}.key"
            path.write_text(key.hex())
            path.chmod(0o600)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> list[str]:
        return [*PROGRAM, "witness", "--listen", str(self.address), "--state", str(self.state)]

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    def start(self) -> "Witness":
        self.start_only()
        before = self.log.count("listens on")
        wait_for("the witness listens", lambda: self.log.count("listens on") > before)
        return self

    def start_only(self) -> None:
        with self.log_path.open("ab") as log:  # by another process: a limit to its files does not concern its log
            self._logger = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
        self.process = subprocess.Popen(
            self.command,
            env=program_environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._logger.stdin,
            stderr=subprocess.STDOUT,
        )
        assert self._logger.stdin
        self._logger.stdin.close()

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.wait()

    def stop(self) -> int:
        assert self.process
        self.process.terminate()
        return self.wait()

    def wait(self) -> int:
        """For its end."""
        assert self.process
        code = self.process.wait(PATIENCE_S)
        self._logger.wait(PATIENCE_S)
        self.process = None
        return code

    def client(self, cluster: str = "test", me: str = "node-a", key: bytes | None = None) -> WitnessArbiter:
        return WitnessArbiter(self.address, cluster, me, key or KEYS[cluster])

    def history(self, group: str) -> list[tuple[int, Record]]:
        database = sqlite3.connect(self.state / "witness.db")
        rows = database.execute('SELECT epoch, record FROM history WHERE "group" = ? ORDER BY id', (group,)).fetchall()
        database.close()
        return [(epoch, Record.decode(json.loads(record))) for epoch, record in rows]


@pytest.fixture
def stopped(tmp_path: Path) -> Iterator[Witness]:
    """A witness that does not run."""
    made = Witness(tmp_path)
    yield made
    if made.process and made.process.poll() is None:
        os.kill(made.pid, signal.SIGCONT)
        made.kill()
    assert "Traceback" not in made.log, made.log


@pytest.fixture
def witness(stopped: Witness) -> Witness:
    return stopped.start()


@pytest.fixture
async def client(witness: Witness) -> AsyncIterator[WitnessArbiter]:
    made = witness.client()
    yield made
    await made.close()


async def answered(ask: Callable[[], Awaitable[T | Unreachable]], within_s: float = PATIENCE_S) -> T:
    """The first answer of the witness, which may be starting."""
    async with asyncio.timeout(within_s):
        while isinstance(answer := await ask(), Unreachable):
            await asyncio.sleep(0.01)
    return answer


class TestRequests:
    async def test_from_seed_to_override(self, client: WitnessArbiter) -> None:
        assert await client.read("g") == Known(None)
        assert await client.propose("g", R1, R2) == Refused(None)
        assert await client.seed("g", R1) == Granted()
        assert await client.seed("g", R2) == Refused(R1)
        assert await client.propose("g", R1, R2) == Granted()
        assert await client.propose("g", R1, R2) == Granted()  # asked twice
        assert await client.propose("g", R1, R1.owned_alone("node-b")) == Refused(R2)
        assert await client.read("g") == Known(R2)
        assert await client.force("g", R1, "an old record") == Refused(R2)
        assert await client.force("g", R3, "node-a burnt down") == Granted()
        assert await client.read("g") == Known(R3)

    async def test_many_groups_at_once(self, client: WitnessArbiter) -> None:
        """On a machine that is so busy that some are not answered in time, they are when they are asked again."""

        async def granted(ask: Callable[[], Awaitable[object]]) -> None:
            while isinstance(answer := await ask(), Unreachable):
                pass
            assert answer == Granted()

        groups = [f"g{number}" for number in range(50)]
        await asyncio.gather(*(granted(partial(client.seed, group, R1)) for group in groups))
        await asyncio.gather(*(granted(partial(client.propose, group, R1, R2)) for group in groups))

    async def test_one_of_many_proposals_wins(self, witness: Witness, client: WitnessArbiter) -> None:
        await client.seed("g", R1)
        clients = [witness.client(me=f"node-{number}") for number in range(8)]
        proposals = [R1.owned_alone(f"node-{number}") for number in range(8)]
        answers = await asyncio.gather(
            *(asker.propose("g", R1, new) for asker, new in zip(clients, proposals, strict=True))
        )
        assert answers.count(Granted()) == 1
        winner = proposals[answers.index(Granted())]
        assert await client.read("g") == Known(winner)
        assert all(answer in (Granted(), Refused(winner)) for answer in answers)
        for asker in clients:
            await asker.close()

    async def test_a_cluster_sees_its_own_registers_only(self, witness: Witness, client: WitnessArbiter) -> None:
        await client.seed("g", R1)
        other = witness.client("other")
        assert await other.read("g") == Known(None)
        assert await other.seed("g", R3) == Granted()
        assert await client.read("g") == Known(R1)
        await other.close()

    async def test_a_cluster_is_added_while_it_runs(self, witness: Witness) -> None:
        client = witness.client("new", key=b"n" * 32)
        answer = await client.read("g")
        assert isinstance(answer, Unreachable)
        assert not answer.asked
        assert "keys/new.key" in answer.why
        path = witness.state / "keys" / "new.key"
        path.touch(0o600)
        path.write_text((b"n" * 32).hex())
        assert await client.read("g") == Known(None)
        await client.close()


class TestUnreachable:
    async def test_not_running(self, stopped: Witness) -> None:
        answer = await stopped.client().propose("g", R1, R2)
        assert isinstance(answer, Unreachable)
        assert not answer.asked
        assert answer.why == f"the witness at {stopped.address} cannot be asked: connection refused"

    async def test_killed_and_back(self, witness: Witness, client: WitnessArbiter) -> None:
        await client.seed("g", R1)
        witness.kill()
        answer = await client.read("g")
        assert isinstance(answer, Unreachable)
        witness.start()
        assert await client.propose("g", R1, R2) == Granted()

    async def test_a_connection_that_ended_is_made_anew_at_once(self, witness: Witness, client: WitnessArbiter) -> None:
        """No call fails because the connection that was kept has ended meanwhile."""
        await client.seed("g", R1)
        for _ in range(5):
            witness.kill()
            witness.start()
            assert await client.read("g") == Known(R1)

    async def test_stopped_and_continued(self, witness: Witness, client: WitnessArbiter) -> None:
        await client.seed("g", R1)
        os.kill(witness.pid, signal.SIGSTOP)
        started_s = time.monotonic()
        answers = await asyncio.gather(*(client.propose("g", R1, R2) for _ in range(5)))
        assert time.monotonic() - started_s < 1.5
        assert all(isinstance(answer, Unreachable) and answer.asked for answer in answers), answers
        os.kill(witness.pid, signal.SIGCONT)
        assert await answered(lambda: client.propose("g", R1, R2)) == Granted()

    async def test_its_disk_fails(self, witness: Witness, client: WitnessArbiter) -> None:
        await client.seed("g", R1)
        limits = resource.prlimit(witness.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        answer = await client.propose("g", R1, R2)
        assert isinstance(answer, Unreachable)
        assert "trouble with its disk" in answer.why
        again = await client.read("g")  # not even a read, as long as nothing can be made durable
        assert isinstance(again, Unreachable)
        resource.prlimit(witness.pid, resource.RLIMIT_FSIZE, limits)
        assert await client.read("g") == Known(R1)
        assert await client.propose("g", R1, R2) == Granted()

    async def test_a_call_that_is_given_up_spoils_no_other(self, client: WitnessArbiter) -> None:
        await client.seed("g", R1)
        for _ in range(20):
            given_up = asyncio.create_task(client.read("g"))
            other = asyncio.create_task(client.read("h"))
            await asyncio.sleep(0)  # both have been sent
            given_up.cancel()
            assert await other == Known(None)
            assert await client.read("g") == Known(R1)


# --- Strangers ----------------------------------------------------------------------------------


class Raw:
    """A connection on which a test sends what it likes."""

    def __init__(self, witness: Witness) -> None:
        self.socket = socket.create_connection(("127.0.0.1", witness.address.port), PATIENCE_S)
        self.file = self.socket.makefile("rb")
        self.sent: list[bytes] = []

    def send(self, line: bytes) -> None:
        self.sent.append(line)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(line)

    def line(self) -> bytes:
        """The next line; empty if the witness has closed the connection."""
        try:
            return self.file.readline()
        except ConnectionResetError:
            return b""

    def open(self, key: bytes = KEYS["test"], cluster: str = "test") -> Seal:
        hello = ClientHello(cluster, "node-a", random.randbytes(16)).encode()
        self.send(hello)
        seal = Seal(key, hello, self.line(), CLIENT)
        self.send(seal.seal(encode_request(Open())))
        return seal

    def close(self) -> None:
        self.file.close()
        self.socket.close()


@pytest.fixture
def raw(witness: Witness) -> Iterator[Callable[[], Raw]]:
    made: list[Raw] = []

    def connect() -> Raw:
        made.append(Raw(witness))
        return made[-1]

    yield connect
    for connection in made:
        connection.close()


class TestStrangers:
    async def test_an_unknown_cluster_and_a_wrong_key_look_the_same(self, raw: Callable[[], Raw]) -> None:
        said = []
        for cluster, key in (("test", b"x" * 32), ("nobody", KEYS["test"])):
            connection = raw()
            connection.open(key, cluster)
            said.append(connection.line().decode().replace(cluster, "NAME"))
            assert connection.line() == b""
        assert said[0] == said[1]
        assert "copy the cluster's key file to keys/NAME.key" in said[0]

    async def test_a_recorded_conversation_is_worth_nothing(
        self, client: WitnessArbiter, raw: Callable[[], Raw]
    ) -> None:
        await client.seed("g", R1)
        recorded = raw()
        seal = recorded.open()
        assert decode_answer(seal.open(recorded.line())) == Answer("welcome")
        recorded.send(seal.seal(encode_request(Propose("g", R1, R2))))
        assert decode_answer(seal.open(recorded.line())) == Answer("granted")
        await client.force("g", Record(3, "node-a", ("node-a",)), "")
        again = raw()
        for line in recorded.sent:
            again.send(line)
        assert "witness" in json.loads(again.line())
        assert "refused" in json.loads(again.line())
        assert again.line() == b""

    async def test_a_request_counts_once(self, client: WitnessArbiter, raw: Callable[[], Raw]) -> None:
        await client.seed("g", R1)
        connection = raw()
        seal = connection.open()
        seal.open(connection.line())
        connection.send(seal.seal(encode_request(Propose("g", R1, R2))))
        seal.open(connection.line())
        connection.send(connection.sent[-1])
        assert connection.line() == b""

    @pytest.mark.parametrize(
        "garbage",
        [
            b"\n",
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n",
            b"{}\n",
            b"[" * 10000 + b"\n",
            b"9" * 10000 + b"\n",
            b"x" * 100_000,
            b'{"hello":"../../etc/shadow","who":"node-a","nonce":"' + b"00" * 16 + b'","versions":[1,1]}\n{}\n',
            b'{"hello":"test","who":"node-a","nonce":"' + b"00" * 16 + b'","versions":[1,1]}\nx\n',
            b'{"hello":"test","who":"node-a","nonce":"' + b"00" * 16 + b'","versions":[8,9]}\n',
        ],
    )
    async def test_garbage_ends_its_own_connection(
        self, garbage: bytes, client: WitnessArbiter, raw: Callable[[], Raw]
    ) -> None:
        await client.seed("g", R1)
        connection = raw()
        connection.send(garbage)
        lines = list(iter(connection.line, b""))  # until it is closed
        assert all(set(json.loads(line)) <= {"witness", "nonce", "refused"} for line in lines)
        assert await client.read("g") == Known(R1)

    async def test_garbage_fills_no_log(self, witness: Witness, raw: Callable[[], Raw]) -> None:
        before = len(witness.log)
        for _ in range(200):
            connection = raw()
            connection.send(b"garbage\n")
            assert connection.line() == b""
            connection.close()
        assert len(witness.log) - before < 1000
        assert witness.stop() == 0
        assert "garbage: 200" in witness.log

    async def test_garbage_from_a_member(self, client: WitnessArbiter, raw: Callable[[], Raw]) -> None:
        await client.seed("g", R1)
        for body in (
            {"request": "grant"},
            {"request": "propose", "group": "g", "old": R1.encode(), "new": R1.encode()},
        ):
            connection = raw()
            seal = connection.open()
            seal.open(connection.line())
            connection.send(seal.seal(body))
            assert connection.line() == b""
        assert await client.read("g") == Known(R1)

    async def test_silent_strangers_lock_nobody_out(self, witness: Witness, raw: Callable[[], Raw]) -> None:
        strangers = [raw() for _ in range(2 * STRANGERS_MAX)]
        client = witness.client()
        assert await client.read("g") == Known(None)
        assert strangers[0].line() == b""  # the oldest have given way
        await client.close()

    async def test_half_open_connections_of_a_node_lock_it_not_out(
        self, witness: Witness, raw: Callable[[], Raw]
    ) -> None:
        left_behind = [raw() for _ in range(MEMBERS_MAX + 5)]
        for connection in left_behind:
            seal = connection.open()
            assert decode_answer(seal.open(connection.line())) == Answer("welcome")
        client = witness.client()
        assert await client.read("g") == Known(None)
        assert left_behind[0].line() == b""
        await client.close()


class TestFalseWitness:
    """The client believes nobody who has not the key."""

    async def serve(
        self, talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
    ) -> tuple[asyncio.Server, WitnessArbiter]:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await talk(reader, writer)
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        return server, WitnessArbiter(Address("127.0.0.1", port), "test", "node-a", KEYS["test"])

    @pytest.mark.parametrize(
        "reply",
        [b"", b"\n", b"{}\n", b"x" * 100_000, b'{"refused":5}\n', b'{"witness":7,"nonce":""}\n', b"[" * 9999 + b"\n"],
    )
    async def test_garbage(self, reply: bytes) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write(reply)
            await writer.drain()

        server, client = await self.serve(talk)
        answer = await client.propose("g", R1, R2)
        assert isinstance(answer, Unreachable)
        assert not answer.asked
        server.close()

    async def test_without_the_key_it_is_asked_nothing(self) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            hello = await reader.readline()
            reply = WitnessHello(b"n" * 16, 1).encode()
            writer.write(reply)
            await reader.readline()
            seal = Seal(b"guess" * 8, hello, reply, WITNESS)
            writer.write(seal.seal(encode_answer(Answer("welcome"))))
            writer.write(seal.seal(encode_answer(Answer("granted"))))
            await reader.read()

        server, client = await self.serve(talk)
        answer = await client.propose("g", R1, R2)
        assert isinstance(answer, Unreachable)
        assert not answer.asked
        server.close()

    async def test_somebody_between_can_change_no_answer(self, witness: Witness) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", witness.address.port)
            try:
                while line := await reader.readline():
                    far_writer.write(line)
                    writer.write((await far_reader.readline()).replace(b"refused", b"granted"))
            finally:
                far_writer.close()

        server, client = await self.serve(talk)
        answer = await client.propose("g", R1, R2)  # which is refused, as there is no record
        assert isinstance(answer, Unreachable)
        assert answer.asked
        server.close()

    async def test_somebody_between_can_repeat_no_answer(self, witness: Witness) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", witness.address.port)
            answers: list[bytes] = []
            try:
                while line := await reader.readline():
                    far_writer.write(line)
                    answers.append(await far_reader.readline())
                    writer.write(answers[-1] if len(answers) < 4 else answers[2])
            finally:
                far_writer.close()

        server, client = await self.serve(talk)
        assert await client.seed("g", R1) == Granted()
        # Gets the answer to the seed once more, and asks again on another connection.
        assert await client.propose("g", R2, R3) == Refused(R1)
        server.close()
        await client.close()


# --- Killed while it is asked -------------------------------------------------------------------


class Storm:
    """Clients that propose as fast as they can, each record its own, and remember what was granted."""

    def __init__(self, witness: Witness, groups: list[str]) -> None:
        self.witness = witness
        self.groups = groups
        self.granted: dict[tuple[str, int], Record] = {}
        self.unknown = 0
        self.stop = False

    async def run(self, me: str) -> None:
        client = self.witness.client(me=me)
        made = 0
        while not self.stop:
            group = random.choice(self.groups)
            known = await client.read(group)
            if not isinstance(known, Known) or known.current is None:
                await asyncio.sleep(0.005)
                continue
            made += 1
            await self.propose(client, group, known.current, known.current.owned_alone(f"{me}-{made}"))
        await client.close()

    async def propose(self, client: WitnessArbiter, group: str, old: Record, new: Record) -> None:
        answer = await client.propose(group, old, new)
        if isinstance(answer, Granted):
            before = self.granted.setdefault((group, new.epoch), new)
            assert before == new, f"epoch {new.epoch} of {group} was granted twice: {before} and {new}"
        elif isinstance(answer, Unreachable):
            self.unknown += answer.asked


async def test_killed_again_and_again_during_a_storm_of_proposals(stopped: Witness) -> None:
    stopped.start()
    setup = stopped.client()
    storm = Storm(stopped, ["g", "h"])
    for group in storm.groups:
        await setup.seed(group, R1)
    async with asyncio.timeout(90), asyncio.TaskGroup() as tasks:
        for number in range(6):
            tasks.create_task(storm.run(f"node-{number}"))
        for _ in range(12):
            await answered(lambda: setup.read("g"))
            await asyncio.sleep(random.uniform(0, 0.25))  # any moment will do: of a start, of a change, between them
            stopped.kill()
            stopped.start_only()
            if random.random() < 0.3:
                await asyncio.sleep(random.uniform(0, 0.5))
                stopped.kill()
                stopped.start_only()
        await answered(lambda: setup.read("g"))
        storm.stop = True
    assert storm.granted
    for group in storm.groups:
        known = await answered(lambda group=group: setup.read(group))  # type: ignore[misc]
        assert known.current
        check_history(storm, group, stopped.history(group), known.current)
    await setup.close()
    assert stopped.stop() == 0


def check_history(storm: Storm, group: str, history: list[tuple[int, Record]], current: Record) -> None:
    """Every epoch once, without a gap, up to the record that is there; every grant that somebody got among them."""
    epochs = [epoch for epoch, _ in history]
    assert epochs == list(range(epochs[0], epochs[0] + len(epochs)))
    assert history[-1] == (current.epoch, current)
    kept = dict(history)
    granted = {epoch: record for (of, epoch), record in storm.granted.items() if of == group}
    assert max(granted) <= current.epoch
    for epoch, record in granted.items():
        assert kept.get(epoch, record) == record
        assert epoch in kept or epoch < epochs[0]


async def test_a_proposal_whose_answer_was_lost_is_asked_again(witness: Witness) -> None:
    """Whatever became of the first, the second says what is true."""
    record = R1
    first = witness.client()
    await first.seed("g", record)
    for _ in range(10):
        new = record.owned_alone("node-a")
        proposal = asyncio.create_task(first.propose("g", record, new))
        await asyncio.sleep(random.uniform(0, 0.004))
        witness.kill()
        await proposal
        witness.start()
        assert await first.propose("g", record, new) == Granted()
        record = new
    await first.close()


# --- Start and stop -----------------------------------------------------------------------------


class TestStartAndStop:
    def fails(self, witness: Witness, *words: str) -> None:
        done = subprocess.run(
            witness.command, env=program_environment(), capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == 1, done
        assert "Traceback" not in done.stderr
        said = [line for line in done.stderr.splitlines() if line.startswith("stortrends-ha: ")]
        assert len(said) == 1, done.stderr
        for word in words:
            assert word in said[0]

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    async def test_stops_cleanly_with_clients(self, witness: Witness, client: WitnessArbiter, number: int) -> None:
        await client.seed("g", R1)
        os.kill(witness.pid, number)
        assert witness.wait() == 0
        assert "The witness has stopped (granted: 1)." in witness.log

    def test_tells_the_service_manager(self, stopped: Witness, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(tmp_path / "notify"))
            manager.settimeout(PATIENCE_S)
            monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
            stopped.start()
            assert manager.recv(100) == b"READY=1"
            stopped.stop()
            assert manager.recv(100) == b"STOPPING=1"

    def test_address_in_use(self, stopped: Witness) -> None:
        with socket.create_server(("127.0.0.1", stopped.address.port)):
            self.fails(stopped, str(stopped.address), "address already in use")

    def test_address_of_another_machine(self, stopped: Witness) -> None:
        stopped.address = Address("192.0.2.1", 7801)
        self.fails(stopped, "192.0.2.1:7801")

    def test_state_directory_is_a_file(self, stopped: Witness, tmp_path: Path) -> None:
        stopped.state = tmp_path / "file" / "state"
        (tmp_path / "file").touch()
        self.fails(stopped, str(stopped.state), "Not a directory")

    def test_state_directory_in_use(self, witness: Witness) -> None:
        witness.address = Address("127.0.0.1", free_ports(1)[0])
        self.fails(witness, "Another witness already runs", str(witness.state))

    def test_damaged(self, stopped: Witness) -> None:
        (stopped.state / "witness.db").write_bytes(random.randbytes(8192))
        self.fails(stopped, "witness.db", "damaged", "Move the file away")

    def test_a_registers_file_that_is_a_directory(self, stopped: Witness) -> None:
        (stopped.state / "witness.db").mkdir()
        self.fails(stopped, "witness.db", "cannot be used")

    @pytest.mark.parametrize("address", ["7801", "127.0.0.1", "127.0.0.1:0", ":7801", "127.0.0.1:70000"])
    def test_no_address(self, stopped: Witness, address: str) -> None:
        command = [*PROGRAM, "witness", "--listen", address, "--state", str(stopped.state)]
        done = subprocess.run(command, env=program_environment(), capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 2
        assert "is not an address" in done.stderr

"""Rules 13 and 14 in a data process whose disk really fails or hangs, in every way, in each role."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import nbd_raw as nbd
import pytest
from data_process import DataProcess, Pair
from faulty_disk import HANG, FaultyDisk
from files import MIB
from harness import OWNER as A
from harness import SECONDARY as B
from harness import is_running, wait_for
from test_data_process import BLOCK, Client
from test_power_loss import Disk

from stortrends_ha.record import Record

FIRST = Record(1, A, (A,))
EIO = 5
ASK: dict[str, Callable[[Client], int]] = {
    "read": lambda client: client.ask(nbd.READ, 5 * MIB, BLOCK),
    "write": lambda client: client.ask_write(5 * MIB, b"x"),
    "flush": lambda client: client.ask(nbd.FLUSH),
    "zero": lambda client: client.ask(nbd.ZEROES, 0, BLOCK),
    "trim": lambda client: client.ask(nbd.TRIM, 0, BLOCK),
}


class FaultyPair(Pair):
    """A pair of which one node has a disk that can fail."""

    def __init__(self, directory: Path, faulty: str, disk_timeout_s: float) -> None:
        self.disk = FaultyDisk(directory / "disk", "vm-a.img", 16 * MIB)
        self._faulty = faulty
        super().__init__(directory, {"disk_timeout_s": disk_timeout_s})

    def backing(self, node: str) -> Path:
        return self.disk.path if node == self._faulty else super().backing(node)

    def fail(self, what: str, how: str = "EIO") -> None:
        self.disk.forget_cache()
        self.disk.fail("zero" if what == "trim" else what, how=how)


@pytest.fixture
def make_pair(tmp_path: Path) -> Iterator[Callable[..., FaultyPair]]:
    with ExitStack() as stack:

        def make(faulty: str, disk_timeout_s: float = 20) -> FaultyPair:
            pair = FaultyPair(tmp_path, faulty, disk_timeout_s)
            stack.callback(pair.disk.close)
            stack.enter_context(pair)
            stack.callback(pair.disk.mend)  # nobody who waits for it can be killed
            return pair

        yield make


MakePair = Callable[..., FaultyPair]


def wait_failed(process: DataProcess) -> str:
    failure: str = process.wait("has failed", lambda status: status["fit"]["failure"])["fit"]["failure"]
    return failure


def alone(pair: Pair) -> DataProcess:
    owner = pair.start(A)
    owner.wait("has looked at its disk", lambda status: status["fit"]["blank"])
    owner.lead(FIRST)
    return owner


def refused(client: Client, cookie: int) -> None:
    assert nbd.simple_reply(client.socket) == (EIO, cookie)


# --- Mirrored: the peer has everything -------------------------------------------------------------


@pytest.mark.parametrize("what", ASK)
def test_error_of_the_owners_disk_fails_its_replica_and_no_client_hears_of_it(make_pair: MakePair, what: str) -> None:
    pair = make_pair(A)
    owner, secondary, _ = pair.in_sync()
    client = Client(pair)
    client.write(0, b"a")
    pair.fail(what)
    ASK[what](client)
    assert "Input/output error" in wait_failed(owner)
    assert client.is_silent()
    assert (owner.status["serving"], owner.status["session"]) == (False, False)
    assert not secondary.status["fit"]["failure"]


@pytest.mark.parametrize("what", ["write", "flush", "zero"])
def test_error_of_the_secondarys_disk_fails_its_replica_and_the_owner_goes_on_alone(
    make_pair: MakePair, what: str
) -> None:
    pair = make_pair(B)
    owner, secondary, record = pair.in_sync()
    client = Client(pair)
    client.write(0, b"a")
    pair.fail(what)
    cookie = ASK[what](client)
    assert "Input/output error" in wait_failed(secondary)
    assert "disk" in owner.wait("has lost it", lambda status: not status["session"])["why"]
    owner.lead(record.owned_alone(A))
    client.answered(cookie)


@pytest.mark.parametrize(("whose", "what"), [(A, "read"), (A, "flush"), (B, "flush")])
def test_disk_that_hangs_has_failed(make_pair: MakePair, whose: str, what: str) -> None:
    pair = make_pair(whose, disk_timeout_s=0.5)
    processes = dict(zip((A, B), pair.in_sync()[:2], strict=True))
    client = Client(pair)
    client.write(0, b"a")
    pair.fail(what, HANG)
    ASK[what](client)
    assert "has not answered for 0.5 s" in wait_failed(processes[whose])
    assert client.is_silent()


def test_failed_replica_whose_disk_hangs_does_not_keep_its_process_from_being_stopped(make_pair: MakePair) -> None:
    pair = make_pair(A, disk_timeout_s=0.5)
    owner, _, _ = pair.in_sync()
    client = Client(pair)
    pair.fail("read", HANG)
    ASK["read"](client)
    wait_failed(owner)
    owner.send("stop")
    wait_for("it ends, but for the thread that waits for the disk", lambda: not is_running(owner.pid))


def test_truncated_backing_is_a_failure_though_a_write_makes_it_longer_again(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        owner, _, _ = pair.in_sync()
        client = Client(pair)
        client.write(0, b"a")
        os.truncate(pair.backing(A), 0)
        client.write(0, b"b")
        client.ask(nbd.FLUSH)
        assert "has become shorter than the volume" in wait_failed(owner)
        assert client.is_silent()
        assert owner.status["fit"]["lost_cache"]


def test_removed_backing_is_used_as_long_as_it_is_open(tmp_path: Path) -> None:
    with Pair(tmp_path) as pair:
        pair.in_sync()
        client = Client(pair)
        client.write(0, b"a")
        pair.backing(A).unlink()
        client.write(BLOCK, b"b")
        client.flush()
        assert (client.read(0), client.read(BLOCK)) == (b"a" * BLOCK, b"b" * BLOCK)


# --- Alone: no other node has everything -----------------------------------------------------------


@pytest.mark.parametrize("what", ["write", "flush", "zero"])
def test_last_copy_that_fails_answers_everything_with_an_error(make_pair: MakePair, what: str) -> None:
    pair = make_pair(A)
    owner = alone(pair)
    client = Client(pair)
    client.write(0, b"a")
    pair.fail(what)
    if what == "flush":  # a write is answered when it is stable
        ASK["write"](client)
    ASK[what](client)
    wait_failed(owner)
    with suppress(ConnectionResetError):  # it depends on what the owner had read of it
        assert not client.socket.recv(1)  # what was under way loses its connection
    for ask in ASK.values():
        client = Client(pair)
        refused(client, ask(client))
    assert "clients get errors" in owner.status["why"]


def test_last_copy_with_a_read_error_is_served_on(make_pair: MakePair) -> None:
    pair = make_pair(A)
    owner = alone(pair)
    client = Client(pair)
    client.write(0, b"a")
    pair.fail("read")
    refused(client, ASK["read"](client))
    client.write(MIB, b"b")
    pair.disk.mend()
    assert client.read(0) == b"a" * BLOCK
    assert not owner.status["fit"]["failure"]


def test_last_copy_that_cannot_be_read_for_a_sync_is_served_on_and_says_so(make_pair: MakePair) -> None:
    pair = make_pair(A)
    owner = alone(pair)
    client = Client(pair)
    client.write(0, b"a")
    pair.fail("read")
    secondary = pair.start(B)
    secondary.follow(FIRST)
    owner.wait("says why", lambda status: "what node-b lacks cannot be read" in status["why"])
    client.write(MIB, b"b")
    assert not owner.status["fit"]["failure"]


def test_last_copy_that_hangs_is_waited_for_and_says_so(make_pair: MakePair) -> None:
    pair = make_pair(A, disk_timeout_s=0.5)
    owner = alone(pair)
    client = Client(pair)
    client.write(0, b"a")
    pair.fail("flush", HANG)
    cookie = ASK["write"](client)
    owner.wait("says so", lambda status: "has not answered for 0.5 s" in status["why"])
    pair.disk.mend()
    client.answered(cookie)
    owner.wait("is well again", lambda status: "has not answered" not in status["why"])
    assert not owner.status["fit"]["failure"]


# --- The disk of what is known about the replica -----------------------------------------------------


class StatePair(Pair):
    """A pair of which node-a has a disk of its own for its state."""

    def __init__(self, directory: Path) -> None:
        self.disk = Disk(directory, directory / A)
        self.ballast = directory / A / "ballast"
        super().__init__(directory)

    def backing(self, node: str) -> Path:
        return self.directory / f"{node}.img"

    def lose_reserved_space(self, kind: str) -> None:
        """Of a map, as a copy may that leaves out what is empty."""
        (path,) = (self.directory / A / "groups").glob(f"*.{kind}")
        subprocess.run(["fallocate", "--punch-hole", "--offset", "4096", "--length", "1MiB", path], check=True)

    def fill(self) -> None:
        ballast = os.open(self.ballast, os.O_WRONLY | os.O_CREAT)
        try:
            for size in (MIB, BLOCK, 1):
                while True:
                    try:
                        os.write(ballast, bytes(size))
                    except OSError:
                        break
            os.fsync(ballast)
        finally:
            os.close(ballast)


@pytest.fixture
def state_pair(tmp_path: Path) -> Iterator[StatePair]:
    pair = StatePair(tmp_path)
    try:
        with pair:
            yield pair
    finally:
        pair.disk.close()


def test_owner_that_cannot_write_its_intent_log_fails(state_pair: StatePair) -> None:
    owner, _, _ = state_pair.in_sync()
    client = Client(state_pair)
    client.write(0, b"a")
    state_pair.disk.shut_down()
    client.ask_write(9 * MIB, b"b")
    assert "cannot write" in wait_failed(owner)
    assert client.is_silent()
    assert state_pair.backing(B).read_bytes()[9 * MIB] == 0


def test_full_disk_does_not_fail_the_intent_log(state_pair: StatePair) -> None:
    owner, _, _ = state_pair.in_sync()
    client = Client(state_pair)
    state_pair.fill()
    for at in (0, 5, 9):  # each in a region of its own
        client.write(at * MIB, b"a")
    assert not owner.status["fit"]["failure"]
    owner.kill()
    state_pair.ballast.unlink()
    assert state_pair.start(A).wait("has a status", lambda _: True)["fit"]["differs"]


def test_last_copy_whose_dirty_map_cannot_be_written_goes_on_with_its_intent_log(state_pair: StatePair) -> None:
    owner = alone(state_pair)
    client = Client(state_pair)
    client.write(0, b"a")
    state_pair.lose_reserved_space("dirty")
    state_pair.fill()
    for at in range(16):
        client.write(at * MIB, b"b")
    client.flush()
    state_pair.start(B).follow(FIRST)  # which has nothing: that is to be noted in the map
    owner.wait("says so", lambda status: "dirty: No space left" in status["why"])
    client.write(0, b"c")
    owner.kill()
    state_pair.ballast.unlink()
    assert state_pair.start(A).wait("has a status", lambda _: True)["fit"]["differs"]

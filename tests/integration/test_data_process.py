"""The data process obeys its supervisor: every order, over the real channel, with real clients and real deaths."""

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbd_raw as nbd
import pytest
from data_process import DataProcess, OrderRefused, Pair, boottime_ns
from harness import OWNER as A
from harness import SECONDARY as B
from harness import wait_for

from stortrends_ha.record import Record

FIRST = Record(1, A, (A,))
BLOCK = 4096


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with Pair(tmp_path) as pair:
        yield pair


class Client:
    """One connection of a client that asks and waits."""

    def __init__(self, pair: Pair) -> None:
        self.socket = nbd.connect(pair)  # type: ignore[arg-type]
        pair.sockets.append(self.socket)
        self.socket.sendall(nbd.FLAGS + nbd.option(nbd.EXPORT_NAME, b"vm-a"))
        assert len(nbd.exactly(self.socket, 18 + 10)) == 28
        self._cookie = 0

    def ask(self, kind: int, at: int = 0, length: int = 0, payload: bytes = b"") -> int:
        self._cookie += 1
        self.socket.sendall(nbd.request(kind, at, length or len(payload), self._cookie) + payload)
        return self._cookie

    def ask_write(self, at: int, value: bytes) -> int:
        return self.ask(nbd.WRITE, at, payload=value * BLOCK)

    def answered(self, cookie: int) -> None:
        assert nbd.simple_reply(self.socket) == (0, cookie)

    def write(self, at: int, value: bytes) -> None:
        self.answered(self.ask_write(at, value))

    def read(self, at: int) -> bytes:
        self.answered(self.ask(nbd.READ, at, BLOCK))
        return nbd.exactly(self.socket, BLOCK)

    def flush(self) -> None:
        self.answered(self.ask(nbd.FLUSH))

    def is_silent(self, for_s: float = 0.3) -> bool:
        """Nothing arrives for a while; nothing else can show that something is held."""
        self.socket.settimeout(for_s)
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(nbd.TIMEOUT_S)


def hand_over(owner: DataProcess, new: DataProcess, record: Record) -> Record:
    """A planned handover, as the two supervisors do it."""
    owner.order("release")
    next_record = record.handed_to(new.name)
    following = owner.begin("follow", record=next_record.encode())
    new.lead(next_record)
    assert following() == ""
    new.wait("serves", lambda status: status["serving"])
    owner.send("drop")
    return next_record


# --- Before any order -------------------------------------------------------------------------


def test_process_is_ready_with_its_volumes_open_and_without_a_role(pair: Pair) -> None:
    status = pair.start(A).wait("has a status", lambda _: True)
    assert (status["role"], status["state"], status["epoch"], status["owner"]) == ("idle", "idle", 0, "")
    assert status["in_sync"] == status["endpoints"] == []
    assert [status[name] for name in ("session", "joinable", "serving")] == [False, False, False]
    with pytest.raises(ConnectionRefusedError):
        nbd.connect(pair)  # type: ignore[arg-type]


def test_blank_replica_is_found_to_be_blank(pair: Pair) -> None:
    pair.start(A).wait("is blank", lambda status: status["fit"]["blank"])


@pytest.mark.parametrize(
    ("record", "words"),
    [(Record(2, A, (A,)), "no data of the group"), (Record(1, B, (B,)), "node-b owns the group by this record")],
)
def test_order_that_is_not_safe_is_refused_and_changes_nothing(pair: Pair, record: Record, words: str) -> None:
    process = pair.start(A)
    with pytest.raises(OrderRefused, match=words):
        process.lead(record)
    assert process.status["role"] == "idle"
    process.lead(FIRST)
    process.wait("serves", lambda status: status["serving"])


# --- Alone, joining, mirrored -----------------------------------------------------------------


def test_owner_that_is_alone_serves_without_a_peer_and_settles(pair: Pair) -> None:
    owner = pair.start(A)
    owner.lead(FIRST)
    client = Client(pair)
    client.write(0, b"a")
    assert client.read(0) == b"a" * BLOCK
    client.flush()
    status = owner.wait("is settled", lambda status: status["fit"]["settled_epoch"] == 1)
    assert (status["state"], status["role"], status["in_sync"]) == ("alone", "primary", [A])
    assert owner.state_file()["settled_epoch"] == 1


def test_secondary_is_filled_while_the_owner_serves_and_then_mirrors(pair: Pair) -> None:
    owner = pair.start(A)
    owner.lead(FIRST)
    client = Client(pair)
    for at in range(0, 64 * BLOCK, BLOCK):
        client.write(at, b"a")
    secondary = pair.start(B)
    secondary.follow(FIRST)
    record = pair.join(owner, secondary, FIRST)
    client.write(0, b"b")
    assert record == Record(2, A, (A, B))
    assert pair.backing(B).read_bytes()[: 2 * BLOCK] == b"b" * BLOCK + b"a" * BLOCK
    assert not secondary.status["fit"]["needs_sync"]


def test_session_of_another_record_is_refused_until_the_secondary_is_told_of_it(pair: Pair) -> None:
    owner, secondary, record = pair.in_sync()
    newer = Record(record.epoch + 1, A, record.in_sync)
    owner.lead(newer)
    status = owner.wait("is refused", lambda status: "not known on node-b yet" in status["why"])
    assert status["link"]["state"] == "connecting"
    secondary.follow(newer)
    owner.wait("is in session", lambda status: status["session"])
    secondary.follow(Record(record.epoch + 2, A, record.in_sync))
    owner.wait("is refused as older", lambda status: "is older than" in status["why"])


def test_writes_are_held_when_the_secondary_dies_and_answered_when_the_owner_may_go_on_alone(pair: Pair) -> None:
    owner, secondary, record = pair.in_sync()
    client = Client(pair)
    client.write(0, b"a")
    secondary.kill()
    cookie = client.ask_write(BLOCK, b"b")
    owner.wait("holds", lambda status: not status["session"] and status["state"] == "held" and not status["serving"])
    assert client.is_silent()
    owner.lead(record.owned_alone(A))
    client.answered(cookie)
    client.write(2 * BLOCK, b"c")
    secondary = pair.start(B)
    secondary.follow(record.owned_alone(A))
    pair.join(owner, secondary, record.owned_alone(A))
    owner.stop()
    secondary.stop()
    pair.assert_identical()


def test_owner_that_was_killed_reconciles_before_it_answers_and_need_not_go_alone(pair: Pair) -> None:
    owner, secondary, record = pair.in_sync()
    Client(pair).write(0, b"a")
    owner.kill()
    with pair.backing(A).open("r+b") as file:  # as if it had been killed in the middle of a write
        file.write(b"b" * BLOCK)
    owner = pair.start(A)
    assert owner.wait("has a status", lambda _: True)["fit"]["differs"]
    owner.lead(record)
    owner.wait("serves", lambda status: status["serving"] and not status["fit"]["differs"])
    assert Client(pair).read(0) == b"b" * BLOCK
    assert not owner.status["peer_unfit"]
    assert secondary.status["session"]
    pair.assert_identical()


def test_secondary_that_was_killed_resumes(pair: Pair) -> None:
    owner, secondary, record = pair.in_sync()
    client = Client(pair)
    client.write(0, b"a")
    secondary.kill()
    cookie = client.ask_write(BLOCK, b"b")
    secondary = pair.start(B)
    secondary.follow(record)
    client.answered(cookie)
    assert owner.status["peer_unfit"] == ""


def test_blank_secondary_that_the_record_has_in_sync_is_unfit(pair: Pair) -> None:
    owner, secondary, record = pair.in_sync()
    secondary.stop()
    (pair.directory / B / "groups" / "rg-a.json").unlink()
    pair.backing(B).write_bytes(b"")
    with pair.backing(B).open("r+b") as file:
        file.truncate(16 << 20)
    secondary = pair.start(B)
    secondary.follow(record)
    assert "node-b is blank" in owner.wait("asks", lambda status: status["peer_unfit"])["peer_unfit"]


# --- Joinable and the record ------------------------------------------------------------------


def test_owner_holds_when_it_loses_a_secondary_that_may_have_been_added(pair: Pair) -> None:
    owner, secondary = pair.start(A), pair.start(B)
    owner.lead(FIRST)
    secondary.follow(FIRST)
    owner.wait("can be joined", lambda status: status["joinable"])
    client = Client(pair)
    client.write(0, b"a")
    secondary.kill()
    owner.wait("holds", lambda status: status["state"] == "held" and not (status["joinable"] or status["serving"]))
    cookie = client.ask_write(0, b"b")
    assert client.is_silent()
    owner.lead(FIRST)  # nothing was proposed
    client.answered(cookie)
    assert client.read(0) == b"b" * BLOCK


def test_owner_whose_secondary_was_added_before_it_was_lost_goes_on_mirrored(pair: Pair) -> None:
    owner, secondary = pair.start(A), pair.start(B)
    owner.lead(FIRST)
    secondary.follow(FIRST)
    owner.wait("can be joined", lambda status: status["joinable"])
    secondary.kill()
    owner.wait("holds", lambda status: status["state"] == "held")
    client = Client(pair)
    cookie = client.ask_write(0, b"a")
    joined = FIRST.joined_by(B)
    owner.lead(joined)
    assert client.is_silent()
    secondary = pair.start(B)
    secondary.follow(joined)
    client.answered(cookie)
    assert pair.backing(B).read_bytes()[:1] == b"a"


def test_peer_is_joinable_only_while_its_promise_holds(pair: Pair) -> None:
    owner, secondary = pair.start(A), pair.start(B)
    owner.lead(FIRST, lease=False)
    secondary.follow(FIRST)
    owner.wait("has everything copied", lambda status: "about to be added" in status["why"])
    assert owner.status["serving"]
    assert not any(status["joinable"] for status in owner.statuses)
    owner.lease(0.3)
    owner.wait("can be joined", lambda status: status["joinable"])
    owner.wait("lost the promise", lambda status: not status["joinable"] and not status["serving"])
    owner.lead(FIRST, lease=False)
    owner.wait("goes on alone", lambda status: status["serving"])


def test_each_node_has_blocks_of_its_own_for_what_differs_and_may_change_them_at_any_start(tmp_path: Path) -> None:
    with Pair(tmp_path, {"dirty_block": "4KiB"}) as pair:
        owner, secondary, record = pair.in_sync()
        secondary.kill()
        owner.wait("has lost its secondary", lambda status: not status["session"])
        alone = record.owned_alone(A)
        owner.lead(alone)
        client = Client(pair)
        client.write(9 << 20, b"a")
        owner.wait("knows of one block", lambda status: status["volumes"]["vm-a"]["dirty_bytes"] == 4096)
        pair.configure({"dirty_block": "512KiB"})
        secondary = pair.start(B)
        secondary.follow(alone)
        joined = pair.join(owner, secondary, alone)
        pair.assert_identical()
        client.write(10 << 20, b"b")
        for process in (owner, secondary):
            process.kill()
        owner, secondary = pair.start(A), pair.start(B)
        owner.lead(joined)
        secondary.follow(joined)
        owner.wait("is in sync", lambda status: status["state"] == "in-sync" and status["serving"])
        pair.assert_identical()
        for process in (owner, secondary):
            assert "is lost" not in process.log


# --- The gate ---------------------------------------------------------------------------------


def test_replies_are_held_when_the_lease_runs_out_and_leave_in_order_when_it_is_renewed(pair: Pair) -> None:
    owner, _, _ = pair.in_sync()
    client = Client(pair)
    client.write(0, b"a")
    owner.lease(0)
    owner.wait("holds", lambda status: not status["serving"] and "lease has run out" in status["why"])
    write, read = client.ask_write(BLOCK, b"b"), client.ask(nbd.READ, 0, BLOCK)
    assert client.is_silent()
    owner.lease()
    client.answered(write)
    client.answered(read)
    assert nbd.exactly(client.socket, BLOCK) == b"a" * BLOCK
    assert owner.wait("serves", lambda status: status["serving"])["state"] == "in-sync"


def test_lease_ends_by_itself(pair: Pair) -> None:
    owner, _, _ = pair.in_sync()
    client = Client(pair)
    owner.lease(0.2)
    began_s = time.monotonic()
    owner.wait("holds", lambda status: not status["serving"])
    assert time.monotonic() - began_s < 5
    client.ask(nbd.READ, 0, BLOCK)
    assert client.is_silent()


def test_stopped_process_answers_nothing_when_it_is_continued_after_its_lease(pair: Pair) -> None:
    owner, _, _ = pair.in_sync()
    client = Client(pair)
    owner.lease(1.0)
    for value in (b"a", b"b"):  # so that the lease has been read
        client.write(0, value)
    owner.signal(signal.SIGSTOP)
    client.ask(nbd.READ, 0, BLOCK)
    until_ns = boottime_ns() + 10**9
    wait_for("the lease has ended", lambda: boottime_ns() > until_ns)
    owner.signal(signal.SIGCONT)
    owner.wait("knows", lambda status: not status["serving"])
    assert client.is_silent()


def test_new_owner_answers_nothing_before_it_may(pair: Pair) -> None:
    owner = pair.start(A)
    from_ns = boottime_ns() + 700_000_000
    owner.lead(FIRST, not_before_ns=from_ns)
    client = Client(pair)  # it can connect and negotiate
    client.write(0, b"a")
    assert boottime_ns() >= from_ns


# --- Moving -----------------------------------------------------------------------------------


def test_group_is_handed_over_and_back_under_load_and_nothing_is_lost(pair: Pair) -> None:
    owner, secondary, record = pair.in_sync()
    stop, answered, newest = threading.Event(), dict[int, bytes](), dict[int, bytes]()

    def load() -> None:
        client, at = Client(pair), 0
        while not stop.is_set():
            value = bytes([at % 251 + 1])
            try:
                client.write(at % 256 * BLOCK, value)
            except (ConnectionError, AssertionError):  # as a client does: connect again, ask again
                client = wait_for("a new connection", lambda: connected(pair))
                continue
            answered[at % 256] = newest[at % 256] = value
            at += 1

    thread = threading.Thread(target=load)
    thread.start()
    pauses_s = []
    try:
        for _ in range(3):
            answered.clear()
            wait_for("the load goes on", lambda: len(answered) > 5)
            began_s = time.monotonic()
            record = hand_over(owner, secondary, record)
            pauses_s.append(time.monotonic() - began_s)
            owner, secondary = secondary, owner
            secondary.wait_state("in-sync")
    finally:
        stop.set()
        thread.join()
    client = Client(pair)
    for number, value in newest.items():
        assert client.read(number * BLOCK) == value * BLOCK
    assert min(pauses_s) < 1, pauses_s
    assert record.epoch == 5
    assert [owner.status["link"]["state"], secondary.status["fit"]["differs"]] == ["connected", False]
    owner.stop()
    secondary.stop()
    pair.assert_identical()


def connected(pair: Pair) -> Client | None:
    try:
        return Client(pair)
    except (OSError, AssertionError):
        return None


def test_clients_stay_connected_over_a_handover_until_they_are_dropped(pair: Pair) -> None:
    owner, secondary, record = pair.in_sync()
    client = Client(pair)
    owner.order("release")
    client.ask(nbd.READ, 0, BLOCK)
    next_record = record.handed_to(B)
    owner.follow(next_record)
    assert client.is_silent()
    secondary.lead(next_record)
    owner.send("drop")
    assert nbd.is_closed(client.socket)


def test_clients_that_nobody_drops_are_dropped_after_a_second(pair: Pair) -> None:
    owner, _, record = pair.in_sync()
    client = Client(pair)
    owner.order("release")
    owner.follow(record.handed_to(B))
    assert nbd.is_closed(client.socket)


def test_release_that_was_called_off_lets_the_same_clients_go_on(pair: Pair) -> None:
    owner, _, record = pair.in_sync()
    client = Client(pair)
    client.write(0, b"a")
    owner.order("release")
    assert not owner.status["fit"]["differs"]
    cookie = client.ask(nbd.READ, 0, BLOCK)
    owner.wait("has stopped", lambda status: not status["serving"])
    assert client.is_silent()
    owner.lead(record)
    client.answered(cookie)
    assert nbd.exactly(client.socket, BLOCK) == b"a" * BLOCK
    client.write(0, b"b")
    assert connected(pair)


def test_release_without_a_secondary_fails_and_is_taken_back(pair: Pair) -> None:
    owner = pair.start(A)
    owner.lead(FIRST)
    client = Client(pair)
    with pytest.raises(OrderRefused, match="no secondary in sync"):
        owner.order("release")
    owner.lead(FIRST)
    client.write(0, b"a")


def test_secondary_that_stopped_listening_takes_over_with_everything_that_was_answered(pair: Pair) -> None:
    owner, secondary, record = pair.in_sync()
    client = Client(pair)
    client.write(0, b"a")
    owner.signal(signal.SIGSTOP)
    secondary.order("idle")
    assert secondary.status["role"] == "idle"
    owner.kill()
    taken = record.owned_alone(B)
    secondary.lead(taken)
    client = wait_for("the new owner serves", lambda: connected(pair))
    assert client.read(0) == b"a" * BLOCK
    client.write(0, b"b")
    owner = pair.start(A)
    owner.follow(taken)
    pair.join(secondary, owner, taken)
    assert pair.backing(A).read_bytes()[:1] == b"b"
    assert not owner.status["fit"]["differs"]


def test_idle_owner_serves_nobody_and_can_be_led_again(pair: Pair) -> None:
    owner, _, record = pair.in_sync()
    client = Client(pair)
    client.write(0, b"a")
    owner.order("idle")
    assert nbd.is_closed(client.socket)
    assert connected(pair) is None
    assert owner.status["fit"]["differs"]  # it may have what the peer has not
    owner.lead(record.owned_alone(A))
    Client(pair).write(0, b"a")


# --- Addresses and endpoints ------------------------------------------------------------------


def test_address_in_use_is_told_and_taken_when_it_is_free(pair: Pair) -> None:
    with socket.create_server(("127.0.0.1", pair.nbd_port)):
        owner = pair.start(A)
        owner.lead(FIRST)
        status = owner.wait("says so", lambda status: "Address already in use" in status["why"])
        assert status["state"] == "held"
    owner.wait("listens", lambda status: status["state"] == "alone")
    Client(pair).write(0, b"a")


def test_connections_of_clients_are_known_on_both_nodes_and_kept_when_the_owner_is_lost(pair: Pair) -> None:
    owner, secondary, _ = pair.in_sync()
    client = Client(pair)
    endpoint = [*client.socket.getsockname(), "127.0.0.1", pair.nbd_port]
    owner.wait("knows", lambda status: status["endpoints"] == [endpoint])
    secondary.wait("knows", lambda status: status["endpoints"] == [endpoint])
    owner.kill()
    secondary.wait("has lost it", lambda status: not status["session"])
    assert secondary.status["endpoints"] == [endpoint]


def test_client_that_has_just_come_is_among_the_last_words_of_an_owner_that_hands_over(pair: Pair) -> None:
    """Told while the session is there: the supervisor builds on that, as without one they may be of long ago."""
    owner, secondary, _ = pair.in_sync()
    clients = [Client(pair) for _ in range(3)]  # so fast that the owner has not told of all of them
    owner.order("release")
    secondary.wait("has lost it", lambda status: not status["session"])
    expected = sorted([*client.socket.getsockname(), "127.0.0.1", pair.nbd_port] for client in clients)
    told = [sorted(status["endpoints"]) for status in secondary.statuses if status["session"]]
    assert told[-1] == expected


# --- The end ----------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["owner", "secondary"])
def test_orderly_stop_leaves_nothing_to_sync(pair: Pair, who: str) -> None:
    owner, secondary, record = pair.in_sync()
    Client(pair).write(0, b"a")
    (owner if who == "owner" else secondary).stop()
    if who == "owner":
        owner = pair.start(A)
        owner.lead(record)
    else:
        secondary = pair.start(B)
        secondary.follow(record)
    status = owner.wait("is in session", lambda status: status["session"])
    assert status["state"] in ("in-sync", "held")
    assert not status["peer_unfit"]


def test_process_ends_with_its_supervisor(pair: Pair) -> None:
    owner = pair.start(A)
    owner.lead(FIRST)
    ended: Callable[[], bool] = lambda: not owner.running  # noqa: E731
    owner._sock.shutdown(socket.SHUT_RDWR)
    wait_for("it has ended", ended)


def test_owner_that_is_alone_does_not_wait_for_a_sync_when_it_stops(pair: Pair) -> None:
    owner = pair.start(A)
    owner.lead(FIRST)
    client = Client(pair)
    for at in range(0, 16 << 20, 1 << 20):
        client.answered(client.ask(nbd.WRITE, at, payload=b"a" * (1 << 20)))
    secondary = pair.start(B)
    secondary.follow(FIRST)
    owner.wait("syncs", lambda status: status["session"])
    began_s = time.monotonic()
    owner.stop()
    assert time.monotonic() - began_s < 4

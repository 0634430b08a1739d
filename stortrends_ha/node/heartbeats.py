"""The beats of a node on the network: one UDP socket a path, sending on a fixed schedule, receiving from anybody.

Job: say the news of this node every interval, and at once when it changes (``kick``); give what is authentic to
``cluster.membership`` and ``consent``.
Invariants:
- Nothing here waits for a disk, a client, a name server or another path (rule 14): sends do not block and a send that
  fails is counted; names are looked up beside; a path whose address is missing is tried again every second.
- The schedule is absolute: a late beat does not delay the later ones. Beats are at least ``HEARTBEAT_GAP_S`` apart.
- A datagram counts by its signature alone, wherever it comes from; everything else is dropped and counted (event 21).
- A turn of the event loop takes at most ``HEARTBEATS_PER_WAKE_UP`` datagrams of a path.
The time is CLOCK_BOOTTIME, taken before a beat is sent and after one was received: both err on the safe side of rule 5.
Neighbours: the supervisor gives ``news`` and is told by ``on_beat``; neither may block, or beats are late.
"""

import asyncio
import contextlib
import logging
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from stortrends_ha import __version__
from stortrends_ha.boottime import now_ns
from stortrends_ha.cluster.membership import Membership
from stortrends_ha.config.model import Address
from stortrends_ha.errors import ProtocolError
from stortrends_ha.limits import HEARTBEAT_DATAGRAM_BYTES, HEARTBEAT_GAP_S, HEARTBEATS_PER_WAKE_UP
from stortrends_ha.node.consent import Consent, OnAsk, Outcome
from stortrends_ha.protocol.heartbeat import GroupBeat, Heartbeat, Message, decode, encode
from stortrends_ha.record import Record

log = logging.getLogger(__name__)

# A path that cannot be opened (its address is missing, its name is unknown) is tried again so often.
OPEN_AGAIN_S = 1.0
# A peer that is given by name may move.
LOOK_UP_AGAIN_S = 60.0
# A path whose troubles come and go is not logged more often.
LOG_AGAIN_S = 10.0
# Rides out a flood while the event loop is busy; the kernel may grant less.
RECEIVE_BUFFER_BYTES = 1 << 20

SocketAddress = tuple[Any, ...]


def new_incarnation() -> int:
    """The number of a new life of a node."""
    return secrets.randbits(64) or 1


@dataclass(frozen=True, slots=True)
class News:
    """What this node says of itself in a beat."""

    groups: Sequence[GroupBeat] = ()
    drained: bool = False
    stopping: bool = False


@dataclass(frozen=True, slots=True)
class PathView:
    """How one path is, for status and metrics; counts are of datagrams since the start."""

    own: Address
    peer: Address
    problem: str  # why it does not work now, as far as this node can tell; empty if it cannot
    refused: str  # what the newest datagram was that does not belong here: not authentic, or of other nodes
    sent: int
    send_errors: int
    forged: int  # not authentic, or garbage
    received: int
    late: int
    old: int
    unproven: int
    strange: int
    silent_s: float


class _Path:
    """One socket, from our address of this path to the peer's."""

    def __init__(self, own: Address, peer: Address, on_data: Callable[[bytes], None], on_open: Callable[[], None]):
        self.own, self.peer = own, peer
        self.problem = "it has not been opened yet"
        self.refused = ""
        self.sent = self.send_errors = self.forged = self.outdated = 0
        self._on_data = on_data
        self._on_open = on_open
        self._socket: socket.socket | None = None
        self._target: SocketAddress = ()
        self._log_from_s = 0.0

    async def keep(self) -> None:
        """Open the socket, as soon as that is possible, and follow the peer's name; until cancelled."""
        try:
            while not await self._try(self._open):
                await asyncio.sleep(OPEN_AGAIN_S)
            log.info("Heartbeats go from %s to %s.", self.own, self.peer)
            self._on_open()
            while True:
                await asyncio.sleep(LOOK_UP_AGAIN_S)
                await self._try(self._look_up)
        finally:
            self._close()

    async def _try(self, step: Callable[[], Any]) -> bool:
        try:
            await step()
        except OSError as error:
            self._trouble(f"{self.own} to {self.peer}: {error.strerror or error}")
            return False
        self.problem = ""
        return True

    def _trouble(self, problem: str) -> None:
        now_s = time.monotonic()
        if problem != self.problem and now_s >= self._log_from_s:
            log.warning("Heartbeats do not go from %s", problem)
            self._log_from_s = now_s + LOG_AGAIN_S
        self.problem = problem

    async def _open(self) -> None:
        family, own = await _address(self.own)
        _, self._target = await _address(self.peer, family)
        with contextlib.ExitStack() as undo:
            opened = undo.enter_context(socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
            opened.bind(own)
            undo.pop_all()
        self._socket = opened
        asyncio.get_running_loop().add_reader(opened, self._readable)

    async def _look_up(self) -> None:
        assert self._socket is not None
        _, self._target = await _address(self.peer, self._socket.family)

    def _close(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def send(self, data: bytes) -> None:
        """Send, if that is possible at once; the next beat is not far."""
        if self._socket is None:
            return
        try:
            self._socket.sendto(data, self._target)
        except OSError as error:  # unreachable, forbidden by a firewall, no address left, buffer full
            self.send_errors += 1
            self._trouble(f"{self.own} to {self.peer}: {error.strerror or error}")
        else:
            self.sent += 1
            self.problem = ""

    def _readable(self) -> None:
        for _ in range(HEARTBEATS_PER_WAKE_UP):
            if self._socket is None:
                return
            try:
                data = self._socket.recv(HEARTBEAT_DATAGRAM_BYTES + 1)
            except OSError:  # there is no more; or the network said something of a datagram we sent
                return
            self._on_data(data)

    def refuse(self, why: str) -> None:
        """Note a datagram that is not authentic."""
        self.forged += 1
        self.note(why)

    def note(self, why: str) -> None:
        """Say what comes here that does not belong here; in the log once."""
        if not self.refused:
            log.warning("The heartbeat address %s gets %s; such datagrams are dropped.", self.own, why)
        self.refused = why


async def _address(of: Address, family: int = socket.AF_UNSPEC) -> tuple[int, SocketAddress]:
    """The socket family and address; only names are looked up elsewhere than here. Raises OSError."""
    try:
        found = socket.getaddrinfo(of.host, of.port, family, socket.SOCK_DGRAM, 0, socket.AI_NUMERICHOST)
    except socket.gaierror:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(of.host, of.port, family=family, type=socket.SOCK_DGRAM)
    return found[0][0], found[0][4]


class Heartbeats:
    """The beats of one node. ``async with`` starts them; the paths come up by themselves, as soon as they can.

    ``paths``: (own address, the peer's). ``news`` is asked at the moment of sending; ``on_beat`` is called with the
    number of the path when ``membership.peer`` is a new one; ``on_ask`` answers the peer's questions (see ``consent``).
    """

    def __init__(
        self,
        membership: Membership,
        key: bytes,
        paths: Sequence[tuple[Address, Address]],
        news: Callable[[], News],
        on_beat: Callable[[int], None],
        on_ask: OnAsk,
    ) -> None:
        self._membership = membership
        self._key = key
        self._news = news
        self._on_beat = on_beat
        self._consent = Consent(membership, self._send, on_ask)
        self._paths = [self._path(number, own, peer) for number, (own, peer) in enumerate(paths)]
        self._keeping: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None  # while it runs
        self._interval_s = membership.timing.heartbeat_interval_s
        self._due_s = 0.0  # of the next beat of the schedule, by the event loop's clock
        self._beaten_s = 0.0  # when the newest beat was sent
        self._timer: asyncio.TimerHandle | None = None
        self._kicked: asyncio.TimerHandle | None = None
        self._other_sections: tuple[str, ...] = ()

    def _path(self, number: int, own: Address, peer: Address) -> _Path:
        return _Path(own, peer, lambda data: self._received(number, data), self.kick)

    async def __aenter__(self) -> "Heartbeats":
        self._loop = asyncio.get_running_loop()
        self._keeping = [asyncio.create_task(path.keep()) for path in self._paths]
        self._due_s = self._loop.time()
        self._timer = self._loop.call_at(self._due_s, self._on_schedule, self._loop)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._loop is not None and self._kicked is not None:  # the last news, such as that this node stops
            self._beat(self._loop)
        self._loop = None
        if self._timer is not None:
            self._timer.cancel()
        await self._consent.close()
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)

    # --- Sending ------------------------------------------------------------------------------

    def kick(self) -> None:
        """The news has changed: say it in the next turn of the event loop, or when the gap is over."""
        if self._loop is not None and self._kicked is None:
            self._kicked = self._loop.call_at(self._beaten_s + HEARTBEAT_GAP_S, self._beat, self._loop)

    def _on_schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        now_s = loop.time()
        self._due_s = next_due_s(self._due_s, now_s, self._interval_s)
        self._timer = loop.call_at(self._due_s, self._on_schedule, loop)
        if now_s - self._beaten_s < HEARTBEAT_GAP_S:
            self.kick()
        else:
            self._beat(loop)

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._kicked is not None:
            self._kicked.cancel()
            self._kicked = None
        news = self._news()
        self._beaten_s = loop.time()
        self._send(
            self._membership.compose(
                now_ns(), news.groups, drained=news.drained, stopping=news.stopping, version=__version__
            )
        )

    def _send(self, message: Message) -> None:
        data = encode(self._key, message)
        for path in self._paths:
            path.send(data)

    # --- Receiving ----------------------------------------------------------------------------

    def _received(self, number: int, data: bytes) -> None:
        try:
            message = decode(self._key, data)
        except ProtocolError as error:
            self._paths[number].refuse(str(error))
            return
        if not isinstance(message, Heartbeat):
            self._paths[number].outdated += not self._consent.received(message)
            return
        if stranger := self._stranger(message):
            self._paths[number].note(stranger)
        is_news = self._membership.heard(message, number, now_ns())
        if self._membership.owes_beat:
            self.kick()
        if is_news:
            self._compare_files()
            self._on_beat(number)

    def _compare_files(self) -> None:
        of = self._membership
        if of.other_sections != self._other_sections:
            self._other_sections = of.other_sections
            if self._other_sections:
                names = ", ".join(self._other_sections)
                log.warning("The cluster file on %s is not the same as here: see its %s.", of.peer_name, names)
            else:
                log.info("The cluster file on %s is the same as here.", of.peer_name)

    def _stranger(self, beat: Heartbeat) -> str:
        """Who sends a beat that has the key, but is not of the peer; empty if it is."""
        of = self._membership
        if (beat.cluster, beat.node) == (of.cluster, of.peer_name):
            return ""
        expected = f"{of.peer_name} of cluster {of.cluster}"
        return f"heartbeats of {beat.node} of cluster {beat.cluster}, where {expected} is expected"

    # --- For others ---------------------------------------------------------------------------

    async def ask(self, group: str, old: Record, new: Record, timeout_s: float) -> Outcome:
        """Ask the peer for its consent to a new record; never raises for what peer or network do."""
        return await self._consent.ask(group, old, new, timeout_s)

    def paths(self) -> list[PathView]:
        """How the paths are now."""
        return [self._view(number, path) for number, path in enumerate(self._paths)]

    def _view(self, number: int, path: _Path) -> PathView:
        counters = self._membership.counters(number)
        return PathView(
            own=path.own,
            peer=path.peer,
            problem=path.problem,
            refused=path.refused,
            sent=path.sent,
            send_errors=path.send_errors,
            forged=path.forged,
            received=counters.received,
            late=counters.late,
            old=counters.old + path.outdated,
            unproven=counters.unproven,
            strange=counters.strange,
            silent_s=self._membership.silent_ns(number, now_ns()) / 1e9,
        )


def next_due_s(due_s: float, now_s: float, interval_s: float) -> float:
    """The first moment of the schedule that is in the future: what was missed is skipped, not made up for."""
    missed = max(0, int((now_s - due_s) / interval_s))
    return due_s + (missed + 1) * interval_s

"""What the production code of the data process has instead of the real world while a run lasts.

Everything in ``dataplane``, ``replication``, ``storage`` and ``protocol`` runs as it is. Replaced are: system calls
(``kernel``, ``sockets``), the state file on its disk, and some bounds, which are made as small as a run is.
"""

import contextlib
import logging
import select
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stortrends_ha import boottime, durable
from stortrends_ha.dataplane import (
    follower,
    gated,
    link_socket,
    nbd_connection,
    nbd_server,
    owner,
    owner_link,
    process,
    replica,
    report,
    roles,
    throttle,
    watch,
)  # fmt: skip
from stortrends_ha.protocol import nbd_transmission
from stortrends_ha.record import Record
from stortrends_ha.replication import differences, ordering, primary, resync, secondary, stream, verify
from stortrends_ha.replication.session import Plan
from stortrends_ha.storage import backing, map_file, state

from . import kernel
from .coverage import REGION_BLOCKS
from .disk import BLOCK_BYTES
from .history import Violation
from .sockets import Socket

BOUNDS = {
    "LINK_BACKLOG_BYTES": 4 * BLOCK_BYTES,
    "ORDER_REGION_BYTES": BLOCK_BYTES,
    "COMPARE_BLOCK_BYTES": 2 * BLOCK_BYTES,
    "COMPARE_BLOCKS_IN_FLIGHT": 2,
    "WRITE_PIECE_BYTES": BLOCK_BYTES,
    "ZERO_PIECE_BYTES": 2 * BLOCK_BYTES,
    "LINK_BUFFER_BYTES": 1 << 15,
    "_ROOM_BYTES": 1 << 14,
    "_SHIFT": BLOCK_BYTES.bit_length() - 1,
    "COMPARE_GRAIN_BYTES": BLOCK_BYTES,
    "INTENT_REGION_BYTES": REGION_BLOCKS * BLOCK_BYTES,
    "INTENT_REGIONS": 4,
    "INTENT_AHEAD": 2,
    "INTENT_KEPT_CHECKPOINTS": 1,
    "RESYNC_FLUSH_BYTES": 3 * BLOCK_BYTES,
    "CHECKPOINT_S": 0.5,
    "TICK_S": 0.05,
    "_REGION_SHIFT": (REGION_BLOCKS * BLOCK_BYTES).bit_length() - 1,
}
_BOUNDED = (
    differences, link_socket, nbd_transmission, ordering, owner, primary, replica, resync, secondary, stream, throttle,
    verify,
)  # fmt: skip


class _Nowhere(type(Path())):  # type: ignore[misc]
    """A folder that need not be made."""

    def mkdir(self, *_: Any, **__: Any) -> None:
        """It is there."""


STATE_DIR: Path = _Nowhere("/nowhere")


class Replica(replica.Replica):
    """The production one; what makes a copy count is checked first."""

    def why_not_lead(self, record: Record, forced: bool, clears_loss: bool) -> str:
        """See there; if nothing is said, it is about to lead."""
        if not (reason := super().why_not_lead(record, forced, clears_loss)):
            running = kernel.running()
            running.world.checks.leads(running.host, record, clears_loss=clears_loss)
            if not record.alone:
                running.host.cached_epoch = record.epoch
                running.host.forget()
        return reason

    def begin_to_follow(self, lineage: str, plan: Plan, fill: str) -> None:
        """See there."""
        running = kernel.running()
        running.host.cached_epoch = max(running.host.cached_epoch, running.epoch)
        if plan is Plan.SYNC:
            running.world.checks.overwrites(running.host)
        if fill:
            running.world.checks.fills(running.host)
        super().begin_to_follow(lineage, plan, fill)

    def synced(self) -> None:
        """See there."""
        kernel.running().host.forget()
        super().synced()


class Resync(resync.Resync):
    """The production one; what it is about is checked."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        running = kernel.running()
        running.world.checks.resyncs(running.host, self._todo)


class Roles(roles.Roles):
    """The production one; its process knows it."""

    def __init__(self, of: replica.Replica, changed: Callable[[], None]) -> None:
        super().__init__(of, changed)
        kernel.running().roles = self


class LinkSocket(link_socket.LinkSocket):
    """The production one; neither node refuses what its peer really sent."""

    def close(self, why: str) -> None:
        """See there."""
        if self.bad_input:
            raise Violation(f"{kernel.running().name} ends a session: {why}")
        super().close(why)


class Connection(nbd_connection.Connection):
    """The production one; a set of them is in the same order in each run."""

    __slots__ = ()

    def __hash__(self) -> int:
        return self.fileno()


class Negotiation(nbd_server.Negotiation):
    """Likewise."""

    def __hash__(self) -> int:
        return self.sock.fileno()


class Secondary(secondary.Secondary):
    """The production one; what it applies is checked first."""

    def _apply(self, view: memoryview, at: int, end: int) -> int:
        running = kernel.running()
        running.world.checks.applies(running, self._epoch)
        return super()._apply(view, at, end)


class StateFile(state.StateFile):
    """The production one, on the fake disk."""

    def _load(self) -> state.ReplicaState:
        return kernel.running().host.state

    def _save(self, state: state.ReplicaState) -> None:
        running = kernel.running()
        running.point()
        running.world.trace.say(f"{running.name} data", "state:", state)
        running.host.state = state
        running.world.coverage.changed()
        running.point()


class _BootId:
    @staticmethod
    def read_text() -> str:
        return str(kernel.running().host.boots)


def _listener(_host: str, port: int, _purpose: str, **_: bool) -> Socket:
    return Socket(kernel.running(), port)


def _bug(loop: Any, context: dict[str, Any]) -> None:
    loop.call_exception_handler(context)


_REPLACED: list[tuple[Any, str, Any]] = [
    (backing, "os", kernel.Os),
    (backing, "_fallocate", kernel.fallocate),
    (backing, "_identity", lambda file: file.disk.identity),
    (backing, "_open", lambda volume, *_, **__: kernel.File(volume)),
    (backing, "mount_identity", lambda file: f"mount {file.host.mounts}"),
    (follower, "LinkSocket", LinkSocket),
    (follower, "Secondary", Secondary),
    (follower, "tcp_listener", _listener),
    (follower, "tcp_obstacle", lambda *_: ""),
    (boottime, "time", kernel.Time),
    (durable, "os", kernel.MapOs),
    (gated, "time", kernel.Time),
    (map_file, "os", kernel.MapOs),
    (nbd_server, "Connection", Connection),
    (nbd_server, "Negotiation", Negotiation),
    (nbd_server, "select", SimpleNamespace(poll=kernel.Poll, POLLRDHUP=select.POLLRDHUP)),
    (nbd_server, "tcp_listener", _listener),
    (owner_link, "LinkSocket", LinkSocket),
    (owner_link, "socket", SimpleNamespace(socket=lambda *_: Socket(kernel.running()), SOCK_STREAM=socket.SOCK_STREAM)),
    (owner_link, "time", kernel.Time),
    (process, "Roles", Roles),
    (report, "_LOOK_S", 0.5),
    (replica, "DiskThreads", kernel.NoThreads),
    (replica, "StateFile", StateFile),
    (replica, "ThreadPoolExecutor", kernel.NoThreads),
    (replica, "time", SimpleNamespace(strftime=lambda _: "some day")),
    (replica, "uuid", SimpleNamespace(uuid4=kernel.new_lineage)),
    (owner_link, "uuid", SimpleNamespace(uuid4=kernel.new_filling)),
    (state, "BOOT_ID", _BootId),
    (stream, "Resync", Resync),
    (throttle, "time", kernel.Time),
    (watch, "die", _bug),
]
_REPLACED += [(module, name, value) for module in _BOUNDED for name, value in BOUNDS.items() if hasattr(module, name)]


@contextlib.contextmanager
def in_a_fake_world() -> Iterator[None]:
    """The production modules see it; and they log nothing, as the trace says what happens."""
    before = [(module, name, getattr(module, name)) for module, name, _ in _REPLACED]
    level = logging.root.manager.disable
    logging.disable()
    try:
        for module, name, value in _REPLACED:
            setattr(module, name, value)
        yield
    finally:
        logging.disable(level)
        for module, name, value in before:
            setattr(module, name, value)

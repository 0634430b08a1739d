"""What goes wrong in a run: which faults, and how often, is drawn for each seed."""

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import PREFACE, Kind
from stortrends_ha.protocol.nbd_transmission import PLAIN_WRITE, REQUEST

from .follower import Follower
from .link import Connection
from .node import Node
from .owner import Owner

if TYPE_CHECKING:
    from .world import World


class Faults:
    """The faults of one run. Each kind has a rate: how many there are in 1000 steps."""

    def __init__(self, world: "World") -> None:
        self._world = world
        random = world.random
        kinds = (
            self._break_link, self._break_link, self._silence, self._kill, self._stop_owner, self._stop_follower,
            self._power_loss, self._store_error, self._client_dies, self._forge, self._stale_owner,
        )  # fmt: skip
        self._kinds = [kind for kind in kinds if random.random() < 0.5]
        self._rate = random.choice((5, 15, 50)) / 1000

    def perhaps(self) -> None:
        """Called before each event."""
        if self._kinds and self._world.random.random() < self._rate:
            self._world.random.choice(self._kinds)()

    def _node(self) -> Node:
        return self._world.random.choice(self._world.nodes)

    def _connection(self) -> Connection | None:
        connections = [connection for connection in self._world.connections if not connection.over]
        return self._world.random.choice(connections) if connections else None

    # --- The link -------------------------------------------------------------------------------

    def _break_link(self) -> None:
        """What is on the way is cut anywhere, in each direction, and both ends hear of it somewhen."""
        connection = self._connection()
        if connection is None or connection.broken:
            return
        connection.broken = True
        for end in connection.ends:
            del end.network[self._world.random.randint(0, len(end.network)) :]
            end.backlog.clear()
        self._world.happened("link broken")

    def _silence(self) -> None:
        """One end gives up; the other does not know it yet, and has input to come."""
        connection = self._connection()
        if connection is not None:
            end = self._world.random.choice(connection.ends)
            self._world.run(end.process, end.close, "the peer was silent")
            self._world.happened("link given up by one end")

    def _forge(self) -> None:
        """A frame of another epoch, otherwise right, in the middle of a session."""
        owner, follower = self._world.owner.process, self._world.secondary.process
        if not isinstance(owner, Owner) or not isinstance(follower, Follower):
            return
        if owner.link is None or follower.link is not owner.link.peer or owner.link.connection.broken:
            return
        if self._world.random.random() < 0.5:
            end, frame = owner.link, self._forged_change(owner)
        else:
            end = follower.link
            frame = wire.frame(Kind.ACK, owner.record.epoch - 1, owner.primary.issued)
        end.connection.forged = True
        (end.backlog or end.network).extend(frame)
        self._world.happened("frame of another epoch")

    def _forged_change(self, owner: Owner) -> bytes:
        """A write at an older epoch whose number is the one that comes next."""
        value = b"forged" + self._world.new_value()[6:]
        self._world.history.forged.add(value)
        size = self._world.block_bytes
        request = REQUEST.pack(PLAIN_WRITE, bytes(8), 0, size) + value * (size // 8)
        return wire.changes_header(owner.record.epoch - 1, owner.primary.issued + 1, 0, len(request)) + request

    def _stale_owner(self) -> None:
        """An owner of an older epoch connects and sends all it has, without waiting."""
        owner, follower = self._world.owner.process, self._world.secondary.process
        if not isinstance(owner, Owner) or not isinstance(follower, Follower) or follower.record.epoch == 1:
            return
        ghost = SimpleNamespace(
            world=self._world, node=SimpleNamespace(name="stale owner"), alive=False, point=lambda: None
        )
        connection = Connection(ghost, follower, 1 << 20)  # type: ignore[arg-type]
        connection.forged = True
        self._world.connections.append(connection)
        record = replace(follower.record, epoch=follower.record.epoch - 1)
        hello = replace(owner.hello(), record=record)
        full = record.alone
        message = {"full": full, "first": 0 if full else owner.primary.issued + 1, "lineage": hello.lineage}
        connection.ends[0].network += PREFACE + wire.encode_object(Kind.HELLO, record.epoch, hello.encode())
        connection.ends[0].network += wire.encode_object(Kind.OPEN, record.epoch, message) + self._forged_change(owner)
        connection.ends[0].closed = True
        self._world.run(follower, follower.accept, connection)
        self._world.happened("stale owner connects")

    # --- Processes and hosts --------------------------------------------------------------------

    def _kill(self) -> None:
        """At once, or in the middle of something soon."""
        node = self._node()
        if node.process is None:
            return
        if self._world.random.random() < 0.4:
            self._world.happened(f"kill: {node.name}")
            self._world.ended(node.process)
        else:
            node.kill_in = self._world.random.randrange(40)

    def _stop_owner(self) -> None:
        owner = self._world.owner.process
        if isinstance(owner, Owner) and not owner.stopping:
            self._world.happened("orderly restart: node-a")
            self._world.run(owner, owner.begin_stop)

    def _stop_follower(self) -> None:
        follower = self._world.secondary.process
        if isinstance(follower, Follower):
            self._world.happened("orderly restart: node-b")
            self._world.run(follower, follower.stop)

    def _power_loss(self) -> None:
        """Of the secondary, or of both, at once or one after the other."""
        world = self._world
        if world.random.random() < 0.3:
            world.power_loss(world.owner)
        if world.random.random() < 0.8:
            world.power_loss(world.secondary)

    def _store_error(self) -> None:
        node = self._node()
        kind = self._world.random.choice(("apply", "read", "sync"))
        node.faults.setdefault(kind, self._world.random.randrange(4))

    # --- Clients --------------------------------------------------------------------------------

    def _client_dies(self) -> None:
        world = self._world
        user = world.random.choice(world.users)
        if user.connection is not None and world.owner.process is not None:
            half_sent = bool(user.outbound)
            world.run(world.owner.process, user.connection.close)
            world.happened("client dies in the middle of a request" if half_sent else "client dies")

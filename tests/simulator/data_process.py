"""The data process of a node: the production one, in a fake world.

It runs ``dataplane.process._serve`` with all that is below: roles, owner, follower, link, NBD server, mirror, backing,
state. Here is only what a process is from outside: its channel to the supervisor, its start and its end.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

from stortrends_ha.cluster.effects import Effect
from stortrends_ha.dataplane import commands, process, roles
from stortrends_ha.dataplane.follower import Follower
from stortrends_ha.dataplane.owner import Owner
from stortrends_ha.dataplane.owner_link import OwnerLink
from stortrends_ha.errors import StorTrendsError
from stortrends_ha.node.groups import _replica
from stortrends_ha.node.messages import Status

from .actor import Actor, Pipe
from .clock import MS
from .process_loop import Killed, ProcessLoop
from .production import Replica
from .sockets import Socket

if TYPE_CHECKING:
    from .host import Host
    from .supervisor import Supervisor


class DataProcess(Actor):
    """One life of it. ``pipe`` leads to its supervisor. It is its own channel, too (``dataplane.channel``)."""

    def __init__(self, host: "Host", pipe: Pipe, supervisor: "Supervisor") -> None:
        super().__init__(host.world.clock)
        self.name = host.name
        self.host = host
        self.world = host.world
        self._random = host.world.random
        self._pipe = pipe
        self._supervisor = supervisor
        self.loop = ProcessLoop(self)  # type: ignore[abstract]
        self.world.loops.append(self.loop)
        self.roles: roles.Roles | None = None  # set by ``production.Roles``
        self._commands: asyncio.Queue[commands.Command] = asyncio.Queue()
        self._stopped: Callable[[], None] = lambda: None
        self.after(self._random.randrange(5 * MS, 60 * MS), self._start)

    def _start(self) -> None:
        self.host.forget()
        self.loop.create_task(self._run())

    async def _run(self) -> None:
        """As ``process._run``."""
        cluster = self.world.cluster
        try:
            await process._serve(self, Replica(cluster, cluster.groups["g"], self.name))  # type: ignore[arg-type]
        except StorTrendsError as e:
            self.world.trace.say(f"{self.name} data", "ends with an error:", e)
        self._stopped()
        self.die()

    def stop(self, then: Callable[[], None]) -> None:
        """SIGTERM, as it were: end in order."""
        self._stopped = then
        self._commands.put_nowait(commands.Stop())

    def die(self) -> None:
        """SIGKILL, or the end."""
        if not self.alive:
            return
        self.alive = False
        for sock in list(self.loop.sockets.values()):
            sock.die(silently=not self.host.on)
        supervisor = self._supervisor
        if supervisor.alive:
            self._clock.after(self._random.randrange(MS, 20 * MS), supervisor.event, supervisor.process_ended, self)

    def point(self) -> None:
        """It calls the kernel: it may be killed here."""
        if self.alive:
            self.host.doom_process()
        if not self.alive:
            raise Killed

    # --- The channel ----------------------------------------------------------------------------------

    def command(self, effect: Effect) -> None:
        """A line from the supervisor has come."""
        kind = getattr(commands, type(effect).__name__)
        self._commands.put_nowait(kind(**{field.name: getattr(effect, field.name) for field in fields(effect)}))

    async def commands(self) -> AsyncIterator[commands.Command]:
        """As ``Channel.commands``."""
        while True:
            command = await self._commands.get()
            if not isinstance(command, commands.Lease):
                self.world.trace.say(f"{self.name} data", "is told:", command)
                self.world.chaos.provoked(self.host)
            yield command

    def send(self, kind: str, **message: Any) -> None:
        """As ``Channel.send``."""
        self.point()
        delay_ns = self._random.randrange(MS)
        if kind == "status":
            self._pipe.send(delay_ns, self._supervisor.process_status, self, _replica(cast(Status, message)))
        elif kind == "done":
            self._pipe.send(delay_ns, self._supervisor.process_done, self, message["id"], message["error"])

    # --- What the world looks at ----------------------------------------------------------------------

    @property
    def owner(self) -> Owner | None:
        """The role, if it is that."""
        return self.roles._owner if self.roles is not None else None

    @property
    def epoch(self) -> int:
        """Of the record by which it acts."""
        role = self.roles._role if self.roles is not None else None
        return role.record.epoch if role is not None else 0

    @property
    def sender_epoch(self) -> int:
        """Of the record by which the owner acts whose stream is received."""
        role = self.roles._role if self.roles is not None else None
        opened = role._opened if isinstance(role, Follower) else None
        return opened.theirs.record.epoch if opened is not None else 0

    def listener(self, port: int) -> Socket | None:
        """Who listens there."""
        return next((sock for sock in self.loop.sockets.values() if sock.port == port), None)

    @property
    def may_answer(self) -> bool:
        """Whether a reply could leave now (rule 5)."""
        owner = self.owner
        return self.alive and owner is not None and owner.gate.open_at(self.host.clock.now_ns())

    def look(self) -> None:
        """It has done something."""
        owner = self.owner
        if self.alive and owner is not None:
            self.world.checks.bounds(self.host, owner)
            if owner.gate.open_at(self.host.clock.now_ns()):
                self.world.checks.may_answer(self.host)

    def state(self) -> str:
        """For people."""
        role = self.roles._role if self.roles is not None else None
        link = role._link if role is not None else None
        words = f"its link is {link.state}: {link.why}" if isinstance(link, OwnerLink) else f"its link is {link}"
        return f"{type(role).__name__} at epoch {self.epoch}, {words}; it said {self._supervisor.replica}"

"""Everything that goes wrong, and the operator. What can go wrong in a run, and how often, is chosen anew for each.

Besides what happens at any time there is *spite*: when something changes (a record is granted, or saved, a node changes
its phase, a data process its role), something may go wrong with that node or its peer right then.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from .arbiter import NAME as ARBITER
from .clock import MS, S
from .network import Quality

if TYPE_CHECKING:
    from .host import Host
    from .world import World


_WAITS, _WAIT_NS = 30, 200 * MS


class Chaos:
    """``steps`` things happen; then everything is mended."""

    def __init__(self, world: "World", steps: int) -> None:
        self._world = world
        self._random = world.random
        self._left = steps
        self.over = False
        kinds = self._kinds()
        share = self._random.choice((0.1, 0.2, 0.5))  # a few kinds alone bring about what is rare among many
        chosen = [kind for kind in kinds if self._random.random() < share]
        self._kinds_now = chosen or kinds
        self._pause_ns = self._random.choice((300 * MS, S, 3 * S))
        self._longest_ns = self._random.choice((S, 3 * S, 8 * S))
        self._spite = self._random.choice((0.0, 0.0, 0.1, 0.4))
        self._provocations = 4 * steps
        self._patient = self._random.random() < 0.5  # the next thing happens only when all is well, for some time
        self._waits = 0
        spiteful = [
            self._kill, self._power, self._pause, self._pause, self._doom, self._cut_beats, self._cut_link,
            self._isolate, self._cut_nodes, self._arbiter_slow, self._kill_process, self._strand,
            self._power_at_a_call,
        ]  # fmt: skip
        self._spiteful = [kind for kind in spiteful if kind in self._kinds_now]
        self._victim: Host | None = None
        self._undo: dict[int, Callable[[], None]] = {}
        self._number = 0
        self._forgot = False

    def _kinds(self) -> list[Callable[[], None]]:
        return [
            self._kill, self._kill_process, self._power, self._power_both, self._pause, self._doom, self._doom,
            self._cut_beats, self._cut_path, self._cut_link, self._cut_arbiter, self._isolate, self._cut_nodes,
            self._strand, self._strand,
            self._arbiter_down, self._arbiter_slow, self._arbiter_forgets, self._bad_beats, self._disk,
            self._metadata, self._spoil_maps, self._remount, self._power_at_a_call, self._power_at_a_call,
            self._move, self._move, self._drain, self._stop, self._force,
        ]  # fmt: skip

    def begin(self) -> None:
        """From when the cluster has had some time."""
        self._world.clock.after(self._random.choice((0, 4 * S)), self._next)

    def _next(self) -> None:
        if self._patient and self._waits < _WAITS and not self._world.is_well():
            self._waits += 1
            self._world.clock.after(_WAIT_NS, self._next)
            return
        self._waits = 0
        self._left -= 1
        if self._left < 0:
            self._end()
            return
        self._random.choice(self._kinds_now)()
        self._world.clock.after(self._random.randrange(self._pause_ns), self._next)

    def _end(self) -> None:
        for undo in list(self._undo.values()):
            undo()
        self._undo.clear()
        world = self._world
        world.network.make_good()
        world.arbiter.loss = world.arbiter.late = 0.0
        for host in world.hosts:
            host.doom_in(0, "")
            if host.maps_spoiled:  # the operator starts it again: it would not look at them any more
                host.kill_process()
            if host.drained:
                self._undrain(host)
            world.clock.after(self._random.randrange(2 * S), host.boot)
            world.clock.after(self._random.randrange(2 * S, 8 * S), host.start)
        world.clock.after(8 * S, self._all_ended)

    def _all_ended(self) -> None:
        for host in self._world.hosts:
            host.boot()
            host.start()
            if host.drained:
                self._undrain(host)
        self.over = True

    def _for_a_while(self, what: str, undo: Callable[[], None]) -> None:
        """It has been done; it is undone after a time, or at the end."""
        world = self._world
        world.count[what] += 1
        self._number += 1
        number = self._number
        self._undo[number] = undo
        for_ns = self._some_time()
        world.trace.say("world", f"{what} for {for_ns / 1e9:.3f} s")

        def end() -> None:
            if self._undo.pop(number, None):
                world.trace.say("world", f"{what}: over")
                undo()

        world.clock.after(for_ns, end)

    def provoked(self, host: "Host") -> None:
        """Something has changed there."""
        if not self._spite or not self._spiteful or self._left < 0 or self._random.random() >= self._spite:
            return
        if self._provocations > 0:
            self._provocations -= 1
            kind = self._random.choice(self._spiteful)
            victim = self._random.choice((host, host, host.peer))
            self._world.clock.after(self._random.choice((0, 0, 2 * MS, 20 * MS, 300 * MS)), self._spited, kind, victim)

    def _spited(self, kind: Callable[[], None], victim: "Host") -> None:
        if self._left >= 0:
            self._victim = victim
            kind()
            self._victim = None

    def _host(self) -> "Host":
        if self._victim is not None:
            return self._victim
        return self._world.owner() if self._random.random() < 0.4 else self._random.choice(self._world.hosts)

    def _some_time(self) -> int:
        shortest_ns = 20 * MS
        if self._random.random() < 0.5:
            return self._random.randrange(shortest_ns, self._longest_ns)
        return int(shortest_ns * (self._longest_ns / shortest_ns) ** self._random.random())

    # --- Machines and processes -----------------------------------------------------------------------

    def _kill(self) -> None:
        host = self._host()
        host.kill()
        self._world.count["kill"] += 1
        self._world.clock.after(self._some_time(), host.start)

    def _kill_process(self) -> None:
        self._host().kill_process()
        self._world.count["kill process"] += 1

    def _power(self) -> None:
        host = self._host()
        host.power_off()
        self._world.count["power"] += 1
        self._world.clock.after(S + self._some_time(), host.boot)

    def _power_both(self) -> None:
        self._world.count["power of both"] += 1
        for host in self._random.sample(self._world.hosts, 2):
            self._world.clock.after(self._random.choice((0, 10 * MS, 700 * MS)), host.power_off)
            self._world.clock.after(S + self._some_time(), host.boot)

    def _pause(self) -> None:
        host, for_ns = self._host(), self._some_time()
        which = self._random.choice(("supervisor", "process", "both"))
        self._world.count[f"pause {which}"] += 1
        if which != "process":
            host.pause(host.supervisor, for_ns)
        if which != "supervisor":
            host.pause(host.process, for_ns)

    def _doom(self) -> None:
        host = self._host()
        how = self._random.choice(("kill", "kill", "power", "kill process", "kill process", "kill process", "pause"))
        if self._random.random() < 0.5:
            host.doom_in(self._random.randrange(1, 14), how)
        else:
            host.doom_in(0, how, calls=self._random.randrange(1, 60))

    def _disk(self) -> None:
        host = self._host()
        host.disk_fails = True

        def mend() -> None:
            host.disk_fails = False
            host.kill_process()  # the operator has replaced it

        self._for_a_while(f"disk of {host.name} fails", mend)

    def _metadata(self) -> None:
        """The disk of the map files."""
        host = self._host()
        host.metadata_fails = True

        def mend() -> None:
            host.metadata_fails = False
            host.kill_process()

        self._for_a_while(f"disk of the maps of {host.name} fails", mend)

    def _spoil_maps(self) -> None:
        """A map file is deleted, or rots; sometimes that is noticed soon."""
        host = self._host()
        self._world.count["map spoiled"] += 1
        host.spoil_maps()
        if self._random.random() < 0.7:
            host.kill_process()

    def _remount(self) -> None:
        self._world.count["mounted anew"] += 1
        self._host().remount()

    def _power_at_a_call(self) -> None:
        """In the middle of what the data process does."""
        how = self._random.choice(("power", "power", "power of both"))
        self._host().doom_in(0, how, calls=self._random.randrange(1, 40))

    # --- Networks -------------------------------------------------------------------------------------

    def _cut(self, what: str, ways: list[tuple[str, str, str]]) -> None:
        network = self._world.network
        for way in ways:
            network.cut(*way)

        def heal() -> None:
            for way in ways:
                network.heal(*way)

        self._for_a_while(what, heal)

    def _ways(self, one: str, other: str, channels: tuple[str, ...]) -> tuple[str, list[tuple[str, str, str]]]:
        to, back = [(one, other, channel) for channel in channels], [(other, one, channel) for channel in channels]
        how = self._random.choice(("both", "both", "to", "back"))
        if how == "to":
            return f"{one} > {other}", to
        return (f"{other} > {one}", back) if how == "back" else (f"{one} - {other}", to + back)

    def _between(self, channels: tuple[str, ...]) -> None:
        one, other = (host.name for host in self._world.hosts)
        text, ways = self._ways(one, other, channels)
        self._cut(f"CUT {' '.join(channels)} {text}", ways)

    def _cut_beats(self) -> None:
        self._between(("beat0", "beat1"))

    def _cut_path(self) -> None:
        self._between((self._random.choice(("beat0", "beat1")),))

    def _cut_link(self) -> None:
        self._between(("link",))

    def _cut_nodes(self) -> None:
        self._between(("beat0", "beat1", "link"))

    def _cut_arbiter(self) -> None:
        text, ways = self._ways(self._host().name, ARBITER, ("arbiter",))
        self._cut(f"CUT {text}", ways)

    def _isolate(self) -> None:
        host = self._host()
        between = [
            (one, other, channel)
            for one, other in ((host.name, host.peer.name), (host.peer.name, host.name))
            for channel in ("beat0", "beat1", "link")
        ]
        own = [(host.name, ARBITER, "arbiter"), (ARBITER, host.name, "arbiter")]
        self._cut(f"CUT {host.name} off", between + own)

    def _strand(self) -> None:
        """The owner does not know that it is time to stop: its clients still reach it, and nothing else does."""
        host = self._world.owner()
        for_ns = self._random.randrange(S, 5 * S)
        if self._random.random() < 0.5:
            self._world.count["strand"] += 1
            host.pause(host.supervisor, for_ns)
            return
        ways = [(host.name, ARBITER, "arbiter"), (ARBITER, host.name, "arbiter")]
        for channel in self._random.choice((("beat0", "beat1"), ("beat0", "beat1", "link"))):
            ways += [(host.name, host.peer.name, channel), (host.peer.name, host.name, channel)]
        self._cut(f"CUT {host.name} off but for its clients", ways)

    def _bad_beats(self) -> None:
        """All ways of the heartbeats, or one path, or one direction of it."""
        network, random = self._world.network, self._random
        quality = random.choice((Quality(loss=0.3), Quality(twice=0.3, late=0.3), Quality(0.2, 0.2, 0.2)))
        host = self._host()
        there, back = [[(one.name, one.peer.name, path) for path in ("beat0", "beat1")] for one in (host, host.peer)]
        path = random.randrange(2)
        ways = random.choice((there + back, [there[path], back[path]], [there[path]]))
        network.make_bad(ways, quality)
        self._for_a_while(f"{quality} of {len(ways)} ways of heartbeats from {host.name}", network.make_good)

    # --- The arbiter ----------------------------------------------------------------------------------

    def _arbiter_down(self) -> None:
        self._world.arbiter.fail()
        self._for_a_while("arbiter down", self._world.arbiter.recover)

    def _arbiter_slow(self) -> None:
        arbiter = self._world.arbiter
        arbiter.loss, arbiter.late = self._random.choice(((0.4, 0.0), (0.0, 0.5), (0.3, 0.3)))

        def mend() -> None:
            arbiter.loss = arbiter.late = 0.0

        self._for_a_while("arbiter slow", mend)

    def _arbiter_forgets(self) -> None:
        if not self._forgot and self._random.random() < 0.1:
            self._forgot = True
            self._world.count["arbiter forgets"] += 1
            self._world.trace.say(ARBITER, "FORGETS")
            self._world.arbiter.forget()
            self._world.checks.arbiter_forgot()

    # --- The operator ---------------------------------------------------------------------------------

    def _move(self) -> None:
        supervisor = self._host().supervisor
        if supervisor is not None:
            to = self._host().name
            self._world.count["asked to move"] += 1
            self._world.trace.say("world", f"the operator moves the group to {to}, on {supervisor.name}")
            supervisor.event(supervisor.move, to)

    def _drain(self) -> None:
        host = self._host()
        if host.supervisor is not None and not host.drained:
            host.supervisor.event(host.supervisor.drain, True)
            self._for_a_while(f"drain {host.name}", lambda: self._undrain(host))

    def _undrain(self, host: "Host") -> None:
        host.drained = False
        if host.supervisor is not None:
            host.supervisor.event(host.supervisor.drain, False)

    def _stop(self) -> None:
        host = self._host()
        if host.supervisor is not None:
            self._world.count["orderly stop"] += 1
            self._world.trace.say("world", f"the operator stops {host.name}")
            host.supervisor.event(host.supervisor.stop)

    def _force(self) -> None:
        """The operator has seen to it that the peer serves nobody, and cannot."""
        host, world = self._host(), self._world
        other = host.peer
        if host.supervisor is None or other.supervisor is not None or self._random.random() < 0.7:
            return
        if world.kind != "witness":  # nothing could keep the other from going on by its own record
            return
        world.count["override"] += 1
        world.trace.say("world", f"the operator overrides on {host.name}")
        host.supervisor.event(host.supervisor.force)

"""What is checked besides what clients see."""

from typing import TYPE_CHECKING

from stortrends_ha.cluster import effects as do
from stortrends_ha.record import Record

from .history import Violation

if TYPE_CHECKING:
    from .host import Host
    from .world import World


class Checks:
    """Called where something happens that a rule is about."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._overridden: set[int] = set()
        self._records: dict[int, Record] = {}

    def arbiter_forgot(self) -> None:
        """What it has granted, and nobody has saved yet, may be granted to somebody else."""
        saved = [host.saved.record for host in self._world.hosts if host.saved is not None]
        newest = max((record.epoch for record in saved), default=0)
        self._records = {epoch: record for epoch, record in self._records.items() if epoch <= newest}

    def record(self, record: Record) -> None:
        """A record counts, somewhere: an epoch has only one (but the operator may have chosen between two)."""
        known = self._records.setdefault(record.epoch, record)
        if known != record and not self._world.arbiter.forced:
            raise Violation(f"two records of one epoch: {known} and {record}")

    def may_answer(self, host: "Host") -> None:
        """Rule 5: a client could be answered; nobody else could answer one."""
        other = host.peer.process
        if other is not None and other.may_answer and not self._world.split_by_force:
            raise Violation(f"{host.name} may answer clients, and so may {host.peer.name} (rule 5)")

    def leads(self, host: "Host", command: do.Lead) -> None:
        """Rules 3 and 11: what the copy lacks that counts from now on must be allowed to be lost."""
        world, record, state = self._world, command.record, host.state
        if host.name != record.owner:
            raise Violation(f"{host.name} is to lead by a record that does not say so: {record}")
        if record.epoch in world.arbiter.forced and record.epoch not in self._overridden:
            self._overridden.add(record.epoch)
            world.history.go_back(host.disk.contents(), host.bit, forced=True)
            world.trace.say(host.name, "its copy counts, by the operator's override:", host.disk.contents())
            return
        if not state.lost_cache:
            return
        if record.alone and state.settled_epoch > host.cached_epoch:  # it had settled
            return
        if not command.clears_loss:
            raise Violation(f"{host.name} leads without its cache (rule 3)")
        if not host.peer.state.lost_cache:
            raise Violation(f"{host.name} leads without its cache, which {host.peer.name} has not lost (rule 3)")
        world.count["both caches lost"] += 1
        world.history.go_back(host.disk.contents(), host.bit, forced=False)
        world.trace.say(host.name, "its copy counts, as both have lost their caches:", host.disk.contents())

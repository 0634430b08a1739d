"""What is checked besides what clients see."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stortrends_ha.cluster.group import Group
from stortrends_ha.cluster.phases import Phase
from stortrends_ha.dataplane.owner import Owner
from stortrends_ha.record import Record
from stortrends_ha.replication.block_map import BlockMap

from .disk import Disk
from .history import Operation, Violation

if TYPE_CHECKING:
    from .data_process import DataProcess
    from .host import Host
    from .world import World


class Checks:
    """Called where something happens that a rule is about."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._overridden: set[int] = set()
        self._records: dict[int, Record] = {}
        self._forgiven: dict[Disk, int] = {}  # how many losses of its cache

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

    def acts(self, host: "Host", record: Record) -> None:
        """A node takes a role only by a record that it has saved."""
        saved = host.saved.record.epoch if host.saved is not None else self._world.first_record.epoch
        if record.epoch > saved:
            raise Violation(f"{host.name} acts by {record}, which it has not saved")

    def may_answer(self, host: "Host") -> None:
        """Rule 5: a client could be answered; nobody else could answer one."""
        other = host.peer.process
        if other is not None and other.may_answer and not self._world.split_by_force:
            raise Violation(f"{host.name} may answer clients, and so may {host.peer.name} (rule 5)")

    def bounds(self, host: "Host", owner: Owner) -> None:
        """Rule 15: with a full window, nobody is listened to."""
        primary, most = owner._primary, self._world.cluster.limits.window_changes
        if primary.unanswered >= most and not primary._flow.stopped:
            raise Violation(
                f"{host.name} has {primary.unanswered} requests under way, of {most}, and takes more (rule 15)"
            )

    def settled(self, host: "Host") -> bool:
        """Whether it owns alone, and all that was cached before is stable (rule 1)."""
        owner = self._owner(host)
        return owner is not None and owner.record.alone and host.state.settled_epoch == owner.record.epoch

    @staticmethod
    def _owner(host: "Host") -> Owner | None:
        return host.process.owner if host.process is not None else None

    def answers(self, host: "Host", operation: Operation, values: list[int]) -> None:
        """Rule 5, unless it is alone for sure; rule 1: what an owner that has settled answers, a loss of power cannot
        take any more. ``values``: of a read."""
        owner = self._owner(host)
        shares = owner is not None and (not owner.record.alone or owner._primary.locked)
        if owner is not None and shares and host.clock.now_ns() >= owner._lease_ns:
            raise Violation(f"{host.name} answers {operation} without a lease (rule 5)")
        if not self.settled(host) or operation.kind == "flush" or self._world.cache_of(operation.block) == "always":
            return
        told = values or [operation.value] * operation.length  # zeroes may be those of another request
        if any(
            value > 0 and host.only_cached(block, value) for block, value in zip(operation.blocks, told, strict=True)
        ):
            raise Violation(f"{host.name}, alone, answers {operation} before it is stable (rule 1)")

    def refuses(self, host: "Host", operation: Operation) -> None:
        """Rule 13: a client sees an error only when no good copy is left. A read knows of a failed sync at once."""
        owner = self._owner(host)
        failed = owner and (owner._primary.failed or any(store._sync_failed for store in owner._replica.stores))
        if owner is None or not (failed and owner._primary.is_last_copy):
            raise Violation(f"{host.name} answers {operation} with an error, and may not be the only one (rule 13)")
        self._world.count["errors, as no good copy was left"] += 1

    def lost_what_was_cached(self, host: "Host") -> None:
        """A volume that is always cached has lost what was not flushed, as its owner was alone."""
        world = self._world
        for volume, disk in enumerate(host.disks):
            if world.caches[volume] == "always" and self._forgiven.get(disk) != disk.losses:
                self._forgiven[disk] = disk.losses
                world.history.go_back(disk.values(), host.bit, forced=False, first=volume * world.blocks)

    def promises(self, host: "Host", group: Group) -> None:
        """Rule 5: a node gives nobody a lease while it owns, by its own record, or reaches for that."""
        if group.record.owner == host.name or group.phase in (Phase.STOPPING, Phase.STANDING):
            raise Violation(f"{host.name}, {group.phase} at {group.record}, promises not to serve (rule 5)")

    def overwrites(self, host: "Host") -> None:
        """Rule 9: a full sync overwrites only a node that the record does not have in sync."""
        record = self._world.record()
        if record is not None and host.name in record.in_sync and not self._world.arbiter.forced:
            raise Violation(f"{host.name} is about to be overwritten, which is in sync by {record} (rule 9)")

    def fills(self, host: "Host") -> None:
        """Rule 9: everything is copied only if nothing is there, or nobody knows what."""
        begun = host.state.filling and host.state.needs_sync
        if host.state.lineage and not begun and not any(host.maps_spoiled for host in self._world.hosts):
            raise Violation(f"all is copied to {host.name}, which has most of it (rule 9)")

    def resyncs(self, host: "Host", todo: Sequence[BlockMap]) -> None:
        """Rule 9: a resync is about what is in the files of both nodes, in whole regions of the secondary's; what one
        of them has written alone; and what was in a resync that did not lead to adding the secondary."""
        world = self._world
        for volume, blocks in enumerate(todo):
            own, its = (world.coverage.told(of, volume) | of.remembered[volume] for of in (host, host.peer))
            allowed = own | world.coverage.whole_regions(its)
            world.count["resynced blocks"] += blocks.count
            if more := [block for block in blocks if not allowed >> block & 1]:
                raise Violation(f"{host.name} resyncs blocks {more} of {world.volumes[volume]} in vain (rule 9)")
            host.remembered[volume] |= sum(1 << block for block in blocks)

    def knows_of_no_difference(self) -> None:
        """Rule 8: after some quiet checkpoints nothing is left of what might have differed."""
        world = self._world
        for host in world.hosts:
            for number, volume in enumerate(world.volumes):
                if left := world.coverage.left(host, number):
                    raise Violation(f"the maps of {volume} on {host.name} never get empty: {left:b} (rule 8)")

    def applies(self, process: "DataProcess", epoch: int) -> None:
        """Rules 4 and 6: a node applies only the stream of the owner that it follows, and none once it reaches for
        ownership."""
        supervisor = process.host.supervisor
        if supervisor is not None and supervisor.group.phase is Phase.STANDING:
            raise Violation(f"{process.name} applies a stream while it takes over (rule 4)")
        if process.owner is not None or process.epoch != epoch or process.sender_epoch != epoch:
            epochs = f"epoch {process.sender_epoch} at epoch {process.epoch}"
            raise Violation(f"{process.name} applies a stream of {epochs} (rule 6)")

    def leads(self, host: "Host", record: Record, *, clears_loss: bool) -> None:
        """Rules 3 and 11: what the copy lacks that counts from now on must be allowed to be lost."""
        world = self._world
        if host.name != record.owner:
            raise Violation(f"{host.name} is to lead by a record that does not say so: {record}")
        if record.epoch in world.arbiter.forced and record.epoch not in self._overridden:
            self._overridden.add(record.epoch)
            world.history.go_back(host.values(), host.bit, forced=True)
            world.trace.say(host.name, "its copy counts, by the operator's override:", host.values())
            return
        if not host.lost_cache:
            return
        if record.alone and host.state.settled_epoch > host.cached_epoch:  # it had settled
            self.lost_what_was_cached(host)
            return
        if not clears_loss:
            raise Violation(f"{host.name} leads without its cache (rule 3)")
        if not host.peer.lost_cache:
            raise Violation(f"{host.name} leads without its cache, which {host.peer.name} has not lost (rule 3)")
        world.count["both caches lost"] += 1
        world.history.go_back(host.values(), host.bit, forced=False)
        world.trace.say(host.name, "its copy counts, as both have lost their caches:", host.values())

"""What must be true at every moment, whatever happens (the safety rules that the mirror alone can break).

Every write fills its blocks with a value of its own, so the content of a block says which change made it.
Changes are numbered in the order in which the owner applies them; per block, a *version* is such a number.
Zeroes are no value of their own: they count as the newest zeroing, which can hide an error but not make one up.

- Rule 1: a change is answered after both replicas have applied it or something newer; FLUSH and FUA after both
  have made stable what was answered before (the secondary is excused while it is not in sync). By an owner that is
  alone, a change is answered after it is stable there.
- A read returns no version older than one that was answered or read before it began, and none that the secondary
  lacks (it is excused while it is not in sync).
- Rule 6: the secondary applies nothing but what its current session brings, and nothing that nobody wrote.
- Rule 15: the window, the waiting reads and the backlog of the link are bounded.
- Every reply is to a request, the first one to it, and no error.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from .disk import Disk

if TYPE_CHECKING:
    from .owner import Owner
    from .world import World

ZERO = bytes(8)


class Violation(AssertionError):
    """A rule was broken."""


@dataclass(slots=True, eq=False)
class Request:
    """A request of a client that has not been answered."""

    kind: str
    volume: int
    offset: int
    length: int
    cookie: bytes
    durable: bool
    since: int  # the newest version of all when it was made
    value: bytes = ZERO
    floor: list[int] = field(default_factory=list)  # read: the oldest versions it may return
    must_be_stable: dict[int, int] = field(default_factory=dict)  # flush: block -> version

    def __str__(self) -> str:
        place = f"{self.volume}:{self.offset}+{self.length}"
        return f"{self.kind} {self.cookie.hex()[-4:]} {place} {self.value.hex().lstrip('0')}"


class VolumeHistory:
    """What is known of the versions of one volume's blocks."""

    def __init__(self, blocks: int) -> None:
        self.versions: list[dict[bytes, int]] = [{ZERO: 0} for _ in range(blocks)]  # value -> version
        self.zeroed: list[list[int]] = [[0] for _ in range(blocks)]  # the versions that were zeroings
        self.answered = [0] * blocks  # the newest version whose change was answered
        self.seen = [0] * blocks  # the newest version that was answered or read
        self.flushed = [0] * blocks  # the newest version that a client was told is stable
        self.peer_applied = [0] * blocks  # the newest version that the secondary ever applied


class History:
    """All volumes, and the checks against them."""

    def __init__(self, world: "World", blocks: int, block_bytes: int, volumes: int) -> None:
        self._world = world
        self._block_bytes = block_bytes
        self.volumes = [VolumeHistory(blocks) for _ in range(volumes)]
        self.newest = 0
        self.forged: set[bytes] = set()  # values that must not appear anywhere

    def _blocks(self, offset: int, length: int) -> range:
        return range(offset // self._block_bytes, (offset + length) // self._block_bytes)

    def _values(self, offset: int, data: bytes) -> list[tuple[int, bytes]]:
        size = self._block_bytes
        values = []
        for at in range(0, len(data), size):
            value = data[at : at + 8]
            if data[at : at + size] != value * (size // 8):
                raise Violation(f"the block at {offset + at} is torn")
            values.append(((offset + at) // size, value))
        return values

    # --- Changes --------------------------------------------------------------------------------

    def owner_applied(self, volume: int, offset: int, data: bytes) -> None:
        """The owner has applied a change."""
        self.newest += 1
        history = self.volumes[volume]
        for block, value in self._values(offset, data):
            history.versions[block][value] = self.newest
            if value == ZERO:
                history.zeroed[block].append(self.newest)

    def secondary_applied(self, volume: int, offset: int, data: bytes) -> None:
        """The secondary has applied a change."""
        history = self.volumes[volume]
        for block, value in self._values(offset, data):
            if value in self.forged:
                raise Violation("the secondary has applied a change that is not of its session (rule 6)")
            version = history.versions[block].get(value, 0)
            if version > history.peer_applied[block]:
                history.peer_applied[block] = version

    def changed(self, request: Request) -> None:
        """A change is being answered."""
        history = self.volumes[request.volume]
        for block in self._blocks(request.offset, request.length):
            version = self._version_of(request, history, block)
            if version is None:
                raise Violation(f"{request} was answered before the owner applied it (rule 1)")
            if self._peer_counts and history.peer_applied[block] < version:
                raise Violation(f"{request} was answered before the secondary applied block {block} (rule 1)")
            if self._owner.record.alone:
                stable = self._owner.node.disks[request.volume].stable_block(block)
                if self._version(request.volume, block, stable) < version:
                    raise Violation(f"{request} was answered before block {block} was stable on the owner (rule 1)")
            history.answered[block] = max(history.answered[block], version)
            history.seen[block] = max(history.seen[block], version)
            if request.durable:
                self._must_be_stable(request, block, version)

    @property
    def _owner(self) -> "Owner":
        owner = self._world.owner.process
        assert owner is not None
        return cast("Owner", owner)

    @property
    def _owner_fell(self) -> bool:
        owner = self._world.owner.process
        return owner is None or bool(owner.failure)

    @property
    def _peer_counts(self) -> bool:
        """Whether an answer must wait for the secondary: by the record, or as far as the owner can know."""
        by_record = self._world.secondary.name in self._world.record.in_sync
        return by_record or not self._owner.record.alone or self._owner.primary.locked

    @staticmethod
    def _version_of(request: Request, history: VolumeHistory, block: int) -> int | None:
        """The version that a change has become. Of a zeroing: the first one that it can have become."""
        if request.value != ZERO:
            return history.versions[block].get(request.value)
        zeroed = history.zeroed[block]
        at = bisect_right(zeroed, request.since)
        return zeroed[at] if at < len(zeroed) else None

    # --- Flushes --------------------------------------------------------------------------------

    def begin_flush(self, request: Request) -> None:
        """A client asks for a flush: of what was answered by now."""
        answered = self.volumes[request.volume].answered
        unstable = {block for node in self._world.nodes for block in node.disks[request.volume].unstable}
        request.must_be_stable = {block: answered[block] for block in unstable}

    def flushed(self, request: Request) -> None:
        """A flush is being answered."""
        for block, version in request.must_be_stable.items():
            self._must_be_stable(request, block, version)

    def _must_be_stable(self, request: Request, block: int, version: int) -> None:
        history = self.volumes[request.volume]
        for node in self._world.nodes:
            if node is self._world.secondary and not node.in_sync:
                continue
            if self._version(request.volume, block, node.disks[request.volume].stable_block(block)) < version:
                raise Violation(f"{request} was answered before block {block} was stable on {node.name} (rule 1)")
        history.flushed[block] = max(history.flushed[block], version)

    def _version(self, volume: int, block: int, content: bytes) -> int:
        return self.volumes[volume].versions[block].get(content[:8], -1)

    def synced(self) -> None:
        """Rule 9: the secondary counts as in sync from now on: it has what was answered, what was flushed is stable."""
        for volume, history in enumerate(self.volumes):
            disk = self._world.secondary.disks[volume]
            for block, seen in enumerate(history.seen):
                # A value without a version is newer than all: the owner failed between sending and applying it.
                # So may zeroes be, which have no value of their own.
                if self._owner_fell and disk.block(block)[:8] == ZERO:
                    continue
                if history.versions[block].get(disk.block(block)[:8], seen) < seen:
                    raise Violation(
                        f"the secondary counts as in sync and lacks version {seen} of block {block} (rule 9)"
                    )
                flushed = history.flushed[block]
                if history.versions[block].get(disk.stable_block(block)[:8], flushed) < flushed:
                    raise Violation(
                        f"the secondary counts as in sync and block {block}, which was flushed, is not stable (rule 9)"
                    )

    # --- Reads ----------------------------------------------------------------------------------

    def begin_read(self, request: Request) -> None:
        """A client asks for a read."""
        seen = self.volumes[request.volume].seen
        request.floor = [seen[block] for block in self._blocks(request.offset, request.length)]

    def was_read(self, request: Request, data: bytes) -> None:
        """A read is being answered."""
        if len(data) != request.length:
            raise Violation(f"{request} was answered with {len(data)} bytes")
        history, disk = self.volumes[request.volume], self._world.secondary.disks[request.volume]
        excused = not self._world.secondary.in_sync
        for (block, value), floor in zip(self._values(request.offset, data), request.floor, strict=True):
            version = self._version_read(history, block, value, floor)
            if version is None:
                raise Violation(f"{request} returned a value that block {block} never had: {value.hex()}")
            if version < floor:
                raise Violation(
                    f"{request} went back in time: block {block} is at version {version}, but {floor} was seen before"
                )
            if not excused and self._version(request.volume, block, disk.block(block)) < version:
                raise Violation(f"{request} returned version {version} of block {block}, which the secondary lacks")
            self._must_last(request, block, version)
            history.seen[block] = max(history.seen[block], version)

    def _must_last(self, request: Request, block: int, version: int) -> None:
        """Of an owner that is alone, and has settled: a loss of power must not take back what was read."""
        owner = self._world.owner
        if self._owner.record.alone and owner.state.settled_epoch == self._owner.record.epoch:
            stable = owner.disks[request.volume].stable_block(block)
            if self._version(request.volume, block, stable) < version:
                raise Violation(f"{request} returned version {version} of block {block}, which is not stable (rule 1)")

    @staticmethod
    def _version_read(history: VolumeHistory, block: int, value: bytes, floor: int) -> int | None:
        """The version that a read returned. Of zeroes: the first that it can be, as later ones look the same."""
        newest = history.versions[block].get(value)
        if value != ZERO or newest is None:
            return newest
        zeroed = history.zeroed[block]
        at = bisect_left(zeroed, floor)
        return zeroed[at] if at < len(zeroed) else newest

    # --- The owner lost its cache, and its copy wins: the other lost its own, too, or is not in sync ------------

    def go_back(self, disks: list[Disk], settled: bool) -> None:
        """What was only cached is gone; what a client was told is stable must be there. ``settled``: all of it must."""
        for volume, disk in enumerate(disks):
            history = self.volumes[volume]
            for block, versions in enumerate(history.versions):
                version = self._version(volume, block, disk.block(block))
                needed = history.answered[block] if settled else history.flushed[block]
                if version < needed:
                    raise Violation(f"block {block} of volume {volume} is at {version}, and {needed} had to be stable")
                history.zeroed[block] = [number for number in history.zeroed[block] if number <= version]
                history.versions[block] = {value: number for value, number in versions.items() if number <= version}
                for newest in (history.answered, history.seen, history.peer_applied):
                    newest[block] = min(newest[block], version)
        for request in [request for user in self._world.users for request in user.requests.values()]:
            history = self.volumes[request.volume]
            if request.kind == "read":
                seen = [history.seen[block] for block in self._blocks(request.offset, request.length)]
                request.floor = list(map(min, request.floor, seen))
            for block, version in request.must_be_stable.items():
                request.must_be_stable[block] = min(version, history.answered[block])

    # --- The end --------------------------------------------------------------------------------

    def finish_held(self) -> None:
        """The owner lost its cache, the secondary did not: nobody serves, and the secondary has all that was answered.

        Unless it was not in sync: then two failures have met, and holding is all there is.
        """
        if not self._world.secondary.in_sync:
            return
        for volume, history in enumerate(self.volumes):
            for block, answered in enumerate(history.answered):
                value = self._world.secondary.disks[volume].block(block)[:8]
                # A value without a version is newer than all: the owner was killed between sending and applying it.
                if history.versions[block].get(value, answered) < answered:
                    raise Violation(f"block {block} of volume {volume} has lost version {answered}, on both nodes")

    def finish(self) -> None:
        """All is quiet: the replicas are identical and hold every answered write."""
        first, second = self._world.nodes
        for volume, history in enumerate(self.volumes):
            ours, theirs = first.disks[volume], second.disks[volume]
            for block, seen in enumerate(history.seen):
                content = ours.block(block)
                if content != theirs.block(block):
                    raise Violation(
                        f"the replicas differ in block {block} of volume {volume}: {content[:8].hex()} on the owner, "
                        f"{theirs.block(block)[:8].hex()} on the secondary"
                    )
                if self._version(volume, block, content) < seen:
                    raise Violation(f"block {block} of volume {volume} has lost version {seen}")

"""A disk under a page cache, which outlives its process, and the store that a process has on it.

What was applied is in the cache; a sync makes stable what the cache held when it began; a power loss takes the
rest away, block by block, some of it or all.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING

from stortrends_ha.errors import StorageError, SyncFailedError
from stortrends_ha.protocol.nbd_transmission import OP_PUNCH, OP_WRITE, Change
from stortrends_ha.replication.interfaces import Buffer

if TYPE_CHECKING:
    from .node import Process


class Disk:
    """One volume's blocks on one host."""

    def __init__(self, size_bytes: int, block_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.block_bytes = block_bytes
        self.data = bytearray(size_bytes)
        self.is_data = bytearray(size_bytes // block_bytes)  # else a hole
        self.unstable: dict[int, bytes] = {}  # block -> what stable storage holds instead of what the cache does

    def block(self, number: int) -> bytes:
        """What the cache holds."""
        at = number * self.block_bytes
        return bytes(self.data[at : at + self.block_bytes])

    def put(self, offset: int, data: Buffer, is_data: bool = True) -> None:
        """Change the cache."""
        size, unstable = self.block_bytes, self.unstable
        first, end = offset // size, (offset + len(data)) // size
        for number in range(first, end):
            if number not in unstable:
                unstable[number] = self.block(number)
        self.data[offset : offset + len(data)] = data
        self.is_data[first:end] = (b"\1" if is_data else b"\0") * (end - first)

    def begin_sync(self) -> dict[int, bytes]:
        """What a sync that begins now will have made stable when it ends."""
        return {number: self.block(number) for number in self.unstable}

    def end_sync(self, covered: dict[int, bytes]) -> None:
        """A sync has ended; what changed since it began is still in the cache only."""
        for number, content in covered.items():
            if self.block(number) == content:
                self.unstable.pop(number, None)
            else:
                self.unstable[number] = content

    def stable_block(self, number: int) -> bytes:
        """What would be there after a power loss at the worst moment."""
        return self.unstable[number] if number in self.unstable else self.block(number)

    def lose_cache(self, random: Random) -> int:
        """A power loss; returns how many blocks went back."""
        share = random.choice((0.2, 0.5, 1.0))
        lost = [number for number in self.unstable if random.random() < share]
        for number in lost:
            at = number * self.block_bytes
            self.data[at : at + self.block_bytes] = self.unstable[number]
            self.is_data[number] = 1
        self.unstable.clear()
        return len(lost)


class Store:
    """A process's handle on a disk: a ``Store`` of the mirror, with faults; mirrors ``storage.backing.Backing``."""

    def __init__(self, process: "Process", volume: int) -> None:
        self._process = process
        self._volume = volume
        self._disk = process.node.disks[volume]
        self.size_bytes = self._disk.size_bytes
        self._dirty = True
        self._sync_failed = False
        self._flush_waiting: list[Callable[[], None]] = []
        self._sync: tuple[dict[int, bytes], list[Callable[[], None]]] | None = None

    def apply(self, changes: Sequence[Change], view: Buffer) -> None:
        """Apply changes in order; can fail, or the process be killed, at and in each of them."""
        self._dirty = True
        for op, offset, length, at in changes:
            self._process.point()
            if self._process.node.fault_is_due("apply"):
                done = self._process.world.random.randrange(0, length + 1, self._disk.block_bytes)
                self._put(op, offset, done, at, view)
                raise StorageError("simulated: a write failed")
            self._put(op, offset, length, at, view)
        self._process.point()

    def _put(self, op: int, offset: int, length: int, at: int, view: Buffer) -> None:
        data = bytes(view[at : at + length]) if op == OP_WRITE else bytes(length)
        self._disk.put(offset, data, op != OP_PUNCH)
        self._process.applied(self._volume, offset, data)

    def read(self, offset: int, length: int) -> bytes:
        """Read for the mirror; can fail."""
        self._process.point()
        if self._process.node.fault_is_due("read"):
            raise StorageError("simulated: a read failed")
        return self.content(offset, length)

    def content(self, offset: int, length: int) -> bytes:
        """Read for a client."""
        return bytes(self._disk.data[offset : offset + length])

    def extent(self, offset: int) -> tuple[bool, int]:
        """As ``Backing.extent``."""
        number = offset // self._disk.block_bytes
        is_data = self._disk.is_data[number]
        end = self._disk.is_data.find(0 if is_data else 1, number)
        return bool(is_data), self.size_bytes if end < 0 else end * self._disk.block_bytes

    # --- Flushes: mirrors Backing.start_flush, _flush_next, _flush_ended; the thread is an event of the world ---------

    def start_flush(self, done: Callable[[], None]) -> None:
        """Call ``done`` when all that was applied before is stable."""
        self._process.point()
        if self._sync_failed:
            return
        if not self._dirty and self._sync is None:
            done()
            return
        self._flush_waiting.append(done)
        if self._sync is None:
            self._flush_next()

    def _flush_next(self) -> None:
        if self._sync_failed or not self._flush_waiting:
            return
        waiting, self._flush_waiting = self._flush_waiting, []
        self._dirty = False
        self._sync = self._disk.begin_sync(), waiting

    @property
    def syncing(self) -> bool:
        """Whether a sync is under way."""
        return self._sync is not None

    def end_sync(self) -> None:
        """The sync that is under way ends."""
        assert self._sync is not None
        (covered, waiting), self._sync = self._sync, None
        if self._process.node.fault_is_due("sync"):
            self._sync_failed = True
            self._disk.lose_cache(self._process.world.random)  # the kernel may drop what it could not write
            self._process.fail(SyncFailedError("simulated: a sync failed"))
            return
        self._disk.end_sync(covered)
        for done in waiting:
            done()
        self._flush_next()

    def flush_now(self) -> None:
        """As ``Backing.flush_now``, after the threads have ended."""
        if self._sync_failed:
            raise SyncFailedError("simulated: an earlier sync failed")
        if self._process.node.fault_is_due("sync"):
            self._disk.lose_cache(self._process.world.random)
            raise SyncFailedError("simulated: a sync failed")
        self._disk.end_sync(self._disk.begin_sync())

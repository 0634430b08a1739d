"""A secondary whose data has no common history with its owner's: finds out what differs, and may keep that and give up.

Rule 10, in this order (each step can be the last before a death):
1. Compare, by digests that the owner tells (``inspection``). Nothing is changed; a broken link is taken up again.
2. Where the operator keeps the owner's copy: what differs here goes to a file (``storage.kept_file``), which is
   complete and durable when it has its name. Without room for it nothing begins.
3. Only then this replica is given up for the owner's data, durably. The resync is an ordinary one from there on.
A death before 3 leaves the replica as it was, and diverged; after it, the file and a resync that goes on by itself.

Bounds: one comparison at a time; a bit for each block; INSPECT_RANGES ranges are told; WAIT_S without the owner.
"""

import asyncio
import logging
import socket
from typing import Any

from stortrends_ha.errors import ProtocolError, SessionRefusedError, StorageError
from stortrends_ha.limits import COMPARE_GRAIN_BYTES, INSPECT_RANGES
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import DIGEST_BYTES, Kind
from stortrends_ha.replication import opening
from stortrends_ha.replication.block_map import BlockMap
from stortrends_ha.replication.differences import blocks_of
from stortrends_ha.replication.interfaces import Store
from stortrends_ha.replication.opening import Inspected
from stortrends_ha.replication.resync import digest
from stortrends_ha.storage.kept_file import KeptFiles

from .inspection import SILENT_S, look
from .link_socket import carry_out
from .replica import Replica

log = logging.getLogger(__name__)

WAIT_S = 30.0
_ZEROES = digest(bytes(COMPARE_GRAIN_BYTES))


class Comparison:
    """One of them, from when it is wanted to its end."""

    def __init__(self, replica: Replica, keep: bool) -> None:
        """``keep``: what differs here is kept in a file, and then given up."""
        self._replica = replica
        self._keep = keep
        self._wait(f"{replica.peer.name} has yet to connect")
        self._file = ""
        self._volume = self._offset = 0  # from where it goes on
        self._done_bytes = 0
        self._differing = [BlockMap(blocks_of(store.size_bytes, COMPARE_GRAIN_BYTES)) for store in replica.stores]
        self._past: dict[str, Any] = {}

    def _wait(self, why: str) -> None:
        """For a connection of the owner; whoever has asked should not be surprised by one much later."""
        self.state, self._why = "waiting", why
        late = f"{why}, and it has not for {WAIT_S:g} s; nothing was overwritten"
        self._waits = asyncio.get_running_loop().call_later(WAIT_S, self.fail, late)

    @property
    def wanted(self) -> bool:
        """Whether the owner should connect for it."""
        return self.state == "waiting"

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.state not in ("done", "failed")

    def fail(self, why: str) -> None:
        """It ends, if it has not ended."""
        self._waits.cancel()
        if self.running:
            self.state, self._why = "failed", why

    # --- 1. Comparing ---------------------------------------------------------------------------

    async def run(self, sock: socket.socket, epoch: int, agreed: Inspected) -> None:
        """With an owner that has agreed to it. Returns when it has ended, or another connection has to take it up."""
        replica, loop = self._replica, asyncio.get_running_loop()
        self._waits.cancel()
        self.state, self._why = "comparing", ""
        try:
            async with asyncio.timeout(SILENT_S):
                told = await carry_out(sock, opening.receive(epoch, Kind.INSPECT))
            own, theirs = await loop.run_in_executor(None, replica.past), wire.decode_object(told.payload)
            self._past = {replica.node: own, agreed.theirs.node: {key: _lines(theirs.get(key)) for key in own}}
            if self._keep and (agreed.theirs.needs_sync or agreed.theirs.lost_cache):
                raise SessionRefusedError(f"the copy of {agreed.theirs.node} is not complete itself")
            while self._volume < len(replica.stores):
                await self._compare_piece(sock, epoch)
        except (OSError, TimeoutError) as e:
            self._wait(f"{agreed.theirs.node} has to connect again ({e or 'it did not answer'})")
            return
        except (ProtocolError, SessionRefusedError, StorageError) as e:
            self.fail(f"{e}; nothing was overwritten")
            return
        finally:
            sock.close()
        if self._keep:
            await self._save(agreed)
        else:
            self.state = "done"

    async def _compare_piece(self, sock: socket.socket, epoch: int) -> None:
        volume, offset, loop = self._volume, self._offset, asyncio.get_running_loop()
        store = self._replica.stores[volume]
        length, own = await loop.run_in_executor(store.executor, look, store, offset, store.size_bytes - offset)
        async with asyncio.timeout(SILENT_S):
            await loop.sock_sendall(sock, wire.encode_ask(epoch, volume, offset, length))
            answer = await carry_out(sock, opening.receive(epoch, Kind.DIGESTS))
        at, covered, theirs = wire.decode_digests(answer.payload)
        blocks = blocks_of(covered, COMPARE_GRAIN_BYTES)
        ends_well = covered == length or covered % COMPARE_GRAIN_BYTES == 0
        if (answer.volume, at) != (volume, offset) or not 0 < covered <= length or not ends_well:
            raise ProtocolError("digests of another range than was asked for")
        if theirs and len(theirs) != blocks * DIGEST_BYTES:
            raise ProtocolError("more or fewer digests than blocks")
        if own or theirs:
            self._note(volume, offset, covered, own, theirs)
        self._done_bytes += covered
        self._offset += covered
        if self._offset == store.size_bytes:
            self._volume, self._offset = volume + 1, 0

    def _note(self, volume: int, offset: int, covered: int, own: bytes, theirs: bytes) -> None:
        """Which blocks differ; without digests all are zeroes."""
        first = offset // COMPARE_GRAIN_BYTES
        for number, at in enumerate(range(0, covered, COMPARE_GRAIN_BYTES)):
            size = min(COMPARE_GRAIN_BYTES, covered - at)
            zeroes = _ZEROES if size == COMPARE_GRAIN_BYTES else digest(bytes(size))
            here = slice(number * DIGEST_BYTES, (number + 1) * DIGEST_BYTES)
            if (own[here] or zeroes) != (theirs[here] or zeroes):
                self._differing[volume].add(first + number, first + number)

    # --- 2. Keeping, 3. giving up -----------------------------------------------------------------

    async def _save(self, agreed: Inspected) -> None:
        replica, owner = self._replica, agreed.theirs
        self.state = "saving"
        files = KeptFiles(replica.cluster.nodes[replica.node].state_dir, replica.group.name)
        header = {
            "cluster": replica.cluster.name,
            "group": replica.group.name,
            "node": replica.node,
            "lineage": replica.lineage,
            "kept_lineage": owner.lineage,
            "volumes": [[volume.name, volume.size_bytes] for volume in replica.group.volumes],
        }
        volumes: list[tuple[Store, BlockMap]] = list(zip(replica.stores, self._differing, strict=True))
        try:
            path = await asyncio.get_running_loop().run_in_executor(None, files.write, header, volumes)
            self._file = str(path)
            replica.give_up(owner.lineage)
        except StorageError as e:
            self.fail(f"{e}; nothing was overwritten")
            return
        log.warning(
            "group %s: given up for the data of %s; what was different here is in %s",
            replica.group.name, owner.node, path,
        )  # fmt: skip
        self.state = "done"

    # --- Status -----------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """How far it is, and what it has found."""
        stores = self._replica.stores
        return {
            "keep": self._keep,
            "state": self.state,
            "why": self._why,
            "file": self._file,
            "done_bytes": self._done_bytes,
            "total_bytes": sum(store.size_bytes for store in stores),
            "differing_bytes": sum(map(self._bytes, range(len(stores)))),
            "past": self._past,
            "volumes": self._found() if self.state == "done" else {},
        }

    def _bytes(self, volume: int) -> int:
        size, differing = self._replica.stores[volume].size_bytes, self._differing[volume]
        last = differing.blocks - 1
        beyond = differing.blocks * COMPARE_GRAIN_BYTES - size if last in differing else 0
        return differing.count * COMPARE_GRAIN_BYTES - beyond

    def _found(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        room = INSPECT_RANGES
        for volume, store in enumerate(self._replica.stores):
            ranges, count = merged(self._differing[volume], store.size_bytes, room)
            room -= len(ranges)
            found[self._replica.group.volumes[volume].name] = {
                "size_bytes": store.size_bytes,
                "differing_bytes": self._bytes(volume),
                "ranges": ranges,
                "more_ranges": count - len(ranges),
            }
        return found


def _lines(told: Any) -> list[str]:
    """What the owner tells people."""
    return [str(line) for line in told] if isinstance(told, list) else []


def merged(blocks: BlockMap, size_bytes: int, at_most: int) -> tuple[list[tuple[int, int]], int]:
    """(the first ranges of blocks, as offset and length; how many there are)."""
    ranges: list[tuple[int, int]] = []
    count, first = 0, blocks.next_from(0)
    while first is not None:
        last = blocks.run_end(first, blocks.blocks - 1)
        if count < at_most:
            offset = first * COMPARE_GRAIN_BYTES
            ranges.append((offset, min((last + 1) * COMPARE_GRAIN_BYTES, size_bytes) - offset))
        count += 1
        first = blocks.next_from(last + 1)
    return ranges, count

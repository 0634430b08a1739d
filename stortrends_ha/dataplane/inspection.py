"""Comparing two replicas that have no common history, outside of any session: what both sides read; the owner's side.

Rule 10: nothing is changed by it. The owner first tells its past (INSPECT). Then the secondary asks for the digests of
ranges (ASK), the owner answers (DIGESTS) from its replica as it is at that moment; while clients write, each block is
compared at some moment of its own.
The owner is in no hurry: it rests as long as it has worked, and while it has clients it reads at most
``limits.resync_min_rate``. Bounds: one piece of INSPECT_PIECE_BYTES at a time; silence of SILENT_S ends it.
If either process dies, the secondary goes on where it was, or whoever asked asks again.
"""

import asyncio
import socket
from collections.abc import Callable

from stortrends_ha.errors import ProtocolError
from stortrends_ha.limits import COMPARE_GRAIN_BYTES, INSPECT_PIECE_BYTES
from stortrends_ha.protocol import link as wire
from stortrends_ha.protocol.link import Kind
from stortrends_ha.replication import opening
from stortrends_ha.replication.interfaces import Store
from stortrends_ha.replication.resync import digest

from .link_socket import carry_out
from .replica import Replica

SILENT_S = 30.0


def look(store: Store, offset: int, length: int) -> tuple[int, bytes]:
    """(how much was looked at, the digests of its blocks) of a range that begins with a block; none for a hole. In any
    thread. Raises StorageError."""
    is_data, end = store.extent(offset)
    whole = end if end == store.size_bytes else end // COMPARE_GRAIN_BYTES * COMPARE_GRAIN_BYTES
    if not is_data and whole > offset:
        return min(whole - offset, length), b""
    length = min(length, INSPECT_PIECE_BYTES)
    data = memoryview(store.read(offset, length))
    return length, b"".join(digest(data[at : at + COMPARE_GRAIN_BYTES]) for at in range(0, length, COMPARE_GRAIN_BYTES))


async def answer(sock: socket.socket, replica: Replica, epoch: int, has_clients: Callable[[], bool]) -> None:
    """Let the secondary inspect until it has seen enough. Raises OSError, ProtocolError, StorageError, TimeoutError."""
    loop = asyncio.get_running_loop()
    past = await loop.run_in_executor(None, replica.past)
    await loop.sock_sendall(sock, wire.encode_object(Kind.INSPECT, epoch, past))
    while True:
        async with asyncio.timeout(SILENT_S):
            asked = await carry_out(sock, opening.receive(epoch, Kind.ASK))
        if asked.volume >= len(replica.stores):
            raise ProtocolError(f"a frame for volume number {asked.volume} of {len(replica.stores)}")
        store = replica.stores[asked.volume]
        offset, length = wire.decode_ask(asked.payload)
        if offset % COMPARE_GRAIN_BYTES or not 0 < length <= store.size_bytes - offset:
            raise ProtocolError(f"a question for {length} bytes at {offset} in a volume of {store.size_bytes}")
        began_s = loop.time()
        covered, digests = await loop.run_in_executor(store.executor, look, store, offset, length)
        took_s = loop.time() - began_s
        async with asyncio.timeout(SILENT_S):
            await loop.sock_sendall(sock, wire.encode_digests(epoch, asked.volume, offset, covered, digests))
        if digests:
            paced_s = covered / replica.cluster.limits.resync_min_rate if has_clients() else 0.0
            await asyncio.sleep(max(took_s, paced_s - took_s))

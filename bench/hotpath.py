"""Time the steps of a 4 KiB write in the pure core, without sockets and disks: `python -m bench.hotpath`.

What is left out are the system calls, so this is what Python itself costs: microseconds a write, by the number of
writes that arrive together.
"""

import time
from collections.abc import Callable, Mapping, Sequence

from stortrends_ha.protocol import nbd_transmission as nbd
from stortrends_ha.protocol.nbd_transmission import Change, Decoder, Geometry
from stortrends_ha.replication.block_map import BlockMap
from stortrends_ha.replication.differences import Differences
from stortrends_ha.replication.interfaces import Buffer
from stortrends_ha.replication.primary import Primary
from stortrends_ha.replication.secondary import Secondary
from stortrends_ha.replication.session import Plan

WRITES = 100_000
BLOCK_BYTES = 4096
VOLUME_BYTES = 1 << 30


class NoDisk:
    """A store that does what `Backing.apply` does, but for the system call."""

    size_bytes = VOLUME_BYTES

    def apply(self, changes: Sequence[Change], view: Buffer) -> None:
        """Slice the payloads."""
        for _, _, length, at in changes:
            view[at : at + length]

    def read(self, offset: int, length: int) -> Buffer:
        """Nothing reads here."""
        raise NotImplementedError

    def renew(self, offset: int, length: int) -> None:
        """See ``Store``."""

    def extent(self, offset: int) -> tuple[bool, int]:
        """Nothing is synced here."""
        raise NotImplementedError

    def start_flush(self, done: Callable[[], None]) -> None:
        """At once."""
        done()


class NoNetwork:
    """A link that remembers the last message."""

    backlog_bytes = 0

    def __init__(self) -> None:
        self.last = b""

    def send(self, buffers: list[Buffer], length: int) -> None:
        """Keep it."""
        self.last = b"".join(buffers)
        assert len(self.last) == length


class NoClient:
    """A client that is content with every answer."""

    def answer(self, replies: bytes) -> None:
        """Ignore it."""

    def pause(self) -> None:
        """Not here."""

    def resume(self) -> None:
        """Not here."""


class NoFile:
    """Keeps no map."""

    def start_write(self, pages: Mapping[int, bytes], *, durable: bool, done: Callable[[], None]) -> None:  # noqa: ARG002
        """At once."""
        done()


def _nothing() -> None:
    """Nobody waits."""


def _never(*_: object) -> None:
    raise AssertionError


def profile(batch: int) -> list[float]:
    """Microseconds a write: to decode, submit, apply at the secondary, answer."""
    requests = [nbd.REQUEST.pack(nbd.PLAIN_WRITE, bytes(8), at * 65536, BLOCK_BYTES) for at in range(batch)]
    view = memoryview(bytearray(b"".join(request + bytes(BLOCK_BYTES) for request in requests)))
    decoder, client, link, back = Decoder(Geometry(VOLUME_BYTES)), NoClient(), NoNetwork(), NoNetwork()
    maps = BlockMap(VOLUME_BYTES >> 22), BlockMap(VOLUME_BYTES >> 16)
    log = Differences(VOLUME_BYTES, 1 << 16, *maps, NoFile(), NoFile())
    primary = Primary([NoDisk()], [log], 1, alone=False, window_changes=65536, window_bytes=1 << 26, failed=_never)
    primary.open_session(link, Plan.RESUME)
    secondary = Secondary([NoDisk()], 1, back, 1, lambda: None)
    spent_s = [0.0] * 4
    for _ in range(WRITES // batch):
        times = [time.perf_counter()]
        decoded = decoder.decode(view, len(view))
        times.append(time.perf_counter())
        while not primary.logged(0, decoded.changes, _nothing):
            pass
        primary.submit(client, 0, decoded, view)
        times.append(time.perf_counter())
        message = memoryview(link.last)
        times.append(time.perf_counter())
        secondary.receive(message, len(message))
        times.append(time.perf_counter())
        answer = memoryview(back.last)
        times.append(time.perf_counter())
        primary.receive(answer, len(answer))
        times.append(time.perf_counter())
        for step, (start, end) in enumerate(((0, 1), (1, 2), (3, 4), (5, 6))):
            spent_s[step] += times[end] - times[start]
    return [seconds / WRITES * 1e6 for seconds in spent_s]


def main() -> None:
    """Print a table."""
    print("| writes together | decode | submit | secondary | answer | together |")
    print("|---|---|---|---|---|---|")
    for batch in (1, 4, 16, 64):
        steps = profile(batch)
        cells = " | ".join(f"{step:.2f}" for step in (*steps, sum(steps)))
        print(f"| {batch} | {cells} |")


if __name__ == "__main__":
    main()

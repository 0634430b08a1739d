"""A client that records what it asks and is answered: raw NBD, many requests at a time, to blocks that others use, too.

Job: a program that a test starts, several times for one volume; each has a number, and a file for its part of the
history. It first zeroes all the blocks, and asks nothing else until that is answered. On standard input it takes words,
a line each, answered by a line of JSON about how it goes; after `finish` it only reads each block once more.
Invariants: no value is written twice, so what was not answered when the connection broke is never sent again: its
outcome is unknown. There is no time-out: an answer is waited for as long as the connection lives.
"""

import argparse
import asyncio
import json
import random
import struct
import sys
import threading
import time
from typing import Any, TextIO

from .contents import BLOCK_BYTES, Contents
from .operations import CHANGES, Operation, to_line, unique_value

RECONNECT_S = 0.02
# As many requests as are allowed are sent at once, so that they meet those of others; so often.
BURST_S = 0.04
LONGEST = 4  # blocks of a request
_EXPORT_NAME, _DISC, _FUA = 1, 2, 1
_COMMANDS = {"read": 0, "write": 1, "flush": 3, "trim": 4, "zero": 6}
_WEIGHTS = {"read": 46, "write": 46, "trim": 3, "zero": 5}
_GREETING_BYTES = 18 + 10  # with the NO_ZEROES flag
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")


class Recorder:
    """One connection after the other to an export, and what came of each request."""

    def __init__(self, options: argparse.Namespace, file: TextIO) -> None:
        self.answered = 0
        self.connects = 0
        self.finished = False
        self.errors: list[str] = []
        self._options = options
        self._file = file
        self._contents = Contents(options.run)
        self._random = random.Random(f"{options.run} {options.client}")
        self._under_way: dict[int, Operation] = {}  # by cookie
        self._number = 0
        self._zeroed = False
        self._unread: set[int] | None = None  # what is to be read at the end

    async def run(self) -> None:
        """Until `finish` was asked for and all is read."""
        while self._unread is None or self._unread or self._under_way:
            try:
                await self._serve_connection()
            except* (OSError, asyncio.IncompleteReadError):
                pass
            for cookie in list(self._under_way):
                self._ends(cookie)
            await asyncio.sleep(RECONNECT_S)
        self.finished = True

    def finish(self) -> None:
        if self._unread is None:
            self._unread = set(range(self._options.blocks))

    def report(self) -> dict[str, Any]:
        return {
            "answered": self.answered,
            "connects": self.connects,
            "finished": self.finished,
            "errors": self.errors[:20],
            "stalls": [],
        }

    # --- A connection ---

    async def _serve_connection(self) -> None:
        host, _, port = self._options.to.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            name = self._options.export.encode()
            writer.write(b"\0\0\0\3IHAVEOPT" + struct.pack(">II", _EXPORT_NAME, len(name)) + name)
            await reader.readexactly(_GREETING_BYTES)
            self.connects += 1
            async with asyncio.TaskGroup() as both:
                receiving = both.create_task(self._receive(reader))
                await self._send(writer)
                receiving.cancel()
            writer.write(_REQUEST.pack(0x25609513, 0, _DISC, 0, 0, 0))
            await writer.drain()
        finally:
            writer.close()

    async def _send(self, writer: asyncio.StreamWriter) -> None:
        """Until all is done."""
        while self._unread is None or self._unread or self._under_way:
            while len(self._under_way) < self._options.depth and (one := self._next()):
                self._number += 1
                one.begin = time.monotonic_ns()
                self._under_way[self._number] = one
                writer.write(self._frame(one))
            await writer.drain()
            await asyncio.sleep(BURST_S)

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        while True:
            magic, error, cookie = _REPLY.unpack(await reader.readexactly(_REPLY.size))
            one = self._under_way.get(cookie)
            if magic != 0x67446698 or one is None:
                self.errors.append(f"a reply that nobody asked for: {magic:x} {cookie}")
                raise ConnectionResetError
            if one.kind == "read" and not error:
                data = await reader.readexactly(one.count * BLOCK_BYTES)
                pieces = (data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES))
                one.found = [self._contents.read(block, piece) for block, piece in zip(one.blocks, pieces, strict=True)]
            one.end, one.error = time.monotonic_ns(), error
            if error:
                self.errors.append(f"{one.kind} of block {one.block}: error {error}")
            self.answered += 1
            self._ends(cookie)

    def _ends(self, cookie: int) -> None:
        one = self._under_way.pop(cookie)
        print(to_line(one), file=self._file)
        if one.answered and one.kind == "zero":
            self._zeroed = True
        if one.answered and one.kind == "read" and self._unread:
            self._unread.difference_update(one.blocks)

    # --- Requests ---

    def _next(self) -> Operation | None:
        """What to ask now; None: nothing."""
        client, blocks = self._options.client, self._options.blocks
        if not self._zeroed:
            return None if self._under_way else Operation("zero", client, 0, count=blocks)
        if self._unread is not None:
            asked = {one.block for one in self._under_way.values()}
            block = next(iter(self._unread - asked), None)
            return None if block is None else Operation("read", client, 0, block=block)
        if self._random.random() < self._options.stable:
            return Operation("flush", client, 0)
        (kind,) = self._random.choices([*_WEIGHTS], [*_WEIGHTS.values()])
        count = self._random.randint(1, LONGEST) if self._random.random() < 0.1 else 1
        block = self._random.randrange(blocks - count + 1)
        value = unique_value(client, self._number + 1) if kind == "write" else 0
        fua = kind in CHANGES and self._random.random() < self._options.stable
        return Operation(kind, client, 0, block=block, count=count, value=value, fua=fua)

    def _frame(self, one: Operation) -> bytes:
        offset, length = (0, 0) if one.kind == "flush" else (one.block * BLOCK_BYTES, one.count * BLOCK_BYTES)
        flags = _FUA if one.fua else 0
        header = _REQUEST.pack(0x25609513, flags, _COMMANDS[one.kind], self._number, offset, length)
        data = [self._contents.write(block, one.value) for block in one.blocks] if one.kind == "write" else []
        return header + b"".join(data)


def listen(recorder: Recorder, loop: asyncio.AbstractEventLoop) -> None:
    """Do what standard input says, beside the load, until it ends."""
    for line in sys.stdin:
        if line.strip() == "finish":
            loop.call_soon_threadsafe(recorder.finish)
        print(json.dumps(recorder.report()), flush=True)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", required=True, help="HOST:PORT")
    parser.add_argument("--export", required=True)
    parser.add_argument("--file", required=True, help="where to record")
    parser.add_argument("--client", type=int, required=True, help="its number, from 1 on")
    parser.add_argument("--run", type=int, required=True, help="a number that all clients of this history share")
    parser.add_argument("--blocks", type=int, default=32, help="the first so many of the volume are used")
    parser.add_argument("--depth", type=int, default=6, help="requests at a time")
    parser.add_argument("--stable", type=float, default=0.05, help="share of flushes, and of changes that have FUA")
    return parser.parse_args()


async def record(recorder: Recorder) -> None:
    threading.Thread(target=listen, args=(recorder, asyncio.get_running_loop()), daemon=True).start()
    await recorder.run()


def main() -> None:
    chosen = options()
    with open(chosen.file, "w", buffering=1) as file:
        asyncio.run(record(Recorder(chosen, file)))
        threading.Event().wait()  # for who asks how it went


if __name__ == "__main__":
    main()

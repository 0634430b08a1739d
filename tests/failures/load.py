"""A client that never stops: raw NBD, 4 KiB reads and writes mixed, many at a time; every read is checked.

Job: a program that a test starts on the client's machine. On its standard input it takes words, a line each: `report`
is answered by a line of JSON; `finish` ends the load, reads all that it has written, and is answered when all is
known. It is independent of our own NBD codec.
Invariants: it has no time-out of its own: it waits for an answer for as long as the connection lives, as QEMU does. A
connection that breaks is made again at once, then every 20 ms, and what was not answered is sent again.
Times are those of CLOCK_MONOTONIC, the same for all processes.
"""

import argparse
import collections
import contextlib
import json
import random
import select
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from .blocks import BLOCK_BYTES, Blocks

RECONNECT_S = 0.02
STALL_S = 0.01  # shorter ones are not noted
STALLS = 4096  # the newest so many are kept
TICK_S = 0.02
_READ, _WRITE, _DISC, _FLUSH = 0, 1, 2, 3
_EXPORT_NAME = 1
_GREETING_BYTES = 18 + 10  # with the NO_ZEROES flag
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")


class Answers:
    """What became of requests, and how long they waited."""

    def __init__(self) -> None:
        self.answered = 0
        self.connects = 0
        self.finished = False
        self.errors: list[str] = []
        self.stalls: collections.deque[tuple[float, float]] = collections.deque(maxlen=STALLS)
        self._last_s = time.monotonic()

    def answer(self, waited_since_s: float) -> None:
        """An answer has come; nothing was waiting before `waited_since_s`."""
        now_s = time.monotonic()
        began_s = max(self._last_s, waited_since_s)
        if now_s - began_s >= STALL_S:
            self.stalls.append((began_s, now_s))
        self._last_s = now_s
        self.answered += 1

    def report(self) -> dict[str, Any]:
        return {
            "answered": self.answered,
            "connects": self.connects,
            "finished": self.finished,
            "errors": self.errors[:20],
            "stalls": list(self.stalls),
        }


@dataclass(slots=True)
class Request:
    """One that is not answered yet; `which` is the number of a write, for a read the least that it may return."""

    kind: int
    block: int
    which: int
    frame: bytes
    sent_s: float


class Client:
    """One connection after the other to an export."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.answers = Answers()
        self._options = options
        self._blocks = Blocks(options.first, options.blocks, random.getrandbits(63))
        self._random = random.Random()
        self._pending: dict[int, Request] = {}  # in the order in which they were first sent
        self._cookie = 0
        self._socket: socket.socket | None = None
        self._greeted = False
        self._input = bytearray()
        self._output = bytearray()
        self._connect_s = 0.0  # not before
        self._next_s = time.monotonic()
        self._writes = 0
        self._finishing = False
        self._unread: list[int] | None = None  # what is still to be read at the end

    def run(self) -> None:
        """Until `finish` was asked for and all is read."""
        while self._unread is None or self._unread or self._pending:
            if self._socket is None:
                self._connect()
            elif self._greeted:
                self._fill()
            self._wait()
        self._disconnect()
        self.answers.finished = True

    def finish(self) -> None:
        """From another thread."""
        self._finishing = True

    # --- The connection ---

    def _connect(self) -> None:
        if (now_s := time.monotonic()) < self._connect_s:
            time.sleep(self._connect_s - now_s)
        self._connect_s = time.monotonic() + RECONNECT_S
        to: str = self._options.to
        host, _, port = to.rpartition(":")
        unix = to.startswith("/")
        family = socket.AF_UNIX if unix else socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        made = socket.socket(family)
        try:
            made.connect(to if unix else (host.strip("[]"), int(port)))
        except OSError:
            made.close()
            return
        if not unix:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.setblocking(False)
        name: bytes = self._options.export.encode()
        self._socket, self._greeted = made, False
        self._input.clear()
        self._output[:] = b"\0\0\0\3IHAVEOPT" + struct.pack(">II", _EXPORT_NAME, len(name)) + name
        self.answers.connects += 1

    def _lost(self) -> None:
        assert self._socket is not None
        self._socket.close()
        self._socket = None

    def _disconnect(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.send(_REQUEST.pack(0x25609513, 0, _DISC, 0, 0, 0))
            self._lost()

    def _wait(self) -> None:
        if self._socket is None:
            return
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._output else 0))
        timeout_s = TICK_S
        if self._greeted and not self._finishing and len(self._pending) < self._options.depth:
            timeout_s = min(TICK_S, max(0.0, self._next_s - time.monotonic()))
        try:
            for _, event in poll.poll(timeout_s * 1000):
                if event & select.POLLOUT:
                    del self._output[: self._socket.send(self._output)]
                if event & ~select.POLLOUT:
                    self._receive(self._socket)
        except BlockingIOError:
            pass
        except OSError:
            self._lost()

    def _receive(self, of: socket.socket) -> None:
        data = of.recv(1 << 18)
        if not data:
            raise ConnectionResetError
        self._input += data
        if not self._greeted and len(self._input) >= _GREETING_BYTES:
            del self._input[:_GREETING_BYTES]
            self._greeted = True
            for request in self._pending.values():
                self._output += request.frame
        while self._greeted and self._take_reply():
            pass

    # --- Requests ---

    def _fill(self) -> None:
        rate: float = self._options.rate
        while len(self._pending) < self._options.depth and (not rate or time.monotonic() >= self._next_s):
            if rate:
                self._next_s = max(self._next_s + 1 / rate, time.monotonic() - 1 / rate)
            if not self._finishing:
                self._ask_something()
            elif self._unread is None:
                if self._pending:
                    return
                self._unread = self._blocks.known()
                self._options.rate = rate = 0.0
            elif self._unread:
                self._ask_read(self._unread.pop())
            else:
                return

    def _ask_something(self) -> None:
        block = self._random.randrange(len(self._blocks))
        if self._random.random() < 0.5 or not self._blocks.may_write(block):
            self._ask_read(block)
            return
        self._writes += 1
        which, data = self._blocks.write(block)
        self._ask(_WRITE, block, which, data)
        if self._options.flush_every and self._writes % self._options.flush_every == 0:
            self._ask(_FLUSH, 0, 0, b"")

    def _ask_read(self, block: int) -> None:
        self._ask(_READ, block, self._blocks.floor(block), b"")

    def _ask(self, kind: int, block: int, which: int, data: bytes) -> None:
        self._cookie += 1
        offset = 0 if kind == _FLUSH else (self._options.first + block) * BLOCK_BYTES
        length = 0 if kind == _FLUSH else BLOCK_BYTES
        frame = _REQUEST.pack(0x25609513, 0, kind, self._cookie, offset, length) + data
        self._pending[self._cookie] = Request(kind, block, which, frame, time.monotonic())
        self._output += frame

    def _take_reply(self) -> bool:
        if len(self._input) < _REPLY.size:
            return False
        magic, error, cookie = _REPLY.unpack_from(self._input)
        request = self._pending.get(cookie)
        if magic != 0x67446698 or request is None:
            self.answers.errors.append(f"a reply that nobody asked for: {bytes(self._input[:16])!r}")
            raise ConnectionResetError
        end = _REPLY.size + (BLOCK_BYTES if request.kind == _READ and not error else 0)
        if len(self._input) < end:
            return False
        data = bytes(self._input[_REPLY.size : end])
        del self._input[:end]
        oldest_s = next(iter(self._pending.values())).sent_s
        del self._pending[cookie]
        self.answers.answer(oldest_s)
        self._note(request, error, data)
        return True

    def _note(self, request: Request, error: int, data: bytes) -> None:
        if error:
            self.answers.errors.append(f"{request.kind} of block {request.block}: error {error}")
        elif request.kind == _READ and (wrong := self._blocks.read(request.block, request.which, data)):
            self.answers.errors.append(wrong)
        if request.kind == _WRITE:
            self._blocks.written(request.block, 0 if error else request.which)


def listen(client: Any) -> None:
    """Do what standard input says, beside the load, until it ends."""
    for line in sys.stdin:
        if line.strip() == "finish":
            client.finish()
        print(json.dumps(client.answers.report()), flush=True)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", required=True, help="HOST:PORT, or the path of a Unix socket")
    parser.add_argument("--export", required=True)
    parser.add_argument("--first", type=int, default=0, help="the first block that is used")
    parser.add_argument("--blocks", type=int, default=4096)
    parser.add_argument("--depth", type=int, default=8, help="requests at a time")
    parser.add_argument("--rate", type=float, default=0, help="requests a second; 0: as fast as they are answered")
    parser.add_argument("--flush-every", type=int, default=0, help="writes; 0: never")
    return parser.parse_args()


def main() -> None:
    client = Client(options())
    threading.Thread(target=listen, args=(client,), daemon=True).start()
    client.run()
    threading.Event().wait()  # for who asks how it went


if __name__ == "__main__":
    main()

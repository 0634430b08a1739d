"""The witness: a small daemon on a third machine that keeps the records of many clusters and grants their changes.

Job: accept connections, authenticate each with its cluster's key, answer one request after the other.
Invariants: a cluster sees its own registers only; a grant is durable before it is sent; what is not understood, not
authentic or too slow ends its own connection and nothing else, is counted, and fills no log. A stranger learns nothing
but how keys are installed: the answer is the same for a cluster that is not known and a key that is wrong.
Bounds: `STRANGERS_MAX` connections that have not proved a key, `MEMBERS_MAX` of each cluster (the oldest gives way: a
node that lost its power leaves half-open ones behind), one request at a time of each, `LINE_BYTES_MAX` a line.
Death at any moment loses nothing: see `registers`, whose blocking calls run in one thread of their own, in order.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from stortrends_ha import __version__
from stortrends_ha.arbiter.counted import Counted
from stortrends_ha.arbiter.registers import Change, Registers, note_of
from stortrends_ha.arbiter.streams import read_line, reason
from stortrends_ha.config import Address, read_key
from stortrends_ha.config.values import parse_name
from stortrends_ha.errors import ConfigError, ProtocolError, StartError, StorageError
from stortrends_ha.notify import notify
from stortrends_ha.protocol.witness import (
    LINE_BYTES_MAX,
    NONCE_BYTES,
    VERSIONS,
    WITNESS,
    Answer,
    ClientHello,
    Open,
    Propose,
    Read,
    Refusal,
    Request,
    Seal,
    WitnessHello,
    decode_request,
    encode_answer,
)

log = logging.getLogger(__name__)

STRANGERS_MAX = 64
MEMBERS_MAX = 32
# Two round trips; a slow disk may delay the reading of the key.
HANDSHAKE_S_MAX = 5.0
# A node that has nothing to ask closes nothing and connects again when it finds the connection closed.
IDLE_S_MAX = 300.0
SEND_S_MAX = 10.0
# One that was just killed is not a rival: look again before saying so.
RIVAL_S = 2.0
RETRY_S = 0.05

DATABASE = "witness.db"
KEYS = "keys"
LOCK = "lock"

T = TypeVar("T")


class _RefusedError(Exception):
    """Not to be talked to; the text is the sentence for the client."""


class WitnessServer:
    """The witness on one state directory."""

    def __init__(self, state: Path) -> None:
        self._keys = state / KEYS
        self._registers = Registers(state / DATABASE)
        self._disk = ThreadPoolExecutor(1, "registers")
        self._strangers: dict[asyncio.StreamWriter, None] = {}
        self._members: dict[str, dict[asyncio.StreamWriter, None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.counted = Counted(log)

    @contextlib.asynccontextmanager
    async def serve(self, address: Address) -> AsyncIterator[None]:
        """Answer at `address`. Raises StartError or StorageError."""
        try:
            await self._in_thread(self._registers.open)
            try:
                server = await asyncio.start_server(self._accept, address.host, address.port, limit=LINE_BYTES_MAX)
            except OSError as error:
                raise StartError(f"The witness cannot listen on {address}: {reason(error)}.") from error
            try:
                yield
            finally:
                server.close()
                await self._end_connections()
        finally:
            self._disk.shutdown()  # waits for the change under way
            self._registers.close()

    async def _end_connections(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _in_thread(self, call: Callable[[], T]) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(self._disk, call)

    # --- Connections ---

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connection(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = _name_of(writer)
        try:
            await self._talk(reader, writer)
        except ProtocolError as error:
            self.counted.add("garbage", f"{client} sent {error}")
        except _RefusedError as error:
            self.counted.add("refused strangers", f"{client} is refused: {error}")
            writer.write(Refusal(str(error)).encode())
        except TimeoutError:
            self.counted.add("timeouts", f"{client} was too slow, or idle for too long")
        except ConnectionError:
            pass  # it went away; nothing depends on it
        finally:
            writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with _one_of(self._strangers, writer, STRANGERS_MAX):
            async with asyncio.timeout(HANDSHAKE_S_MAX):
                hello, seal = await self._handshake(reader, writer)
        members = self._members.setdefault(hello.cluster, {})  # as many as there are keys, at most
        with _one_of(members, writer, MEMBERS_MAX):
            while True:
                async with asyncio.timeout(IDLE_S_MAX):
                    line = await read_line(reader)
                if not line:
                    return
                request = decode_request(seal.open(line))
                answer = await self._answer(hello, request)
                await _send(writer, seal.seal(encode_answer(answer)))

    async def _handshake(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[ClientHello, Seal]:
        if not (first := await read_line(reader)):
            raise ConnectionResetError
        hello = ClientHello.decode(first)
        version = hello.version
        if version is None:
            raise _RefusedError(
                f"This witness (stortrends-ha {__version__}) speaks version {VERSIONS[0]} to {VERSIONS[1]} of its"
                f" protocol, the client {hello.versions[0]} to {hello.versions[1]}: upgrade the older one."
            )
        reply = WitnessHello(secrets.token_bytes(NONCE_BYTES), version).encode()
        await _send(writer, reply)
        if not (second := await read_line(reader)):
            raise ConnectionResetError
        seal = Seal(await self._key(hello.cluster), first, reply, WITNESS)
        try:
            opening = seal.open(second)
        except ProtocolError:
            # Not said: which of the two it is.
            raise _RefusedError(
                f"This witness does not know cluster {hello.cluster!r} with the key that was used: copy the cluster's"
                f" key file to {KEYS}/{hello.cluster}.key in the witness's state directory."
            ) from None
        if not isinstance(decode_request(opening), Open):
            raise ProtocolError("a first request that does not open")
        await _send(writer, seal.seal(encode_answer(Answer("welcome"))))
        return hello, seal

    async def _key(self, cluster: str) -> bytes:
        """The key of a cluster; one that nobody has if there is none."""
        try:
            path = self._keys / f"{parse_name(cluster)}.key"
        except ValueError:
            raise ProtocolError(f"{cluster!r} as the name of a cluster") from None
        try:
            return await self._in_thread(lambda: read_key(path))
        except ConfigError as error:
            if not isinstance(error.__cause__, FileNotFoundError):  # a key that was meant to be used
                self.counted.add("bad keys", str(error))
            return secrets.token_bytes(32)

    # --- Requests ---

    async def _answer(self, hello: ClientHello, request: Request) -> Answer:
        if isinstance(request, Open):
            raise ProtocolError("a connection opened twice")
        try:
            answer = await self._in_thread(lambda: self._registers.carry_out(hello.cluster, hello.who, request))
        except StorageError as error:
            self.counted.add("disk errors", str(error))
            return Answer("error", why=f"the witness has trouble with its disk: {error}")
        self.counted.count(answer.kind)
        if answer.kind == "granted" and not isinstance(request, Read):
            _log_granted(hello, request)
        return answer


def _log_granted(hello: ClientHello, change: Change) -> None:
    record = change.new if isinstance(change, Propose) else change.record
    log.info("%s %s is at %s (%s, by %s).", hello.cluster, change.group, record, note_of(change), hello.who)


@contextlib.contextmanager
def _one_of(connections: dict[asyncio.StreamWriter, None], writer: asyncio.StreamWriter, most: int) -> Iterator[None]:
    """Be one of at most so many connections; the oldest gives way."""
    if len(connections) >= most:
        oldest = next(iter(connections))
        del connections[oldest]
        oldest.transport.abort()
    connections[writer] = None
    try:
        yield
    finally:
        connections.pop(writer, None)


async def _send(writer: asyncio.StreamWriter, line: bytes) -> None:
    writer.write(line)
    async with asyncio.timeout(SEND_S_MAX):
        await writer.drain()


def _name_of(writer: asyncio.StreamWriter) -> str:
    name = writer.get_extra_info("peername")
    return str(Address(name[0], name[1])) if name else "a client that is gone"


# --- The daemon ---


@contextlib.asynccontextmanager
async def _state_of_our_own(state: Path) -> AsyncIterator[None]:
    """Make the state directory and hold its lock, which ends with this process however it ends."""
    try:
        (state / KEYS).mkdir(parents=True, exist_ok=True, mode=0o700)
        _sync(state.parent)
        fd = os.open(state / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartError(f"The witness's state directory {state} cannot be used: {error.strerror}.") from error
    try:
        await _take(fd, state)
        yield
    finally:
        os.close(fd)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


async def _take(fd: int, state: Path) -> None:
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + RIVAL_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if loop.time() > deadline_s:
                raise StartError(f"Another witness already runs on the state directory {state}.") from None
        await asyncio.sleep(RETRY_S)


async def _run(address: Address, state: Path) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with _state_of_our_own(state):
        server = WitnessServer(state)
        async with server.serve(address):
            log.info("The witness, version %s, listens on %s.", __version__, address)
            notify("READY=1")
            await stop.wait()
            log.info("The witness is asked to stop.")
            notify("STOPPING=1")
    log.info("The witness has stopped (%s).", server.counted)


def run(address: Address, state: Path) -> None:
    """Be the witness until told to stop. Raises a `StorTrendsError` if that is not possible."""
    asyncio.run(_run(address, Path(os.path.abspath(state))))

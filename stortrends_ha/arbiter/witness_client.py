"""Asks a witness: one kept connection, shared by all groups of a node, made anew when it is needed.

Invariants: every call returns in `timeout_s`; only what the witness sealed with the cluster's key is believed. A
request on a kept connection that broke, or that does not answer, is asked once more on a new one: asking twice is
harmless, as every change is a compare-and-set. ``Unreachable.asked`` is false only if no request was sent at all.
Bounds: one connection; as many requests in flight as there are callers.
Neighbours: `protocol.witness` is what is spoken, `witness_server` the other end.
"""

import asyncio
import secrets
from collections import deque

from stortrends_ha.arbiter.interface import Granted, Known, Refused, Unreachable
from stortrends_ha.arbiter.streams import read_line, reason
from stortrends_ha.config import Address
from stortrends_ha.errors import ProtocolError
from stortrends_ha.protocol.witness import (
    CLIENT,
    LINE_BYTES_MAX,
    NONCE_BYTES,
    Answer,
    ClientHello,
    Force,
    Open,
    Propose,
    Read,
    Refusal,
    Request,
    Seal,
    Seed,
    decode_answer,
    decode_reply,
    encode_request,
)
from stortrends_ha.record import Record

TIMEOUT_S = 1.0


class _Connection:
    """An open connection. Answers come in the order of the requests."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seal: Seal) -> None:
        self._reader = reader
        self._writer = writer
        self._seal = seal
        self._waiting: deque[asyncio.Future[Answer]] = deque()
        self._why = "it closed the connection"
        self._receiving = asyncio.create_task(self._receive())
        self._receiving.add_done_callback(self._ended)

    @property
    def usable(self) -> bool:
        """Whether it can still be asked."""
        return not self._receiving.done() and not self._writer.is_closing()

    async def ask(self, request: Request) -> Answer:
        """Raises OSError when the connection ends before the answer; it has been asked then, perhaps."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        self._writer.write(self._seal.seal(encode_request(request)))
        return await answer

    async def _receive(self) -> None:
        try:
            while line := await read_line(self._reader):
                answer = decode_answer(self._seal.open(line))
                if not self._waiting:
                    raise ProtocolError("an answer to nothing")
                future = self._waiting.popleft()
                if not future.done():  # else its caller has given up
                    future.set_result(answer)
        except ProtocolError as error:
            self._why = f"it sent {error}"
        except OSError as error:
            self._why = reason(error)

    def _ended(self, _: asyncio.Task[None]) -> None:
        self._writer.transport.abort()
        for future in self._waiting:
            if not future.done():
                future.set_exception(ConnectionError(self._why))
        self._waiting.clear()

    async def close(self) -> None:
        """End it; whoever waits for an answer is told so."""
        self._receiving.cancel()
        await asyncio.wait({self._receiving})


class WitnessArbiter:
    """The witness at an address, as a node of a cluster asks it; ``key`` is the cluster's."""

    def __init__(self, address: Address, cluster: str, me: str, key: bytes, timeout_s: float = TIMEOUT_S) -> None:
        self._address = address
        self._cluster = cluster
        self._me = me
        self._key = key
        self._timeout_s = timeout_s
        self._kept: _Connection | None = None
        self._connecting = asyncio.Lock()

    async def read(self, group: str) -> Known | Unreachable:
        """See ``Arbiter``."""
        answer = await self._ask(Read(group))
        if isinstance(answer, Unreachable):
            return answer
        return Known(answer.current) if answer.kind == "known" else self._odd(answer)

    async def propose(self, group: str, old: Record, new: Record) -> Granted | Refused | Unreachable:
        """See ``Arbiter``."""
        return self._of_change(await self._ask(Propose(group, old, new)))

    async def seed(self, group: str, record: Record) -> Granted | Refused | Unreachable:
        """See ``Arbiter``."""
        return self._of_change(await self._ask(Seed(group, record)))

    async def force(self, group: str, record: Record, note: str) -> Granted | Refused | Unreachable:
        """See ``Arbiter``."""
        return self._of_change(await self._ask(Force(group, record, note)))

    async def close(self) -> None:
        """See ``Arbiter``."""
        if self._kept:
            await self._kept.close()
            self._kept = None

    def _of_change(self, answer: Answer | Unreachable) -> Granted | Refused | Unreachable:
        if isinstance(answer, Unreachable):
            return answer
        if answer.kind == "granted":
            return Granted()
        return Refused(answer.current) if answer.kind == "refused" else self._odd(answer)

    def _odd(self, answer: Answer) -> Unreachable:
        why = answer.why.rstrip(".") if answer.kind == "error" else f"it answered {answer.kind!r}"
        return self._unreachable(why, asked=True)

    def _unreachable(self, why: str, *, asked: bool) -> Unreachable:
        return Unreachable(f"the witness at {self._address} cannot be asked: {why}", asked)

    async def _ask(self, request: Request) -> Answer | Unreachable:
        asked = False
        try:
            async with asyncio.timeout(self._timeout_s):
                if kept := self._usable():
                    asked = True
                    if answer := await self._ask_kept(kept, request):
                        return answer
                connection = await self._connect()
                asked = True
                return await connection.ask(request)
        except TimeoutError:
            await self._give_up()
            return self._unreachable(f"no answer in {self._timeout_s:g} s", asked=asked)
        except ProtocolError as error:
            return self._unreachable(f"it sent {error}", asked=asked)
        except OSError as error:
            return self._unreachable(reason(error), asked=asked)

    async def _ask_kept(self, kept: _Connection, request: Request) -> Answer | None:
        """None: it has broken, or is silent, as when the other machine has lost its power and is back."""
        try:
            async with asyncio.timeout(self._timeout_s / 2):
                return await kept.ask(request)
        except TimeoutError:
            await kept.close()
        except OSError:
            pass
        return None

    def _usable(self) -> _Connection | None:
        return self._kept if self._kept and self._kept.usable else None

    async def _give_up(self) -> None:
        """Nothing in flight is worth keeping: the next call begins with a new connection."""
        if kept := self._usable():
            await kept.close()

    async def _connect(self) -> _Connection:
        """Raises OSError and ProtocolError; nothing has been asked then."""
        async with self._connecting:
            if kept := self._usable():  # another call was faster
                return kept
            reader, writer = await asyncio.open_connection(self._address.host, self._address.port, limit=LINE_BYTES_MAX)
            try:
                seal = await self._shake_hands(reader, writer)
            except BaseException:
                writer.transport.abort()
                raise
            self._kept = _Connection(reader, writer, seal)
            return self._kept

    async def _shake_hands(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Seal:
        hello = ClientHello(self._cluster, self._me, secrets.token_bytes(NONCE_BYTES)).encode()
        writer.write(hello)
        line = await _some_line(reader)
        _raise_if_refused(line)
        seal = Seal(self._key, hello, line, CLIENT)
        writer.write(seal.seal(encode_request(Open())))
        line = await _some_line(reader)
        try:
            answer = decode_answer(seal.open(line))
        except ProtocolError:
            _raise_if_refused(line)
            raise
        if answer.kind != "welcome":
            raise ProtocolError(f"{answer.kind!r} as a welcome")
        return seal


def _raise_if_refused(line: bytes) -> None:
    reply = decode_reply(line)
    if isinstance(reply, Refusal):
        raise ConnectionRefusedError(reply.sentence.rstrip("."))


async def _some_line(reader: asyncio.StreamReader) -> bytes:
    if line := await read_line(reader):
        return line
    raise ConnectionResetError("it closed the connection")

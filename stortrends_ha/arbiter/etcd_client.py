"""Asks an etcd (v3): one key for each group, changed by compare-and-set transactions.

Job: ``/stortrends-ha/CLUSTER/GROUP`` holds the record as canonical JSON; the operator's override leaves its trace in
``/stortrends-ha/CLUSTER/GROUP/override``. Spoken is etcd's JSON gateway (/v3/kv/...), which every member serves.
Invariants: reads are linearizable (etcd's default), so a member that is cut off cannot answer; every change is one
transaction that compares the whole value, whose epoch only grows: carried out twice it changes nothing the second
time. So a request may be sent to another member when one does not answer, whatever became of the first.
Bounds: a call takes `timeout_s` in all, shared between the members that are tried, the one that answered last first;
an answer is at most `ANSWER_BYTES_MAX`. One connection for each request, as requests are rare: nothing to go stale.
"""

import asyncio
import base64
import http.client
import io
import json
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

from stortrends_ha.arbiter.interface import Granted, Known, Refused, Unreachable
from stortrends_ha.arbiter.streams import reason
from stortrends_ha.record import Record

TIMEOUT_S = 1.5
ANSWER_BYTES_MAX = 256 * 1024
# With two members that are dark, a third still has its turn.
MEMBERS_TRIED = 3

Json = dict[str, Any]


class _NoAnswerError(Exception):
    """A member did not give an answer that can be used; ``asked``: it may have carried out the request."""

    def __init__(self, why: str, *, asked: bool) -> None:
        super().__init__(why)
        self.asked = asked


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a member listens for its clients."""

    url: str
    host: str
    port: int
    tls: bool

    @staticmethod
    def parse(url: str) -> "Endpoint":
        """From a URL such as http://192.0.2.31:2379. Raises ValueError."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(url)
        return Endpoint(url, parts.hostname, parts.port or 2379, parts.scheme == "https")


class EtcdArbiter:
    """An etcd with these endpoints, as a node of a cluster asks it."""

    def __init__(self, endpoints: Sequence[str], cluster: str, me: str, timeout_s: float = TIMEOUT_S) -> None:
        self._endpoints = [Endpoint.parse(url) for url in endpoints]
        self._cluster = cluster
        self._me = me
        self._timeout_s = timeout_s
        self._tls = ssl.create_default_context()  # trusts whom the system trusts; read here, as it is in files

    async def read(self, group: str) -> Known | Unreachable:
        """See ``Arbiter``."""
        answer = await self._ask("range", {"key": _text(self._key(group))})
        if isinstance(answer, Unreachable):
            return answer
        try:
            return Known(_record(answer))
        except ValueError as error:
            return self._unreachable(f"{self._key(group)} holds something else than a record: {error}", asked=True)

    async def propose(self, group: str, old: Record, new: Record) -> Granted | Refused | Unreachable:
        """See ``Arbiter``."""
        unchanged = {"target": "VALUE", "result": "EQUAL", "value": _text(_canonical(old))}
        answer = await self._change(group, unchanged, new)
        if isinstance(answer, Refused) and answer.current == old:  # the same record in other bytes
            return self._unreachable(f"{self._key(group)} was written by hand; write {_canonical(old)}", asked=False)
        return answer

    async def seed(self, group: str, record: Record) -> Granted | Refused | Unreachable:
        """See ``Arbiter``."""
        return await self._change(group, {"target": "CREATE", "result": "EQUAL", "create_revision": "0"}, record)

    async def force(self, group: str, record: Record, note: str) -> Granted | Refused | Unreachable:
        """See ``Arbiter``."""
        known = await self.read(group)
        if isinstance(known, Unreachable):
            return Unreachable(known.why, asked=False)
        current = known.current
        if current == record:
            return Granted()
        if current is None:
            same: Json = {"target": "CREATE", "result": "EQUAL", "create_revision": "0"}
        elif record.epoch <= current.epoch:
            return Refused(current)
        else:
            same = {"target": "VALUE", "result": "EQUAL", "value": _text(_canonical(current))}
        trace = json.dumps({"record": record.encode(), "replaced": current and current.encode(), "who": self._me,
                            "note": note})  # fmt: skip
        return await self._change(group, same, record, {f"{self._key(group)}/override": trace})

    async def close(self) -> None:
        """See ``Arbiter``; nothing is kept open."""

    def _key(self, group: str) -> str:
        return f"/stortrends-ha/{self._cluster}/{group}"

    async def _change(
        self, group: str, condition: Json, new: Record, others: dict[str, str] | None = None
    ) -> Granted | Refused | Unreachable:
        """Set the record on a condition of its key, and other keys with it."""
        key = self._key(group)
        puts = {key: _canonical(new), **(others or {})}
        transaction = {
            "compare": [{**condition, "key": _text(key)}],
            "success": [{"request_put": {"key": _text(at), "value": _text(value)}} for at, value in puts.items()],
            "failure": [{"request_range": {"key": _text(key)}}],
        }
        answer = await self._ask("txn", transaction)
        if isinstance(answer, Unreachable):
            return answer
        try:
            return Granted() if answer.get("succeeded") is True else _not_set(answer, new)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            return self._unreachable(f"{key} holds something else than a record: {error}", asked=True)

    # --- Members ---

    async def _ask(self, method: str, body: Json) -> Json | Unreachable:
        """The answer of the first member that gives one."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._timeout_s
        asked, whys = False, []
        members = self._endpoints[:MEMBERS_TRIED]
        for tried, endpoint in enumerate(members):
            share_s = (deadline_s - loop.time()) / (len(members) - tried)
            try:
                answer = await _post(endpoint, self._tls, f"/v3/kv/{method}", body, share_s)
            except _NoAnswerError as error:
                asked = asked or error.asked
                whys.append(f"{endpoint.url}: {error}")
                self._last(endpoint)
                continue
            return answer
        return self._unreachable("; ".join(whys), asked=asked)

    def _last(self, endpoint: Endpoint) -> None:
        """Ask this one after all others from now on, so that the first is one that is not known to fail."""
        self._endpoints.remove(endpoint)
        self._endpoints.append(endpoint)

    def _unreachable(self, why: str, *, asked: bool) -> Unreachable:
        return Unreachable(f"etcd cannot be asked: {why}", asked)


def _not_set(answer: Json, new: Record) -> Granted | Refused | Unreachable:
    """The condition did not hold; asked twice, what has been granted is granted again."""
    current = _record(answer["responses"][0]["response_range"])
    return Granted() if current == new else Refused(current)


def _record(found: Json) -> Record | None:
    """The record in the answer to a range of one key. Raises ValueError."""
    try:
        entries = found.get("kvs", [])
        return Record.decode(json.loads(base64.b64decode(entries[0]["value"]))) if entries else None
    except (LookupError, TypeError, RecursionError) as error:
        raise ValueError(error) from None


def _canonical(record: Record) -> str:
    return json.dumps(record.encode(), separators=(",", ":"), sort_keys=True)


def _text(text: str) -> str:
    """As the gateway wants bytes."""
    return base64.b64encode(text.encode()).decode()


# --- HTTP ---------------------------------------------------------------------------------------


async def _post(endpoint: Endpoint, tls: ssl.SSLContext, path: str, body: Json, timeout_s: float) -> Json:
    """The JSON object with which a member answers 200. Raises _NoAnswerError."""
    asked = False
    writer = None
    try:
        async with asyncio.timeout(timeout_s):
            encryption = tls if endpoint.tls else None
            reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port, ssl=encryption)
            asked = True
            writer.write(_request(endpoint, path, body))
            return _answer(await _all(reader))
    except TimeoutError:
        raise _NoAnswerError(f"no answer in {max(timeout_s, 0):.1f} s", asked=asked) from None
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
        raise _NoAnswerError(reason(error), asked=asked) from None
    finally:
        if writer:
            writer.transport.abort()


def _request(endpoint: Endpoint, path: str, body: Json) -> bytes:
    content = json.dumps(body, separators=(",", ":")).encode()
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}:{endpoint.port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + content


async def _all(reader: asyncio.StreamReader) -> bytes:
    """Everything until the end of the connection, which follows the answer."""
    received = bytearray()
    while piece := await reader.read(64 * 1024):
        received += piece
        if len(received) > ANSWER_BYTES_MAX:
            raise ValueError(f"an answer of more than {ANSWER_BYTES_MAX} bytes")
    return bytes(received)


class _Received:
    """What http.client needs of a socket to read an answer that is all there."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def makefile(self, *_: object) -> io.BytesIO:
        return io.BytesIO(self._content)


def _answer(received: bytes) -> Json:
    response = http.client.HTTPResponse(cast(socket.socket, _Received(received)), method="POST")
    response.begin()
    content = response.read()
    if response.status != http.client.OK:
        raise ValueError(f"it answers {response.status} {response.reason}: {_message(content)}")
    answer = json.loads(content)
    if not isinstance(answer, dict):
        raise ValueError("it answers with no JSON object")
    return answer


def _message(content: bytes) -> str:
    """The clause in an answer of etcd that says what is wrong."""
    try:
        said = json.loads(content)
        text = str(said.get("message") or said.get("error"))
    except (ValueError, AttributeError, RecursionError):
        text = content[:200].decode(errors="replace")
    return text[:200] if text.isprintable() else repr(text[:200])

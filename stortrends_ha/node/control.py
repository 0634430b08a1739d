"""The control socket: a Unix socket on which the command line asks the node.

One JSON object a line: ``{"command": "status"}`` is answered with ``{"ok": true, "status": {...}}``, anything
that cannot be answered with ``{"ok": false, "error": "a sentence"}``. Other keys of a request are the command's.
Invariants: only the node's own user can connect (mode 0600 from the moment the socket exists); lines,
connections and idle time are bounded; after garbage the connection is closed. A socket left over by a killed
node is replaced, which is safe because the node holds its state directory's lock by then.
"""

import asyncio
import contextlib
import inspect
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from stortrends_ha.errors import ProtocolError, StartError, StorTrendsError
from stortrends_ha.unix_path import address_of

log = logging.getLogger(__name__)

LINE_BYTES_MAX = 64 * 1024
CONNECTIONS_MAX = 32
IDLE_S_MAX = 60.0

Commands = Mapping[str, Callable[[dict[str, Any]], Any]]


@contextlib.asynccontextmanager
async def serve(path: Path, commands: Commands) -> AsyncIterator[None]:
    """Answer commands at `path`: each is a function (or coroutine function) of the request, whose result is sent under
    the command's name; a `StorTrendsError` that it raises is a refusal."""
    connections: set[asyncio.StreamWriter] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(writer)
        try:
            await _talk(reader, writer, commands, crowded=len(connections) > CONNECTIONS_MAX)
        except (ConnectionError, TimeoutError):
            pass  # it went away or fell silent; nothing depends on it
        finally:
            connections.discard(writer)
            writer.close()

    server = await asyncio.start_unix_server(handle, sock=_listening_socket(path), limit=LINE_BYTES_MAX)
    try:
        yield
    finally:
        server.close()
        for writer in connections:
            writer.close()
        path.unlink(missing_ok=True)


def _listening_socket(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), 0o600)  # the file gets this mode when it is made
        path.unlink(missing_ok=True)
        with address_of(path) as address:
            listener.bind(address)
    except OSError as error:
        listener.close()
        raise StartError(f"The control socket {path} cannot be made: {error.strerror or error}.") from error
    return listener


async def _talk(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, commands: Commands, *, crowded: bool
) -> None:
    if crowded:
        await _answer(writer, _refusal(f"The node has {CONNECTIONS_MAX} control connections already; try again later."))
        return
    try:
        while request := await asyncio.wait_for(_request(reader), IDLE_S_MAX):
            await _answer(writer, await _result(request, commands))
    except ProtocolError as error:
        await _answer(writer, _refusal(str(error)))


async def _request(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next request, or None at the end."""
    try:
        line = await reader.readline()
        if not line:
            return None
        request = json.loads(line)
    except (ValueError, RecursionError) as error:  # asyncio says "line too long" by ValueError, too
        raise ProtocolError(f"A request is one JSON object on a line of at most {LINE_BYTES_MAX} bytes.") from error
    if not isinstance(request, dict) or not isinstance(request.get("command"), str):
        raise ProtocolError('A request is a JSON object with a command, such as {"command": "status"}.')
    return request


async def _result(request: dict[str, Any], commands: Commands) -> dict[str, Any]:
    command = request["command"]
    if command not in commands:
        return _refusal(f"There is no command {command[:40]!r}; the commands are: {', '.join(commands)}.")
    try:
        result = commands[command](request)
        return {"ok": True, command: await result if inspect.isawaitable(result) else result}
    except StorTrendsError as error:
        return _refusal(str(error))


def _refusal(sentence: str) -> dict[str, Any]:
    return {"ok": False, "error": sentence}


async def _answer(writer: asyncio.StreamWriter, answer: dict[str, Any]) -> None:
    writer.write(json.dumps(answer).encode() + b"\n")
    await asyncio.wait_for(writer.drain(), IDLE_S_MAX)

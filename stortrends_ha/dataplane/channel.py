"""The socket to the supervisor: one JSON object a line, both ways.

Bounds: a status message a second and one a change; of the supervisor's lines, those that wait for the one before.
The end of the channel is the end of the supervisor, and of this process, at once: it must not serve on.
"""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

from .commands import Command, parse


class Channel:
    """This process's end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, fd: int) -> "Channel":
        """Begin to use it."""
        return cls(*await asyncio.open_connection(sock=socket.socket(fileno=fd)))

    def send(self, kind: str, **message: Any) -> None:
        """Send one message."""
        self._writer.write(json.dumps({"type": kind, **message}).encode() + b"\n")

    async def flush(self) -> None:
        """Until all has been sent, or nobody reads any more."""
        try:
            await self._writer.drain()
            self._writer.close()
            await self._writer.wait_closed()
        except ConnectionError:
            pass

    async def commands(self) -> AsyncIterator[Command]:
        """What the supervisor says. Raises ProtocolError."""
        with contextlib.suppress(ConnectionError):  # it was killed before it had read all that it was told
            while line := await self._reader.readline():
                yield parse(line)
        os._exit(1)

"""One run of a data process: spawn it, read its messages, ask it to stop, see it end.

Invariants: the child inherits its own end of the channel and the node's lock, and no other descriptor, so
the end of a channel always means the end of its own data process. It is spawned by a thread, as a disk that hangs may
keep the interpreter from being read (rule 14); one that lives as long as this process, because the parent-death signal
follows the thread. However a run goes, `ended` returns and nothing is left behind, but for a process that was given up.
Neighbours: `children` decides what happens next; `messages` says what may be said.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor
from typing import Any, Self

from stortrends_ha.errors import ProtocolError, StartError
from stortrends_ha.node.messages import MESSAGE_BYTES_MAX, STOP_LINE, Message, parse

# Time for what a process said last to be read after its end, should something else hold its channel open.
LAST_WORDS_S = 1.0


class DataProcess:
    """A data process that has been started."""

    def __init__(
        self, popen: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._popen = popen
        self._reader = reader
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._pidfd = os.pidfd_open(popen.pid)
        self._loop.add_reader(self._pidfd, self._on_end)

    @classmethod
    async def spawn(cls, command: Sequence[str], lock_fd: int, spawner: Executor) -> Self:
        """Start `command` with its end of a channel, by the thread of ``spawner``; raises `StartError`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            reader, writer = await asyncio.open_unix_connection(sock=ours, limit=MESSAGE_BYTES_MAX)
            channel = ["--channel", str(theirs.fileno()), "--parent", str(os.getpid())]

            def start() -> subprocess.Popen[bytes]:
                fds = (theirs.fileno(), lock_fd)
                return subprocess.Popen([*command, *channel], stdin=subprocess.DEVNULL, pass_fds=fds)

            try:
                popen = await asyncio.get_running_loop().run_in_executor(spawner, start)
            except OSError as error:
                writer.close()
                raise StartError(f"{command[0]} cannot be started: {error.strerror}") from error
        return cls(popen, reader, writer)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._popen.pid

    async def messages(self) -> AsyncIterator[Message]:
        """What it says until its channel ends; raises `ProtocolError` for anything that is no message."""
        while line := await self._line():
            yield parse(line)

    async def _line(self) -> bytes:
        try:
            return await self._reader.readline()
        except ValueError as error:
            raise ProtocolError(f"it sent a line of more than {MESSAGE_BYTES_MAX} bytes") from error
        except ConnectionError:
            return b""

    def send(self, command: dict[str, Any]) -> None:
        """Send a command."""
        with contextlib.suppress(ConnectionError, RuntimeError):  # it is ending already
            self._writer.write(json.dumps(command).encode() + b"\n")

    def ask_to_stop(self) -> None:
        """Ask for an orderly end."""
        with contextlib.suppress(ConnectionError, RuntimeError):  # it is ending already
            self._writer.write(STOP_LINE)

    def kill(self) -> None:
        """End it at once."""
        self._popen.send_signal(signal.SIGKILL)  # does nothing when it has been waited for

    @property
    def has_ended(self) -> bool:
        """Whether it has, or was given up."""
        return self._ended.done() or self._popen.poll() is not None

    async def ended(self) -> int:
        """Close the channel, wait for the end; the return code."""
        self._writer.close()
        return await asyncio.shield(self._ended)

    def _on_end(self) -> None:
        self._take_for_ended(self._popen.wait())
        self._loop.call_later(LAST_WORDS_S, self._reader.feed_eof)

    def give_up(self) -> None:
        """Wait for it no more, although it was killed: the kernel ends it when its disk answers."""
        self._take_for_ended(-signal.SIGKILL)
        self._reader.feed_eof()

    def _take_for_ended(self, returncode: int) -> None:
        if self._ended.done():
            return
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._ended.set_result(returncode)


def describe_end(returncode: int) -> str:
    """The end of a process in words."""
    if returncode >= 0:
        return f"ended with code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"

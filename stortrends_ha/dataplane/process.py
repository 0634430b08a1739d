"""The data process of one group: starts its role, tells its supervisor how it is, ends with it.

It dies with its supervisor (PR_SET_PDEATHSIG, and the end of the channel), so that a killed node serves nothing.
Bound of the channel: a status message a second, and one line in.
"""

import argparse
import asyncio
import contextlib
import ctypes
import gc
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any, Protocol

import uvloop

from stortrends_ha import logs
from stortrends_ha.config import load
from stortrends_ha.errors import StorTrendsError

from .follower import Follower
from .owner import Owner
from .replica import Replica
from .watch import die, end_with

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_STATUS_S = 1.0
_STATE_CHECK_S = 0.1


class Role(Protocol):
    """What a data process is: ``Owner`` or ``Follower``."""

    async def start(self) -> None:
        """Begin to work."""

    async def stop(self) -> None:
        """End in order."""

    def status(self) -> dict[str, Any]:
        """The status message, without its type."""


class Channel:
    """The socket to the supervisor: one JSON object a line."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.StreamReader | None = None

    async def open(self) -> None:
        """Begin to use it."""
        self._reader, self._writer = await asyncio.open_connection(sock=self._sock)

    async def send(self, kind: str, **message: Any) -> None:
        """Send one message."""
        assert self._writer is not None
        self._writer.write(json.dumps({"type": kind, **message}).encode() + b"\n")
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def wait_for_stop(self) -> None:
        """Until the supervisor says stop. If it is gone, this process ends at once."""
        assert self._reader is not None
        while line := await self._reader.readline():
            if json.loads(line).get("type") == "stop":
                return
        os._exit(1)


def main() -> int:
    """Run a data process until its supervisor ends it."""
    parser = argparse.ArgumentParser(prog="stortrends_ha.dataplane", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--node", required=True)
    parser.add_argument("--group", required=True)
    parser.add_argument("--channel", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    args = parser.parse_args()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != args.parent:  # it ended before it could take us along
        return 1
    # The supervisor decides when to stop; a Ctrl-C in a terminal reaches it, too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logs.configure()
    # The hot path makes many short-lived objects and no cycles: what is there now need never be looked at again, and
    # the collector for cycles, which would stop all clients while it looks at everything, runs rarely.
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    return uvloop.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    asyncio.get_running_loop().set_exception_handler(die)
    channel = Channel(socket.socket(fileno=args.channel))
    await channel.open()
    try:
        cluster = load(args.config)
        replica = Replica(cluster, cluster.groups[args.group], args.node)
        role: Role = Owner(replica) if replica.is_owner else Follower(replica)
        await role.start()
        await channel.send("ready")
        reporter = end_with(asyncio.create_task(_report(channel, role)))
        await channel.wait_for_stop()
        reporter.cancel()
        await role.stop()
    except StorTrendsError as e:
        await channel.send("failed", message=str(e))
        return 1
    return 0


async def _report(channel: Channel, role: Role) -> None:
    """Send the status once per second, and at once when the state changes."""
    told: tuple[Any, ...] = ()
    until_next_s = 0.0
    while True:
        status = role.status()
        key = (status["state"], status["why"], status["link"]["state"], status["clients"])
        if key != told or until_next_s <= 0:
            await channel.send("status", **status)
            told, until_next_s = key, _STATUS_S
        await asyncio.sleep(_STATE_CHECK_S)
        until_next_s -= _STATE_CHECK_S

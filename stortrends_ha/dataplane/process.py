"""The data process of one group: opens its volumes, does what its supervisor says, tells how it is, ends with it.

It starts without a role. It dies with its supervisor (PR_SET_PDEATHSIG, and the end of the channel), so that a killed
node serves nothing. Neighbours: ``commands`` (what may be said), ``roles`` (doing it), ``report`` (the status).
"""

import argparse
import asyncio
import ctypes
import gc
import logging
import os
import signal
from functools import partial
from pathlib import Path

import uvloop

from stortrends_ha import logs
from stortrends_ha.config import load
from stortrends_ha.errors import StorTrendsError

from .channel import Channel
from .commands import Drop, EndVerify, Lease, Order, Stop, Verify
from .replica import Replica
from .report import Reporter
from .roles import Roles
from .watch import die, end_with

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


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
    channel = await Channel.open(args.channel)
    try:
        cluster = load(args.config)
        replica = Replica(cluster, cluster.groups[args.group], args.node)
        await _serve(channel, replica)
    except StorTrendsError as e:
        channel.send("failed", message=str(e))
        await channel.flush()
        return 1
    if replica.failure:
        logging.shutdown()
        os._exit(0)  # without waiting for threads whose disk hangs
    return 0


async def _serve(channel: Channel, replica: Replica) -> None:
    """Until the supervisor says stop. Raises StorTrendsError."""
    roles = Roles(replica, lambda: reporter.changed())
    reporter = Reporter(roles.status, roles.told, lambda status: channel.send("status", **status))
    channel.send("ready")
    orders: asyncio.Queue[Order] = asyncio.Queue()
    worker = end_with(asyncio.create_task(_carry_out(channel, roles, reporter, orders)))
    async for command in channel.commands():
        match command:
            case Stop():
                break
            case Lease() | Drop():
                roles.at_once(command)
            case Verify() | EndVerify():
                roles.verify(command, partial(_answer, channel, reporter, command.number))
            case order:
                orders.put_nowait(order)
    worker.cancel()
    reporter.stop()
    await roles.stop()


def _answer(channel: Channel, reporter: Reporter, number: int, error: str) -> None:
    """The status that something leads to is told before it is done."""
    reporter.now()
    channel.send("done", id=number, error=error)


async def _carry_out(channel: Channel, roles: Roles, reporter: Reporter, orders: "asyncio.Queue[Order]") -> None:
    """One order after the other."""
    while True:
        order = await orders.get()
        error = ""
        try:
            await roles.carry_out(order)
        except StorTrendsError as e:
            error = str(e)
        _answer(channel, reporter, order.number, error)

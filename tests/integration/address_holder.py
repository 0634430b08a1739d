"""A process that holds floating addresses as a supervisor does, told what to do on its standard input.

Its argument is a JSON object: group to a list of [address, interface]. Each line it reads is a JSON object with the
command in "do"; it answers each with a line: the problem that there is with the group.
"""

import asyncio
import ipaddress
import json
import logging
import sys
import time
from typing import Any

import uvloop

from stortrends_ha.network.floating import FloatingAddress
from stortrends_ha.network.network import Network


class Holder:
    def __init__(self, groups: dict[str, list[list[str]]]) -> None:
        placed = {
            group: tuple(FloatingAddress(ipaddress.ip_interface(address), interface) for address, interface in found)
            for group, found in groups.items()
        }
        self._lease_until_s = float("inf")
        self._network = Network(placed, lambda _group: time.monotonic() < self._lease_until_s)

    async def run(self) -> None:
        await self._network.start()
        self._answer("")
        while line := await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline):
            self._answer(await self._carry_out(json.loads(line)))
        await self._network.stop()

    def _answer(self, problem: str) -> None:
        print(json.dumps(problem), flush=True)

    async def _carry_out(self, command: dict[str, Any]) -> str:
        group = command["group"]
        match command["do"]:
            case "claim":
                await self._network.claim(group, command["endpoints"])
            case "release":
                await self._network.release(group)
            case "lease":
                self._lease_until_s = time.monotonic() + command["seconds"]
            case "hang":
                time.sleep(command["seconds"])
        return self._network.problem(group)


logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
uvloop.run(Holder(json.loads(sys.argv[1])).run())

"""What the supervisor keeps durably: each group's newest record, their history and its clients; whether it is drained.

    state_dir/records/GROUP.json     the record by which this node acts; written before it does (rule 3's "persists")
    state_dir/records/GROUP.history  one line for each record that was saved, the newest last; for people
    state_dir/records/GROUP.clients  the TCP connections of its clients to whoever owns it, as they were a moment ago
    state_dir/drained                is there while the operator wants nothing to be owned here

Invariants: ``save`` returns when the record is on stable storage; a death anywhere in it leaves the old or the new one
whole. A record that cannot be understood stops the node: to guess would be to forget who owns. Clients can be.
Bound: a history of HISTORY_BYTES, then it starts anew, keeping the last one as ``.1``.
"""

import asyncio
import json
import os
import time
from collections.abc import Container, Sequence
from pathlib import Path

import aiofiles
import aiofiles.os

from stortrends_ha.cluster.view import Saved
from stortrends_ha.durable import sync_directory
from stortrends_ha.errors import StartError, StorageError
from stortrends_ha.record import Record

HISTORY_BYTES = 1 << 20

Endpoint = tuple[str, int, str, int]
"""A TCP connection: the client's host and port, the server's host and port."""


class Records:
    """The saved records of one node."""

    def __init__(self, state_dir: Path) -> None:
        self._directory = state_dir / "records"
        self._drained = state_dir / "drained"

    def load(self, group: str, preferred_owner: str, nodes: Container[str]) -> Saved:
        """What was saved; at the very first start the preferred owner is alone in sync. ``nodes``: those that there
        are. Raises StartError."""
        path = self._directory / f"{group}.json"
        try:
            value = json.loads(path.read_text())
            record = Record.decode(value["record"])
            if strange := [node for node in record.in_sync if node not in nodes]:
                raise ValueError(f"the cluster file has no node {' and no node '.join(strange)}: was one renamed?")
            return Saved(record, int(value["alone_since"]))
        except FileNotFoundError:
            return Saved(Record(1, preferred_owner, (preferred_owner,)), 0)
        except OSError as error:
            raise StartError(f"The record of group {group} cannot be read, {path}: {error.strerror}.") from None
        except (ValueError, LookupError, TypeError) as error:
            raise StartError(
                f"The record of group {group}, {path}, is damaged ({error}): restore the file. If that cannot be done, "
                "remove it while the peer is running and serves the group: this node then learns the record from it."
            ) from None

    async def save(self, group: str, saved: Saved) -> None:
        """Make it durable. Raises StorageError."""
        text = json.dumps({"record": saved.record.encode(), "alone_since": saved.alone_since}) + "\n"
        path = self._directory / f"{group}.json"
        try:
            await aiofiles.os.makedirs(self._directory, exist_ok=True)
            await replace_file(path, text)
            await self._note(group, saved)
        except OSError as error:
            raise StorageError(f"the record of group {group} cannot be written, {path}: {error.strerror}") from None

    async def _note(self, group: str, saved: Saved) -> None:
        path = self._directory / f"{group}.history"
        if await aiofiles.os.path.exists(path) and await aiofiles.os.path.getsize(path) > HISTORY_BYTES:
            await aiofiles.os.replace(path, path.with_suffix(".history.1"))
        async with aiofiles.open(path, "a") as file:
            because = f", because {saved.why}" if saved.why else ""
            await file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {saved.record}{because}\n")

    def clients(self, group: str) -> list[Endpoint]:
        """Those that were kept last; none if that cannot be read."""
        try:
            value = json.loads((self._directory / f"{group}.clients").read_text())
            return [(str(host), int(port), str(own), int(own_port)) for host, port, own, own_port in value]
        except (OSError, ValueError, TypeError):
            return []

    async def keep_clients(self, group: str, endpoints: Sequence[Endpoint]) -> None:
        """Remember them over restarts. Raises StorageError."""
        path = self._directory / f"{group}.clients"
        try:
            await aiofiles.os.makedirs(self._directory, exist_ok=True)
            await replace_file(path, json.dumps(endpoints) + "\n")
        except OSError as error:
            raise StorageError(f"the clients of group {group} cannot be kept, {path}: {error.strerror}") from None

    @property
    def drained(self) -> bool:
        """Whether nothing shall be owned here; waits for the disk."""
        return self._drained.exists()

    async def drain(self, drained: bool) -> None:
        """Remember it over restarts. Raises StorageError."""
        try:
            if drained:
                await replace_file(self._drained, "")
            elif await aiofiles.os.path.exists(self._drained):
                await aiofiles.os.remove(self._drained)
                await asyncio.to_thread(sync_directory, self._drained.parent)
        except OSError as error:
            raise StorageError(f"{self._drained} cannot be written: {error.strerror}") from None


async def replace_file(path: Path, text: str) -> None:
    """Write a file so that it is the old or the new one, whole, whatever happens, and durable. Raises OSError."""
    temporary = path.with_name(f"{path.name}.new")
    async with aiofiles.open(temporary, "w") as file:
        await file.write(text)
        await file.flush()
        await asyncio.to_thread(os.fsync, file.fileno())
    await aiofiles.os.replace(temporary, path)
    await asyncio.to_thread(_sync_directories, path)


def _sync_directories(path: Path) -> None:
    sync_directory(path.parent)
    sync_directory(path.parent.parent)  # it may be the first file in a new directory

"""The control socket against well-behaved and other clients, and the node's lock beside it."""

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from stortrends_ha.cli import client
from stortrends_ha.errors import StartError
from stortrends_ha.node import control, lock

COMMANDS: control.Commands = {"status": lambda _: {"node": "node-a"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


def serving(path: Path, test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        async with control.serve(path, COMMANDS):
            await test()

    uvloop.run(run())


async def talk(path: Path, *lines: bytes) -> tuple[list[dict[str, Any]], bool]:
    """Send the lines; the answers, and whether the node closed the connection after them."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    answers = []
    for line in lines:
        writer.write(line)
        answers.append(json.loads(await asyncio.wait_for(reader.readline(), 10)))
    writer.write(b'{"command": "status"}\n')
    closed = await asyncio.wait_for(_ends(reader), 10)
    writer.close()
    return answers, closed


async def _ends(reader: asyncio.StreamReader) -> bool:
    try:
        return not await reader.readline()
    except ConnectionError:
        return True


def test_the_status_is_answered_as_often_as_it_is_asked(path: Path) -> None:
    async def test() -> None:
        request = b'{"command": "status"}\n'
        assert await talk(path, request, request) == ([{"ok": True, "status": {"node": "node-a"}}] * 2, False)

    serving(path, test)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\xff\n",
        b"status\n",
        b"[]\n",
        b"{}\n",
        b'{"command": 1}\n',
        b"x" * 70_000 + b"\n",
        b"[" * 60_000 + b"\n",
    ],
    ids=["bytes", "word", "list", "empty", "number", "too long", "too deep"],
)
def test_garbage_is_answered_with_an_error_and_closed(path: Path, garbage: bytes) -> None:
    async def test() -> None:
        (answer,), closed = await talk(path, garbage)
        assert answer["ok"] is False
        assert answer["error"].startswith("A request is")
        assert closed

    serving(path, test)


def test_an_unknown_command_is_answered_with_the_known_ones(path: Path) -> None:
    async def test() -> None:
        (answer,), closed = await talk(path, b'{"command": "explode"}\n')
        assert answer == {"ok": False, "error": "There is no command 'explode'; the commands are: status."}
        assert not closed

    serving(path, test)


def test_connections_beyond_the_limit_are_refused_and_the_others_are_served(path: Path) -> None:
    async def test() -> None:
        held = [await asyncio.open_unix_connection(str(path)) for _ in range(control.CONNECTIONS_MAX)]
        for reader, writer in held:  # an answer shows that the node has taken the connection
            writer.write(b'{"command": "status"}\n')
            await reader.readline()
        reader, writer = await asyncio.open_unix_connection(str(path))
        assert "try again later" in json.loads(await reader.readline())["error"]
        writer.close()
        held[0][1].write(b'{"command": "status"}\n')
        assert json.loads(await held[0][0].readline())["ok"] is True
        for _, writer in held:
            writer.close()

    serving(path, test)


def test_only_the_nodes_own_user_may_connect_and_the_socket_goes_with_the_node(path: Path) -> None:
    async def test() -> None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    serving(path, test)
    assert not path.exists()


def test_a_socket_left_over_by_a_killed_node_is_replaced(path: Path) -> None:
    left_over = socket.socket(socket.AF_UNIX)
    left_over.bind(str(path))
    left_over.close()

    async def test() -> None:
        assert (await asyncio.to_thread(client.status, path)) == {"node": "node-a"}

    serving(path, test)


def test_the_client_says_why_a_node_does_not_answer(path: Path) -> None:
    with pytest.raises(client.NoAnswer, match="it is not running"):
        client.status(path)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        with pytest.raises(client.NoAnswer, match=r"it did not answer within 0\.1 s"):
            client.status(path, timeout_s=0.1)
    with pytest.raises(client.NoAnswer, match="it is not running"):
        client.status(path)


@pytest.mark.parametrize("answer", [b"", b"hello\n", b"[]\n", b'{"ok": true}\n', b'{"status": 1}\n'])
def test_the_client_takes_no_other_answer_for_a_status(path: Path, answer: bytes) -> None:
    async def test() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write(answer)
            writer.close()

        async with await asyncio.start_unix_server(handle, str(path)):
            with pytest.raises(client.NoAnswer):
                await asyncio.to_thread(client.status, path)

    uvloop.run(test())


def test_a_second_node_on_the_same_state_is_refused_and_told_the_pid_of_the_first(tmp_path: Path) -> None:
    async def test() -> None:
        async with lock.hold(tmp_path):
            with pytest.raises(StartError, match=rf"Another node \(pid {os.getpid()}\) already runs on .*{tmp_path}"):
                async with lock.hold(tmp_path):
                    pytest.fail("it runs twice")
        async with lock.hold(tmp_path):
            assert int((tmp_path / lock.LOCK_FILE).read_text()) == os.getpid()

    uvloop.run(test())


def test_a_node_waits_for_the_data_processes_of_a_killed_one(tmp_path: Path) -> None:
    """The lock is free only when everything that inherited it has ended."""
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()

    async def test() -> None:
        async with lock.hold(tmp_path) as fd:
            data_process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(fd,))
        (tmp_path / lock.LOCK_FILE).write_text(f"{killed.pid}\n")
        taken = asyncio.create_task(_hold_once(tmp_path))
        done, _ = await asyncio.wait({taken}, timeout=3 * lock.RETRY_S)
        assert not done
        data_process.communicate(b"\n")
        await asyncio.wait_for(taken, 5)

    uvloop.run(test())


async def _hold_once(state_dir: Path) -> None:
    async with lock.hold(state_dir):
        pass

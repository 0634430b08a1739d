"""How sockets are made, and what becomes of a data process in which something escapes."""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from stortrends_ha.dataplane.sockets import set_up, tcp_listener, unix_listener
from stortrends_ha.errors import StartError


def test_tcp_sockets_do_not_delay() -> None:
    with tcp_listener("127.0.0.1", 0, "a test") as listener, socket.create_connection(listener.getsockname()) as client:
        listener.setblocking(True)
        accepted, _ = listener.accept()
        with accepted:
            set_up(accepted)
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert not accepted.getblocking()
            client.sendall(b"x")


def test_address_in_use_is_named() -> None:
    with tcp_listener("127.0.0.1", 0, "a test") as first:
        port = first.getsockname()[1]
        with pytest.raises(StartError, match=f"127.0.0.1:{port} for the link: Address already in use"):
            tcp_listener("127.0.0.1", port, "the link")


def test_unix_socket_is_for_its_user_and_group(tmp_path: Path) -> None:
    path = tmp_path / "made" / "nbd.sock"
    with unix_listener(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660


def test_unix_socket_that_nobody_serves_is_replaced_and_one_in_use_is_not(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with unix_listener(path), pytest.raises(StartError, match=r"nbd\.sock"):
        unix_listener(path)
    with unix_listener(path):
        pass


BUG = """
import asyncio, sys
from stortrends_ha.dataplane.watch import die, end_with

def bug():
    raise ValueError("a mistake of ours")

async def failing():
    bug()

async def main():
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(die)
    if sys.argv[1] == "callback":
        loop.call_soon(bug)
    else:
        task = end_with(asyncio.create_task(failing()))
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("where", ["callback", "task"])
def test_what_escapes_a_callback_or_a_task_ends_the_process(where: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", BUG, where],
        capture_output=True, text=True, timeout=30, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert ended.returncode == 1
    assert "a mistake of ours" in ended.stderr

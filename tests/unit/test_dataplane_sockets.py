"""How sockets are made, and what becomes of a data process in which something escapes."""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from stortrends_ha.dataplane.sockets import set_up, tcp_listener, tcp_obstacle, unix_listener
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


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_whether_it_could_be_listened_on_can_be_asked_without_listening(host: str) -> None:
    with tcp_listener(host, 0, "a test") as first:
        port = first.getsockname()[1]
        with pytest.raises(StartError) as error:
            tcp_listener(host, port, "a test", absent=True)
        assert tcp_obstacle(host, port, "a test") == str(error.value)
    assert tcp_obstacle(host, port, "a test") == ""
    tcp_listener(host, port, "a test", absent=True).close()


def test_every_address_is_in_use_if_one_is_and_the_other_way_round() -> None:
    for used, asked in (("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0")):
        with tcp_listener(used, 0, "a test") as listener:
            assert "Address already in use" in tcp_obstacle(asked, listener.getsockname()[1], "a test")


def test_an_address_that_is_to_come_and_a_name_are_no_obstacle() -> None:
    assert tcp_obstacle("192.0.2.21", 10809, "a test") == tcp_obstacle("2001:db8::21", 10809, "a test") == ""
    assert tcp_obstacle("no-such-host.invalid", 10809, "a test") == ""


def test_clients_that_a_former_owner_has_yet_are_no_obstacle() -> None:
    with tcp_listener("127.0.0.1", 0, "a test") as listener:
        host, port = listener.getsockname()
        with socket.create_connection((host, port)):
            listener.setblocking(True)
            accepted, _ = listener.accept()
            with accepted:
                listener.close()
                assert tcp_obstacle(host, port, "a test") == ""


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

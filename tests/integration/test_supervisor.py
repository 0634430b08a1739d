"""One node as a process: started, signalled, killed, started again; over fake data processes."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stortrends_ha.cli import client
from stortrends_ha.cli.demo_layout import PORTS, Layout
from stortrends_ha.errors import StartError

ROOT = Path(__file__).parents[2]
FAKE_NODE = ROOT / "tests" / "fake_node.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
PATIENCE_S = 60.0


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A demo's directory and ports, below those that the kernel hands out by itself."""
    for base in range(12000 + os.getpid() % 900 * 8, 32000, PORTS):
        made = Layout(tmp_path / "d", base)
        try:
            made.check_ports()
        except StartError:
            continue
        made.prepare()
        return made
    pytest.fail("no free ports")


@contextlib.contextmanager
def process(*command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone afterwards, whatever happens."""
    started = subprocess.Popen(
        command,
        env=ENVIRONMENT | environment,
        cwd="/",
        bufsize=0,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def node(
    layout: Layout, behaviour: str, **environment: str
) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    return process(sys.executable, str(FAKE_NODE), behaviour, str(layout.config), "node-a", **environment)


def eventually(condition: Callable[[], Any]) -> Any:
    """Wait until the condition gives something, and give that."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.01)
    return found


def answers(layout: Layout, name: str = "node-a") -> dict[str, Any] | None:
    with contextlib.suppress(client.NoAnswer):
        return client.status(layout.control(name))
    return None


def reports(layout: Layout, name: str = "node-a") -> dict[str, Any] | None:
    """Its status, once both data processes have said how they are. Without its peer it gives them nothing to do."""
    status = answers(layout, name)
    states = {group["state"] for group in status["groups"].values()} if status else set()
    return status if states and not states & {"starting", "failed"} else None


def data_processes(status: dict[str, Any]) -> list[int]:
    return [group["pid"] for group in status["groups"].values()]


def runs(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def ended(started: subprocess.Popen[bytes]) -> tuple[int, str]:
    """The exit code and what it wrote to stderr."""
    stderr = started.communicate(timeout=PATIENCE_S)[1]
    return started.returncode, stderr.decode()


def test_a_node_tells_when_it_is_ready_and_stops_everything_on_sigterm(layout: Layout, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        with node(layout, "well", NOTIFY_SOCKET=str(tmp_path / "notify")) as started:
            assert manager.recv(100) == b"READY=1"
            status = eventually(lambda: reports(layout))
            assert status["pid"] == started.pid
            started.send_signal(signal.SIGTERM)
            assert manager.recv(100) == b"STOPPING=1"
            code, stderr = ended(started)
    assert code == 0, stderr
    assert "Traceback" not in stderr
    assert not any(map(runs, data_processes(status)))
    assert not layout.control("node-a").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_stops_the_node_cleanly(layout: Layout, number: signal.Signals) -> None:
    with node(layout, "silent") as started:  # its data processes never become ready
        status = eventually(lambda: (found := answers(layout)) and all(data_processes(found)) and found)
        assert {group["state"] for group in status["groups"].values()} == {"starting"}
        started.send_signal(number)
        code, stderr = ended(started)
    assert code == 0, stderr
    assert "Traceback" not in stderr
    assert not any(map(runs, data_processes(status)))


def test_a_data_process_that_cannot_start_is_an_error_in_a_sentence(layout: Layout) -> None:
    with node(layout, "fails") as started:
        code, stderr = ended(started)
    assert code == 1
    assert re.search(r"^Group rg-[ab]: 127\.0\.0\.1:10809 is in use\.$", stderr, re.MULTILINE)
    assert "Traceback" not in stderr


def test_a_second_node_is_refused_and_the_first_goes_on(layout: Layout) -> None:
    with node(layout, "well") as first:
        eventually(lambda: reports(layout))
        with node(layout, "well") as second:
            code, stderr = ended(second)
        assert code == 1
        assert f"Another node (pid {first.pid}) already runs" in stderr
        status = answers(layout)
        assert status is not None
        assert status["pid"] == first.pid


def test_a_killed_data_process_comes_back_and_the_other_group_does_not_notice(layout: Layout) -> None:
    with node(layout, "well"):
        before = eventually(lambda: reports(layout))["groups"]
        os.kill(before["rg-a"]["pid"], signal.SIGKILL)
        after = eventually(lambda: (found := reports(layout)) and found["groups"]["rg-a"]["restarts"] and found)
        assert after["groups"]["rg-a"]["pid"] != before["rg-a"]["pid"]
        assert after["groups"]["rg-b"]["pid"] == before["rg-b"]["pid"]
        assert after["groups"]["rg-b"]["restarts"] == 0


def test_a_killed_node_starts_again_at_once_over_what_it_left_behind(layout: Layout) -> None:
    with node(layout, "well") as started:
        old = data_processes(eventually(lambda: reports(layout)))
        started.kill()
        with node(layout, "well") as again:
            status = eventually(lambda: (found := reports(layout)) and found["pid"] == again.pid and found)
            assert not any(map(runs, old))
            assert not set(old) & set(data_processes(status))


@pytest.mark.parametrize("taken", ["metrics", "control"])
def test_what_the_node_itself_cannot_listen_on_is_named(layout: Layout, taken: str) -> None:
    host, _, port = layout.metrics("node-a").partition(":")
    with contextlib.ExitStack() as stack:
        if taken == "metrics":
            stack.enter_context(socket.create_server((host, int(port))))
            expected = f"The metrics cannot be served at {host}:{port}: Address already in use; "
        else:
            layout.control("node-a").mkdir()
            expected = f"The control socket {layout.control('node-a')} cannot be made: Is a directory."
        code, stderr = ended(stack.enter_context(node(layout, "well")))
    assert code == 1
    assert expected in stderr
    assert "Traceback" not in stderr


# --- The real thing; what else the demo does is in test_demo --------------------------------------


def test_a_demo_node_that_cannot_start_is_shown_with_its_log(layout: Layout) -> None:
    layout.backing("node-b", "vm-a").write_bytes(b"short")
    options = ["--json", "--dir", str(layout.directory), "--port-base", str(layout.port_base)]
    with process(sys.executable, "-m", "stortrends_ha", "demo", *options) as started:
        code, stderr = ended(started)
    assert code == 1
    assert re.search(r"^stortrends-ha: node-b ended with code 1\. Its log .* ends with:$", stderr, re.MULTILINE)
    assert str(layout.backing("node-b", "vm-a")) in stderr
    assert "Traceback" not in stderr

"""Runs a fence agent, as Pacemaker does: options on stdin, the answer in the exit code.

The interface is the one of ClusterLabs' fence-agents (doc/FenceAgentAPI.md there): one ``key=value`` a line on stdin,
``action=off`` exits with 0 when the machine is off, ``action=status`` with 0 when it is on and 2 when it is off.
Invariants: "off" is said only when the agent said it twice, to ``off`` and to ``status``; anything else raises
``FenceError``, whose text holds no option but those that name the device. However it ends, an agent and everything it
has started is dead afterwards (what it started in its process group). Nothing here waits for a disk or a pipe in the
event loop.
Bounds: `timeout_s` for both actions together; `SAID_BYTES` of what an agent says are kept.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping

from stortrends_ha.config import FenceAgent
from stortrends_ha.errors import StorTrendsError

log = logging.getLogger(__name__)

SAID_BYTES = 4096
SAID_CHARACTERS = 300
STATUS_OFF = 2
# Fence agents are installed in sbin, which is not in everybody's PATH.
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Options that may be shown: they name the device and the outlet, and are what one needs to find a mistake.
SHOWN = frozenset({"ip", "ipaddr", "ipport", "port", "plug", "type", "nodename", "status_file"})
HARMLESS = frozenset({"", "0", "1", "on", "off", "yes", "no", "true", "false"})


class FenceError(StorTrendsError):
    """The machine may still be on; the text is a clause that says why."""


async def turn_off(node: str, agent: FenceAgent, timeout_s: float) -> None:
    """Returns when the agent has reported that the machine of `node` is off. Raises FenceError."""
    try:
        async with asyncio.timeout(timeout_s):
            await _turn_off(agent)
    except TimeoutError:
        raise FenceError(f"fencing {node} with {agent.agent} failed: not done in {timeout_s:g} s") from None
    except FenceError as error:
        raise FenceError(f"fencing {node} with {agent.agent} failed: {error}") from None


async def _turn_off(agent: FenceAgent) -> None:
    code, said = await _run(agent, "off")
    if code != 0:
        raise FenceError(f"its action off ended with {_ending(code)}{said}")
    code, said = await _run(agent, "status")
    if code == 0:
        raise FenceError("its action off succeeded, but its action status says that the machine is on")
    if code != STATUS_OFF:
        raise FenceError(f"its action status ended with {_ending(code)}{said}")


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


async def _run(agent: FenceAgent, action: str) -> tuple[int, str]:
    """The exit code, and what the agent said, as the end of a clause. Killed when cancelled."""
    loop = asyncio.get_running_loop()
    # In a thread: starting a program reads it from a disk, which may hang just when we need it.
    starting = loop.run_in_executor(None, _start, agent, action)
    try:
        process = await asyncio.shield(starting)
    except asyncio.CancelledError:
        starting.add_done_callback(_kill_late)
        raise
    except OSError as error:
        raise FenceError(f"it cannot be started: {error.strerror}") from None
    with _hearing(process) as ear:
        try:
            code = await _end_of(process)
        finally:
            _kill(process)
        ear.listen()
        return code, _clause(ear.heard, agent.options)


def _start(agent: FenceAgent, action: str) -> "subprocess.Popen[bytes]":
    path = f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"
    program = shutil.which(agent.agent, path=path)
    if program is None:
        raise FileNotFoundError(2, "no such program; is the package with the fence agents installed?")
    environment = {**os.environ, "PATH": path}
    environment.pop("NOTIFY_SOCKET", None)
    options = os.memfd_create("options")  # neither in a file nor in the list of processes
    try:
        os.write(options, _options({**agent.options, "action": action}))
        os.lseek(options, 0, os.SEEK_SET)
        return subprocess.Popen(
            [program],
            stdin=options,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            cwd="/",
            start_new_session=True,  # a process group, and no terminal to ask for passwords
        )
    finally:
        os.close(options)


def _options(options: Mapping[str, str]) -> bytes:
    for key, value in options.items():
        if "\n" in f"{key}{value}" or "=" in key:
            raise OSError(22, f"the option {key!r} cannot be passed on")
    return "".join(f"{key}={value}\n" for key, value in options.items()).encode()


def _kill_late(starting: "asyncio.Future[subprocess.Popen[bytes]]") -> None:
    """Started when nobody wanted it any more."""
    if not starting.cancelled() and not starting.exception():
        process = starting.result()
        _kill(process)
        assert process.stderr
        process.stderr.close()


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End the group. Its leader has not been waited for, so the number is still its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # One that hangs in a disk dies when the disk lets go of it; nobody else waits for that.
    threading.Thread(target=process.wait, name=f"reap-{process.pid}", daemon=True).start()


async def _end_of(process: "subprocess.Popen[bytes]") -> int:
    """Its exit code when it has ended, whoever still holds its stderr; below 0: a signal. It stays a zombie."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    pidfd = os.pidfd_open(process.pid)
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    result = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert result
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


class _Ear:
    """Keeps the end of what a process says."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self.heard = b""

    def listen(self) -> bool:
        """Take what has been said; whether there may be more later."""
        try:
            while said := os.read(self._fd, SAID_BYTES):
                self.heard = (self.heard + said)[-SAID_BYTES:]
        except BlockingIOError:
            return True
        return False


@contextlib.contextmanager
def _hearing(process: "subprocess.Popen[bytes]") -> Iterator[_Ear]:
    loop = asyncio.get_running_loop()
    assert process.stderr
    fd = process.stderr.fileno()
    ear = _Ear(fd)

    def listen() -> None:
        if not ear.listen():
            loop.remove_reader(fd)

    loop.add_reader(fd, listen)
    try:
        yield ear
    finally:
        loop.remove_reader(fd)
        process.stderr.close()


def _clause(heard: bytes, options: Mapping[str, str]) -> str:
    """The last line that says something, without the options that may be secret."""
    lines = [line.strip() for line in heard.decode(errors="replace").splitlines() if line.strip()]
    if not lines:
        return ""
    text = "".join(character if character.isprintable() else "?" for character in lines[-1])
    secrets = [value for key, value in options.items() if key not in SHOWN and value.lower() not in HARMLESS]
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return f" ({text[-SAID_CHARACTERS:]})"

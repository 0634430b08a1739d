"""How a data process is kept running, with fake ones that are well or go wrong in every way."""

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from stortrends_ha.errors import StartError
from stortrends_ha.node.children import Child, Patience
from stortrends_ha.node.messages import Status
from stortrends_ha.node.process import DataProcess

FAKE = Path(__file__).parent.parent / "fake_data_process.py"
LOCK_FD = os.open("/dev/null", os.O_RDONLY)  # any descriptor will do as the node's lock
PATIENCE = Patience(ready_s=20, stop_s=5, restart_first_s=0.1, restart_last_s=0.5, well_after_s=60)


def make(behaviour: str, group: str = "rg-a", patience: Patience = PATIENCE) -> Child:
    command = [sys.executable, str(FAKE), behaviour, "--config", "none", "--node", "node-a", "--group", group]
    return Child(group, command, LOCK_FD, patience)


@contextlib.asynccontextmanager
async def running(*children: Child) -> AsyncIterator[None]:
    """The children run and have become ready; afterwards they are stopped."""
    runs = [asyncio.create_task(child.run()) for child in children]
    try:
        for child in children:
            await asyncio.wait_for(child.ready.wait(), 20)
        yield
    finally:
        for child in children:
            child.stop()
        await asyncio.gather(*runs)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def replaced(child: Child, pid: int) -> None:
    """Wait until another data process runs than the one with this pid."""
    await eventually(lambda: child.view().pid not in (None, pid))


async def reported(child: Child) -> None:
    await eventually(lambda: child.view().status is not None)


def pid_of(child: Child) -> int:
    pid = child.view().pid
    assert pid is not None
    return pid


def pauses_in(caplog: pytest.LogCaptureFixture) -> list[float]:
    return [float(seconds) for seconds in re.findall(r"again in (\S+) s", caplog.text)]


def run(test: Coroutine[Any, Any, None]) -> None:
    uvloop.run(test)


def test_a_ready_process_reports_and_ends_when_stopped() -> None:
    async def test() -> None:
        child = make("well")
        async with running(child):
            await reported(child)
            pid = pid_of(child)
            assert (child.view().state, child.view().restarts) == ("in-sync", 0)
        assert child.view().pid is None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    run(test())


@pytest.mark.parametrize(
    ("behaviour", "sentence"),
    [
        ("fails", r"^Group rg-a: 127\.0\.0\.1:10809 is in use\.$"),
        ("dies", r"^Group rg-a: its data process ended with code 3 without saying why\.$"),
        ("babbles", r"^Group rg-a: its data process was killed because it sent a line that is not JSON"),
    ],
)
def test_a_first_start_that_goes_wrong_is_an_error_that_says_why(behaviour: str, sentence: str) -> None:
    with pytest.raises(StartError, match=sentence):
        run(make(behaviour).run())


def test_a_process_that_is_never_ready_is_given_up() -> None:
    child = make("silent", patience=Patience(ready_s=0.3, stop_s=5))
    with pytest.raises(StartError, match=r"was not ready within 0\.3 s and was killed\.$"):
        run(child.run())


def test_a_program_that_does_not_exist_is_an_error_that_names_it() -> None:
    async def test() -> None:
        child = Child("rg-a", ["/no/such/program"], LOCK_FD, PATIENCE)
        with pytest.raises(StartError, match="/no/such/program cannot be started: No such file"):
            await child.run()

    run(test())


def test_a_killed_process_is_started_again_and_counted() -> None:
    async def test() -> None:
        child = make("well")
        async with running(child):
            for restarts in (1, 2):
                before = pid_of(child)
                os.kill(before, signal.SIGKILL)
                await replaced(child, before)
                assert child.view().restarts == restarts
            await eventually(lambda: child.view().state == "in-sync")

    run(test())


def test_what_a_failing_process_says_last_is_shown_until_the_next_one_reports() -> None:
    async def test() -> None:
        patience = Patience(restart_first_s=30, stop_s=5)
        child = make("well", patience=patience)
        async with running(child):
            await reported(child)
            os.kill(pid_of(child), signal.SIGUSR2)
            await eventually(lambda: child.view().state == "failed")
            await eventually(lambda: "restart 1" in child.view().why)
            assert child.view().why == "/srv/vm-a.img is gone; it is started again (restart 1)"
            assert child.view().status is None

    run(test())


def test_stopping_does_not_wait_for_the_pause_before_a_restart() -> None:
    async def test() -> None:
        child = make("well", patience=Patience(restart_first_s=3600))
        async with asyncio.timeout(30), running(child):
            os.kill(pid_of(child), signal.SIGKILL)
            await eventually(lambda: child.view().restarts == 1)

    run(test())


def test_garbage_on_the_channel_is_counted_and_the_process_replaced() -> None:
    async def test() -> None:
        child = make("well")
        async with running(child):
            before = pid_of(child)
            os.kill(before, signal.SIGUSR1)
            await replaced(child, before)
            assert (child.view().bad_messages, child.view().restarts) == (1, 1)
            with pytest.raises(ProcessLookupError):
                os.kill(before, 0)

    run(test())


def test_a_process_that_ignores_the_wish_to_stop_is_killed() -> None:
    async def test() -> None:
        child = make("stubborn", patience=Patience(stop_s=0.2))
        async with asyncio.timeout(10), running(child):
            pass
        assert child.view().pid is None

    run(test())


def test_the_pause_between_restarts_grows_to_its_bound(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        child = make("well")
        async with running(child):
            for _ in range(4):
                before = pid_of(child)
                os.kill(before, signal.SIGKILL)
                await replaced(child, before)

    run(test())
    pauses = pauses_in(caplog)
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.5])


def test_a_process_that_ran_well_for_long_is_started_again_at_once(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        child = make("well", patience=Patience(restart_first_s=0.1, well_after_s=0.0))
        async with running(child):
            for _ in range(3):
                before = pid_of(child)
                os.kill(before, signal.SIGKILL)
                await replaced(child, before)

    run(test())
    pauses = pauses_in(caplog)
    assert pauses == pytest.approx([0.1, 0.1, 0.1])


def test_a_process_inherits_its_own_channel_and_the_lock_and_nothing_else() -> None:
    async def test() -> None:
        first, second = make("well"), make("well", group="rg-b")
        async with running(first), running(second):  # the second starts while the first has its channel
            for child in (first, second):
                await reported(child)
                inherited = json.loads(child.view().why)
                assert inherited.count("socket") == 1
                assert len(inherited) == 5  # stdin, stdout, stderr, channel, lock

    run(test())


def test_a_process_without_a_report_yet_is_starting() -> None:
    async def test() -> None:
        child = make("mute")
        async with running(child):
            view = child.view()
            assert (view.status, view.state, view.why) == (
                None,
                "starting",
                "its data process is being started",
            )

    run(test())


# --- A process that does not end although it was killed, as it hangs in a system call -----------------


class Heard:
    """A listener."""

    def __init__(self) -> None:
        self.ends = 0

    def reported(self, status: Status) -> None:
        pass

    def done(self, number: int, error: str) -> None:
        pass

    def ended(self) -> None:
        self.ends += 1


@contextlib.asynccontextmanager
async def undead(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Child, int]]:
    """A child that was killed in vain, and its pid."""
    monkeypatch.setattr(DataProcess, "kill", lambda _: None)
    child, heard = make("well", patience=Patience(killed_s=0.1, stop_s=60, restart_first_s=0.1)), Heard()
    child.listener = heard
    async with asyncio.timeout(30), running(child):
        await reported(child)
        pid = pid_of(child)
        child.kill("its data process was killed, as it was silent")
        await eventually(lambda: heard.ends == 1)
        yield child, pid


def test_a_process_that_cannot_be_killed_is_taken_for_ended_but_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with undead(monkeypatch) as (child, pid):
            view = child.view()
            assert (view.status, view.state, view.pid, view.restarts) == (None, "failed", pid, 0)
            assert view.why.startswith("its data process was killed, as it was silent, and does not end, as it waits")
            os.kill(pid, signal.SIGKILL)  # it ends after all
            await replaced(child, pid)
            await reported(child)
            assert (child.view().state, child.view().restarts) == ("in-sync", 1)

    run(test())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a subprocess still runs
def test_stopping_does_not_wait_for_a_process_that_cannot_be_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with undead(monkeypatch) as (_, pid):
            pass
        os.kill(pid, signal.SIGKILL)  # it is there

    run(test())

"""The data process of a group, kept running: started, watched, started again with a growing pause.

Job: one `Child` per group. Its `run` goes on until `stop`; `ready` is set when the first start went well.
Invariants: at most one data process per group; a failure of the first start is for the operator and is not
retried, later ones are retried for ever, are counted, and each is one line of log; a process that breaks the
channel's protocol is killed and counts as failed. One that was killed runs no more, but does not end as long as it
waits for a disk that does not answer: everybody is told that it has ended, but the next one is started only when it
really has, as it still has its sockets and locks.
Neighbours: `process` is one run; `supervisor` starts and stops all; `groups` commands it and is told what it says;
`status` and `metrics` read `view`.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from stortrends_ha.errors import ProtocolError, StartError
from stortrends_ha.node.messages import Done, Failed, Message, Ready, Report, State, Status
from stortrends_ha.node.process import DataProcess, describe_end
from stortrends_ha.node.rates import Rates, VolumeRates

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a child waits for what."""

    # A data process opens files and sockets before it is ready; 30 s is a very slow disk.
    ready_s: float = 30.0
    # It drains for some seconds, then its last flush takes what the disk needs for all that is only cached: one that
    # is killed in it has lost nothing, but its replica must be compared, and after a reboot it does not own.
    stop_s: float = 150.0
    # The first pause is short, because clients wait; the last one keeps a crash loop cheap.
    restart_first_s: float = 0.2
    restart_last_s: float = 5.0
    # A process that was killed is gone by then, unless its disk hangs.
    killed_s: float = 1.0
    # A process that ran this long was well: the next pause is short again.
    well_after_s: float = 10.0


@dataclass(frozen=True, slots=True)
class View:
    """What is known of a group's data process at one moment.

    `status` is the newest report of the process that runs now; None before its first one and while none runs.
    """

    group: str
    status: Status | None
    report_age_s: float
    state: State
    why: str
    pid: int | None
    restarts: int
    bad_messages: int
    rates: Mapping[str, VolumeRates]


class Listener(Protocol):
    """Who is told what a data process says, at once."""

    def reported(self, status: Status) -> None:
        """Its newest status."""

    def done(self, number: int, error: str) -> None:
        """It has carried out a command, or could not."""

    def ended(self) -> None:
        """It has ended, and with it everything that it was told."""


class Child:
    """Keeps the data process of one group running."""

    def __init__(
        self, group: str, command: Sequence[str], lock_fd: int, patience: Patience, listener: Listener | None = None
    ) -> None:
        self.group = group
        self.listener = listener
        self.ready = asyncio.Event()
        self._command = command
        self._lock_fd = lock_fd
        self._patience = patience
        self._spawner = ThreadPoolExecutor(1, f"spawner of {group}")
        self._stopping = asyncio.Event()
        self._process: DataProcess | None = None
        self._status: Status | None = None
        self._reported_s = 0.0
        self._rates = Rates()
        self._state: State = "starting"
        self._why = "its data process is being started"
        self._failure = ""
        self._undead = False  # it was killed, and has not ended
        self._restarts = 0
        self._bad_messages = 0

    def view(self) -> View:
        """What is known now; may be called from any thread."""
        process, status = self._process, self._status
        return View(
            group=self.group,
            status=status,
            report_age_s=time.monotonic() - self._reported_s if status else 0.0,
            state=status["state"] if status else self._state,
            why=status["why"] if status else self._why,
            pid=process.pid if process else None,
            restarts=self._restarts,
            bad_messages=self._bad_messages,
            rates=self._rates.rates(),
        )

    def send(self, command: dict[str, Any]) -> None:
        """Tell the data process, if one runs; what it does not get because it ends, nobody answers."""
        if self._process and not self._undead:
            self._process.send(command)

    @property
    def silent_s(self) -> float:
        """How long the data process that runs has not reported; 0 before its first report."""
        return time.monotonic() - self._reported_s if self._status else 0.0

    def kill(self, why: str) -> None:
        """End the data process at once; it is started again."""
        if self._process and not self._failure:
            self._failure = why
            self._kill(self._process)

    def stop(self) -> None:
        """End the data process in an orderly way; `run` then returns."""
        self._stopping.set()
        if self._process and self._undead:
            self._process.give_up()
        elif self._process:
            self._ask_to_stop(self._process)

    async def run(self) -> None:
        """Keep the data process running until `stop`; raises `StartError` if the first start fails."""
        pause_s = self._patience.restart_first_s
        while not self._stopping.is_set():
            ran_s = await self._run_once()
            if self._stopping.is_set():
                return
            if not self.ready.is_set():
                raise StartError(f"Group {self.group}: {self._failure}.")
            if ran_s >= self._patience.well_after_s:
                pause_s = self._patience.restart_first_s
            await self._pause(pause_s)
            pause_s = min(2 * pause_s, self._patience.restart_last_s)

    async def _pause(self, pause_s: float) -> None:
        self._restarts += 1
        self._why = f"{self._failure}; it is started again (restart {self._restarts})"
        log.warning(
            "Group %s: %s. Starting its data process again in %.1f s (restart %d).",
            self.group, self._failure, pause_s, self._restarts,
        )  # fmt: skip
        try:
            await asyncio.wait_for(self._stopping.wait(), pause_s)
        except TimeoutError:
            return

    async def _run_once(self) -> float:
        """One run of the data process, from its start to its end; how long it ran, in seconds."""
        started_s = time.monotonic()
        self._failure = ""
        try:
            process = self._process = await DataProcess.spawn(self._command, self._lock_fd, self._spawner)
        except StartError as error:
            self._failure = f"its data process cannot be started: {error}"
            return 0.0
        if self._stopping.is_set():  # asked while it was being spawned
            self._ask_to_stop(process)
        await self._follow(process)
        killing = asyncio.get_running_loop().call_later(self._patience.stop_s, self._kill, process)
        code = await process.ended()
        killing.cancel()
        self._process, self._undead = None, False
        self._forget_status()
        self._state = "failed" if self._failure else "starting"
        self._failure = self._failure or f"its data process {describe_end(code)} without saying why"
        return time.monotonic() - started_s

    async def _follow(self, process: DataProcess) -> None:
        """Take what it says until its channel ends, or until it must be killed."""
        try:
            async with asyncio.timeout(self._patience.ready_s) as deadline:
                async for message in process.messages():
                    if isinstance(message, Ready):
                        deadline.reschedule(None)
                    if not self._undead:
                        self._take(message, process)
        except TimeoutError:
            self._kill(process)
            self._failure = f"its data process was not ready within {self._patience.ready_s:g} s and was killed"
        except ProtocolError as error:
            self._kill(process)
            self._bad_messages += 1
            self._failure = f"its data process was killed because {error}"

    def _take(self, message: Message, process: DataProcess) -> None:
        match message:
            case Ready():
                log.info("Group %s: the data process (pid %d) is ready.", self.group, process.pid)
                self.ready.set()
            case Failed():
                self._failure = message.message.rstrip(".")
            case Report():
                self._report(message.status)
            case Done(number, error):
                if self.listener:
                    self.listener.done(number, error)

    def _report(self, status: Status) -> None:
        if status["group"] != self.group:
            raise ProtocolError(f"it sent the status of another group, {status['group']}")
        before = self._status
        if before is None or before["state"] != status["state"]:
            why = f": {status['why']}" if status["why"] else ""
            log.info("Group %s is %s%s.", self.group, status["state"], why.rstrip("."))
        self._reported_s = time.monotonic()
        self._rates.add(self._reported_s, status)
        self._status = status
        if self.listener:
            self.listener.reported(status)

    def _ask_to_stop(self, process: DataProcess) -> None:
        process.ask_to_stop()
        asyncio.get_running_loop().call_later(self._patience.stop_s, self._kill, process)

    def _kill(self, process: DataProcess) -> None:
        process.kill()
        asyncio.get_running_loop().call_later(self._patience.killed_s, self._look_if_ended, process)

    def _look_if_ended(self, process: DataProcess) -> None:
        """Row 14: whoever hangs in a system call answers nobody after a SIGKILL: the peer can have the group."""
        if process.has_ended or self._undead:
            return
        self._undead = True
        self._state = "failed"
        self._why = (
            f"{self._failure or 'its data process was killed'}, and does not end, as it waits for a disk that does not "
            "answer. It serves nobody, and is started again when it has ended: mend the disk, or restart the machine"
        )
        log.error("Group %s: %s.", self.group, self._why)
        self._forget_status()
        if self._stopping.is_set():
            process.give_up()

    def _forget_status(self) -> None:
        """It says nothing any more."""
        self._status = None
        self._rates = Rates()
        if self.listener:
            self.listener.ended()

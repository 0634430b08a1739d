"""An event loop of asyncio on the fake clock, for the parts of a node that are written for it (the two-node arbiters).

Everything that it runs is an event of the supervisor: it waits while that is stopped, and is gone when that is dead.
"""

import asyncio
from asyncio import futures, tasks
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any

from .actor import Actor
from .clock import Clock, S


# Nothing here opens a socket, starts a process, or needs any other of the many methods of a real loop.
class NodeLoop(asyncio.AbstractEventLoop):
    """What tasks, futures, locks and time-outs need of a loop."""

    def __init__(self, clock: Clock, actor: Actor) -> None:
        self._clock = clock
        self._actor = actor
        self._error: BaseException | None = None
        self._unfinished: dict[Any, None] = {}

    def time(self) -> float:
        """In seconds."""
        return self._clock.now_ns / S

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """At this time, after everything that is due."""
        handle = asyncio.Handle(callback, args, self, context)
        if self._actor.alive:
            self._actor.after(0, self._run, handle)
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """In so many seconds."""
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """At that time."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        if self._actor.alive:
            self._clock.at(int(when * S) + 1, self._actor.event, self._run, handle)
        return handle

    def _timer_handle_cancelled(self, _handle: asyncio.TimerHandle) -> None:
        pass

    def _run(self, handle: asyncio.Handle) -> None:
        if handle.cancelled():
            return
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            handle._run()
        finally:
            asyncio._set_running_loop(before)
        if self._error is not None:
            raise self._error

    def create_future(self) -> "asyncio.Future[Any]":
        """On this loop."""
        return futures._PyFuture(loop=self)  # type: ignore[attr-defined, no-any-return]

    def create_task(self, coro: Coroutine[Any, Any, Any], **_options: Any) -> "asyncio.Task[Any]":  # type: ignore[override]
        """It begins at this time, as an event of its own."""
        # Those written in C crash when the collector of garbage ends them in the middle of another one (Python 3.11).
        task = tasks._PyTask(coro, loop=self)  # type: ignore[attr-defined]
        self._unfinished[task] = None
        task.add_done_callback(self._done)
        return task  # type: ignore[no-any-return]

    def end(self) -> None:
        """The run is over: what is not finished never will be."""
        unfinished, self._unfinished = self._unfinished, {}
        for task in unfinished:
            task._log_destroy_pending = False
            task.get_coro().close()

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._unfinished.pop(task, None)
        if not task.cancelled() and task.exception() is not None:
            self._error = task.exception()
            raise self._error  # type: ignore[misc]

    def get_debug(self) -> bool:
        """No."""
        return False

    def is_running(self) -> bool:
        """Always."""
        return True

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """A bug; what a dead node leaves unfinished is none."""
        self._error = self._error or context.get("exception")

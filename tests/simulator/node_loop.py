"""An event loop of asyncio on the fake clock, for what of a node is written for it.

Everything that it runs is an event of its process: it waits while that is stopped, and is gone when that is dead.
"""

import asyncio
from asyncio import futures, tasks
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any

from .actor import Actor
from .clock import US, Clock, NodeClock, S


# Those written in C crash when the collector of garbage ends them in the middle of another one (Python 3.11).
class _Task(tasks._PyTask):  # type: ignore[name-defined, misc]
    """A set of them is in the same order in each run."""

    def __init__(self, coro: Coroutine[Any, Any, Any], loop: "NodeLoop", number: int) -> None:
        self._number = number
        super().__init__(coro, loop=loop)

    def __hash__(self) -> int:
        return self._number


# None of the many other methods of a real loop is needed.
class NodeLoop(asyncio.AbstractEventLoop):
    """What tasks, futures, locks and time-outs need of a loop; ``own`` is the clock of the host."""

    def __init__(self, clock: Clock, own: NodeClock, actor: Actor) -> None:
        self._clock = clock
        self._own = own
        self._actor = actor
        self._error: BaseException | None = None
        self._unfinished: dict[Any, None] = {}
        self._tasks = 0

    def time(self) -> float:
        """In seconds."""
        return self._own.now_ns() / S

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
        """A little later than that: time goes on between a timer and the next one, as on a real machine."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        if self._actor.alive:
            self._clock.at(self._own.true_ns(int(when * S) + US), self._actor.event, self._run, handle)
        return handle

    def _timer_handle_cancelled(self, _handle: asyncio.TimerHandle) -> None:
        pass

    def _run(self, handle: asyncio.Handle) -> None:
        if not handle.cancelled():
            self._call(handle._run)

    def _call(self, do: Callable[..., Any], *args: Any) -> None:
        """It runs."""
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            do(*args)
        finally:
            asyncio._set_running_loop(before)
        if self._error is not None:
            raise self._error

    def create_future(self) -> "asyncio.Future[Any]":
        """On this loop."""
        return futures._PyFuture(loop=self)  # type: ignore[attr-defined, no-any-return]

    def create_task(self, coro: Coroutine[Any, Any, Any], **_options: Any) -> "asyncio.Task[Any]":  # type: ignore[override]
        """It begins at this time, as an event of its own."""
        self._tasks += 1
        task = _Task(coro, self, self._tasks)
        self._unfinished[task] = None
        task.add_done_callback(self._done)
        return task

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

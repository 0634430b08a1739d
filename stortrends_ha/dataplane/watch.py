"""A bug must not leave half a data process behind: whatever escapes a callback or a task ends all of it.

The supervisor then starts it again; clients see a pause, and the replicas are compared. A connection whose place in
its input is lost, or a link that nobody reconnects, would be worse.
"""

import asyncio
import logging
import os
from typing import Any

log = logging.getLogger(__name__)


def die(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The event loop's handler of exceptions that nobody caught."""
    log.critical("a bug: %s", context.get("message"), exc_info=context.get("exception"))
    if context.get("exception") is not None:
        os._exit(1)


def end_with(task: "asyncio.Task[None]") -> "asyncio.Task[None]":
    """See to it that an exception in this task ends the process."""

    def ended(done: "asyncio.Task[None]") -> None:
        if not done.cancelled() and (error := done.exception()) is not None:
            die(done.get_loop(), {"message": "a task has failed", "exception": error})

    task.add_done_callback(ended)
    return task

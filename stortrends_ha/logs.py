"""How the log of a process looks, one line a decision, on stderr, and how it gets there: never by waiting for it.

Invariants: the journal stamps time and severity itself, so a line for it starts with its severity in the form of
sd-daemon(3) and has no time; anywhere else a line has both in words. Lines are written by a thread of their own: a
stderr that takes nothing more (a stopped reader of a pipe, a journal on a disk that hangs) holds up neither a beat nor
a client (rule 14).
Bound: LINES_MAX lines wait; more are dropped, and counted in a line of their own.
"""

import atexit
import logging
import os
import queue
import sys
import time
from logging.handlers import QueueHandler, QueueListener

LINES_MAX = 10_000
# For the last lines to be written, at the end of the process.
LAST_LINES_S = 1.0

# sd-daemon(3): <3> error, <4> warning, <6> information, <7> debugging.
_JOURNAL_SEVERITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.NOTSET, 7))

_lines: "queue.Queue[logging.LogRecord]" = queue.Queue(LINES_MAX)


class _JournalFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        severity = next(number for level, number in _JOURNAL_SEVERITIES if record.levelno >= level)
        return "\n".join(f"<{severity}>{line}" for line in super().format(record).splitlines())


class _Waiting(QueueHandler):
    """Puts lines into the queue, if they fit."""

    def __init__(self, lines: "queue.Queue[logging.LogRecord]") -> None:
        super().__init__(lines)
        self._lines = lines
        self._dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self._dropped:
                self._lines.put_nowait(self._say_dropped())
                self._dropped = 0
            self._lines.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def _say_dropped(self) -> logging.LogRecord:
        text = f"{self._dropped} lines of the log were dropped, as nobody took them."
        return logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, None, None)


def configure() -> None:
    """Send the log of this process to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    if stderr_is_journal():
        handler.setFormatter(_JournalFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    QueueListener(_lines, handler).start()  # a daemon thread: it does not keep the process
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(_Waiting(_lines))
    atexit.register(flush)


def flush(patience_s: float = LAST_LINES_S) -> None:
    """Wait until all lines are written, but no longer than so."""
    deadline_s = time.monotonic() + patience_s
    with _lines.all_tasks_done:
        while _lines.unfinished_tasks and (left_s := deadline_s - time.monotonic()) > 0:
            _lines.all_tasks_done.wait(left_s)


def stderr_is_journal() -> bool:
    """Whether stderr is the very stream that JOURNAL_STREAM describes, as systemd.exec(5) defines it."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        stderr = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return (device, inode) == (str(stderr.st_dev), str(stderr.st_ino))

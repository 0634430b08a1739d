"""How the log of a process looks: one line a decision, on stderr.

Invariant: the journal stamps time and severity itself, so a line for it starts with its severity in the form
of sd-daemon(3) and has no time; anywhere else a line has both in words.
"""

import logging
import os
import sys

# sd-daemon(3): <3> error, <4> warning, <6> information, <7> debugging.
_JOURNAL_SEVERITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.NOTSET, 7))


class _JournalFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        severity = next(number for level, number in _JOURNAL_SEVERITIES if record.levelno >= level)
        return "\n".join(f"<{severity}>{line}" for line in super().format(record).splitlines())


def configure() -> None:
    """Send the log of this process to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    if stderr_is_journal():
        handler.setFormatter(_JournalFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def stderr_is_journal() -> bool:
    """Whether stderr is the very stream that JOURNAL_STREAM describes, as systemd.exec(5) defines it."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        stderr = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return (device, inode) == (str(stderr.st_dev), str(stderr.st_ino))

"""What happened last, for people."""

import re
from collections import deque
from typing import Any

from .clock import Clock

_Event = tuple[int, int, str, str, Any]
EVENTS = 90


class Trace:
    """Keeps the last events; of clients only the very last, as there are so many. Says nothing until it is asked."""

    def __init__(self, clock: Clock, *, keep: int = EVENTS) -> None:
        self._clock = clock
        self._number = 0
        self._events: deque[_Event] = deque(maxlen=keep)
        self._of_clients: deque[_Event] = deque(maxlen=keep // 4)

    def say(self, who: str, what: str, about: Any = "") -> None:
        """``about`` must not change: it is printed later, or never."""
        self._number += 1
        self._events.append((self._number, self._clock.now_ns, who, what, about))

    def client(self, who: str, what: str, about: Any = "") -> None:
        """What a client asks and is answered."""
        self._number += 1
        self._of_clients.append((self._number, self._clock.now_ns, who, what, about))

    def __str__(self) -> str:
        return "\n".join(
            f"{at_ns / 1e9:12.6f}  {who:14} {_short(what)}{' ' if what and about != '' else ''}{_short(about)}"
            for _, at_ns, who, what, about in sorted([*self._events, *self._of_clients], key=lambda event: event[0])
        )


def _short(about: Any) -> str:
    """Records as one word, nothing that is false."""
    text = re.sub(r"Record\(epoch=(\d+), owner='([^']*)', in_sync=\(([^)]*)\)\)", _record, str(about))
    text = re.sub(r"epoch (\d+): (\S+) owns, in sync (\S+)( and \S+)?", r"\1 \2 (\3\4)", text)
    return re.sub(r"(, )?\w+=False", "", text)


def _record(match: re.Match[str]) -> str:
    in_sync = " and ".join(re.findall(r"[^', ]+", match[3]))
    return f"{match[1]} {match[2]} ({in_sync})"

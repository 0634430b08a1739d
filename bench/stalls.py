"""How long clients waited at the events of one kind, and whether that is within its targets. Pure."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

HEADER = ("event", "times", "p50 ms", "max ms", "target ms (p50, max)", "")
_TEXT_COLUMNS = 1


@dataclass(slots=True)
class Stalls:
    """The stalls at one kind of event, in seconds."""

    name: str
    median_target_s: float
    most_target_s: float
    found_s: list[float] = field(default_factory=list)

    def add(self, stall_s: float) -> None:
        """One more event."""
        self.found_s.append(stall_s)

    @property
    def median_s(self) -> float:
        """Of all events."""
        return statistics.median(self.found_s)

    @property
    def most_s(self) -> float:
        """Of all events."""
        return max(self.found_s)

    @property
    def missed(self) -> str:
        """Which target was missed, in a word or two; empty if none was."""
        missed = [
            name
            for name, found_s, target_s in (
                ("p50", self.median_s, self.median_target_s),
                ("max", self.most_s, self.most_target_s),
            )
            if found_s > target_s
        ]
        return f"missed: {' and '.join(missed)}" if missed else ""


def table(found: Iterable[Stalls]) -> str:
    """For a terminal."""
    lines = [HEADER, *(_cells(stalls) for stalls in found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(f"{_line(cells, widths)}\n" for cells in lines)


def _cells(stalls: Stalls) -> tuple[str, ...]:
    targets = f"{_ms(stalls.median_target_s)}, {_ms(stalls.most_target_s)}"
    times = str(len(stalls.found_s))
    return stalls.name, times, _ms(stalls.median_s), _ms(stalls.most_s), targets, stalls.missed


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f}"


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    padded = [
        cell.ljust(width) if number < _TEXT_COLUMNS else cell.rjust(width)
        for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()

"""The rows as a table, in Markdown and for a terminal. Pure."""

from collections.abc import Sequence

from bench.summary import Ratio, Row

HEADER = (
    "workload", "server", "IOPS", "MiB/s", "mean µs", "p99 µs", "CPU s / 1000 ops", "our IOPS / its",
)  # fmt: skip
_TEXT_COLUMNS = 2


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table that is also aligned as plain text."""
    lines = _lines(rows)
    widths = _widths(lines)
    rule = ["-" * width if i < _TEXT_COLUMNS else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    table = [_padded(lines[0], widths), rule, *(_padded(line, widths) for line in lines[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def terminal(rows: Sequence[Row]) -> str:
    """The same with each workload said once."""
    lines = _lines(rows)
    widths = _widths(lines)
    shown, last = [], ""
    for line in lines:
        first = line[0] if line[0] != last else ""
        shown.append("  ".join(_padded([first, *line[1:]], widths)).rstrip())
        last = line[0]
    return "\n".join(shown)


def _lines(rows: Sequence[Row]) -> list[Sequence[str]]:
    return [HEADER, *(_cells(row) for row in rows)]


def _cells(row: Row) -> list[str]:
    return [
        row.workload,
        row.server,
        f"{row.iops:.0f}",
        f"{row.mib_s:.0f}",
        f"{row.mean_us:.0f}",
        f"{row.p99_us:.0f}",
        "-" if row.cpu_s_per_kop is None else f"{row.cpu_s_per_kop:.4f}",
        _ratio(row.ratio),
    ]


def _ratio(ratio: Ratio | None) -> str:
    return f"{ratio.median:.2f} ({ratio.least:.2f}-{ratio.most:.2f})" if ratio else ""


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def _padded(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    cells = zip(line, widths, strict=True)
    return [cell.ljust(w) if i < _TEXT_COLUMNS else cell.rjust(w) for i, (cell, w) in enumerate(cells)]

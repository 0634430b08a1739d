"""The rows as a plot: an SVG with one group of bars for each workload. Pure.

Workloads differ by orders of magnitude, so a bar's length is its share of the workload's best; the IOPS
stand beside it. Colours follow the reader's light or dark preference.
"""

from collections.abc import Sequence
from xml.sax.saxutils import escape

from bench.summary import Row

WIDTH_PX = 760
LEFT_PX = 160  # workload names
BAR_MAX_PX = 480
BAR_PX, GROUP_GAP_PX, TOP_PX, MARGIN_PX = 16, 14, 64, 16
CHARACTER_PX = 7.5  # of the legend's font, roughly

# Distinct in both themes, and for colour-blind readers (Okabe and Ito's palette).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")

STYLE = """
  text { font-family: system-ui, sans-serif; font-size: 12px; fill: #1f2328 }
  .page { fill: #ffffff }
  .title { font-size: 15px; font-weight: 600 }
  .faint { fill: #59636e }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .page { fill: #0d1117 }
    .faint { fill: #9198a1 }
  }
"""


def svg(rows: Sequence[Row], subtitle: str) -> str:
    """The plot as the text of an SVG file."""
    servers = list(dict.fromkeys(row.server for row in rows))
    colours = {server: COLOURS[i % len(COLOURS)] for i, server in enumerate(servers)}
    body, height_px = _groups(rows, colours)
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH_PX}" height="{height_px}" '
        f'viewBox="0 0 {WIDTH_PX} {height_px}" role="img">',
        f"<title>IOPS by workload. {escape(subtitle)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH_PX}" height="{height_px}" rx="6"/>',
        _text(MARGIN_PX, 24, "IOPS, beside the best of each workload", "title"),
        _text(WIDTH_PX - MARGIN_PX, 24, subtitle, "faint", anchor="end"),
    ]
    return "\n".join([*head, *_legend(colours), *body, "</svg>"]) + "\n"


def _legend(colours: dict[str, str]) -> list[str]:
    parts, x = [], float(LEFT_PX)
    for server, colour in colours.items():
        parts.append(f'<rect x="{x:.0f}" y="38" width="11" height="11" rx="2" fill="{colour}"/>')
        parts.append(_text(x + 16, 48, server))
        x += 16 + len(server) * CHARACTER_PX + 20
    return parts


def _groups(rows: Sequence[Row], colours: dict[str, str]) -> tuple[list[str], int]:
    parts, y = [], TOP_PX
    for workload in dict.fromkeys(row.workload for row in rows):
        group = [row for row in rows if row.workload == workload]
        best = max(row.iops for row in group)
        middle_px = y + len(group) * BAR_PX / 2 + 4
        parts.append(_text(LEFT_PX - 10, middle_px, workload, anchor="end"))
        for row in group:
            parts += _bar(row, y, row.iops / best if best else 0.0, colours[row.server])
            y += BAR_PX
        y += GROUP_GAP_PX
    return parts, y - GROUP_GAP_PX + MARGIN_PX


def _bar(row: Row, y_px: int, share: float, colour: str) -> list[str]:
    length_px = BAR_MAX_PX * share
    label = f"{row.iops:,.0f}"
    return [
        f'<rect x="{LEFT_PX}" y="{y_px + 1}" width="{length_px:.1f}" height="{BAR_PX - 2}" rx="2" '
        f'fill="{colour}"><title>{escape(row.server)}: {label} IOPS</title></rect>',
        _text(LEFT_PX + length_px + 6, y_px + BAR_PX - 4, label, "faint"),
    ]


def _text(x_px: float, y_px: float, text: str, style: str = "", anchor: str = "start") -> str:
    style = f' class="{style}"' if style else ""
    return f'<text x="{x_px:.1f}" y="{y_px:.1f}" text-anchor="{anchor}"{style}>{escape(text)}</text>'

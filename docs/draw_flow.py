"""Draw docs/flow.svg, the picture of the data flow in the README: `python docs/draw_flow.py`."""

from __future__ import annotations

import itertools
from pathlib import Path
from xml.sax.saxutils import escape

STEPS = [
    ("image files", "NIfTI, PNG", None),
    ("check", "every problem by file", "lightm check"),
    ("plan", "spacing, patch, batch", "lightm plan"),
    ("patches", "resampled, normalised,\ncached, augmented", None),
    ("training", "Mamba U-Net, CPU kernels,\ncheckpoints", "lightm train"),
    ("prediction", "sliding window, back to\neach file's geometry", "lightm predict"),
    ("evaluation", "DSC, IoU, HD95, NSD\nwith intervals", "lightm evaluate"),
    ("report", "one HTML file", "lightm report"),
]
WIDTH, HEIGHT, GAP, COLUMNS = 190, 96, 34, 4


def draw() -> str:
    """Return the SVG text."""
    rows = -(-len(STEPS) // COLUMNS)
    total_w, total_h = COLUMNS * WIDTH + (COLUMNS - 1) * GAP + 20, rows * HEIGHT + (rows - 1) * GAP + 20
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_w} {total_h}" width="{total_w}" '
        f'height="{total_h}" font-family="system-ui, sans-serif" role="img" aria-label="data flow of LightM">',
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#5b6b7b"/></marker></defs>',
        f'<rect width="{total_w}" height="{total_h}" rx="8" fill="#ffffff"/>',
    ]
    centres = []
    for i, (title, text, command) in enumerate(STEPS):
        row, column = divmod(i, COLUMNS)
        column = column if row % 2 == 0 else COLUMNS - 1 - column  # the second row runs back, as a snake
        x, y = 10 + column * (WIDTH + GAP), 10 + row * (HEIGHT + GAP)
        centres.append((x, y))
        fill = "#e8f1fa" if command else "#f3f4f6"
        out.append(f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{fill}" stroke="#9fb3c8"/>')
        middle = x + WIDTH / 2
        out.append(_text(middle, y + 24, title, 15, "#102a43", "600"))
        for j, line in enumerate(text.split("\n")):
            out.append(_text(middle, y + 44 + 15 * j, line, 12, "#334e68"))
        if command:
            out.append(_text(middle, y + HEIGHT - 10, command, 11, "#0b69a3", family="ui-monospace, monospace"))
    for (x0, y0), (x1, y1) in itertools.pairwise(centres):
        if y0 == y1:
            right = x1 > x0
            start, end = (x0 + WIDTH, x1 - 2) if right else (x0, x1 + WIDTH + 2)
            line = f'x1="{start}" y1="{y0 + HEIGHT / 2}" x2="{end}" y2="{y0 + HEIGHT / 2}"'
        else:
            line = f'x1="{x0 + WIDTH / 2}" y1="{y0 + HEIGHT}" x2="{x0 + WIDTH / 2}" y2="{y1 - 2}"'
        out.append(f'<line {line} stroke="#5b6b7b" stroke-width="1.6" marker-end="url(#a)"/>')
    return "\n".join([*out, "</svg>", ""])


def _text(x: float, y: float, text: str, size: int, fill: str, weight: str = "400", family: str = "") -> str:
    family = f' font-family="{family}"' if family else ""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" text-anchor="middle" fill="{fill}"{family}>'
        f"{escape(text)}</text>"
    )


if __name__ == "__main__":
    Path(__file__).with_name("flow.svg").write_text(draw(), encoding="utf-8")

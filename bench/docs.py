"""`python -m bench.docs`: what the docs show of bench/results, made from it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bench import http, http_served, soak
from bench.peers.report import markdown
from serve import bench, trace_table

ROOT = Path(__file__).parents[1]
LADDER = ROOT / "docs" / "ladder.svg"
BEGIN, END = "<!-- from bench/results/{}: python -m bench.docs -->\n", "<!-- end -->"

Report = Mapping[str, Any]


def fenced(lines: Sequence[str]) -> str:
    return "\n".join(("```", *lines, "```", ""))


def peers(report: Report) -> str:
    return markdown(report).rstrip("\n") + "\n"


TABLES: dict[str, tuple[str, Callable[[Report], str]]] = {
    # results -> the document that shows them, and how
    "cpu.json": ("docs/profiles.md", lambda report: fenced(bench.table(report["results"]))),
    "trace-cpu.json": ("docs/trace.md", lambda report: fenced(trace_table.table(report))),
    "peers.json": ("docs/peers.md", peers),
    "peers-medium.json": ("docs/peers.md", peers),
    "http.json": ("docs/http-performance.md", http.table),
    "http-served.json": ("docs/http-performance.md", http_served.table),
    "soak.json": ("docs/live.md", soak.table),
}


def results(name: str) -> Any:
    return json.loads((ROOT / "bench" / "results" / name).read_text(encoding="utf-8"))


def filled(text: str, name: str, table: str) -> str:
    """The document with the table between the marks of these results.

    Raises ValueError if it has no such marks.
    """
    before, begin, rest = text.partition(BEGIN.format(name))
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"no {BEGIN.format(name)!r} … {END!r}")
    return f"{before}{begin}{table}{end}{after}"


# -- The ladder as bars, one panel a phase, on a logarithmic scale

BAR, GAP, LEFT, WIDTH, TOP = 18, 6, 90, 460, 34
COLOURS = {"prefill": "#2b6cb0", "decode": "#c05621"}
STYLE = "text{font:12px system-ui,sans-serif;fill:#444}.t{font-weight:600}.g{stroke:#ccc}"


def ladder(rungs: Sequence[Report]) -> str:
    """An SVG of tokens per second by profile, the speedup over the first at each bar's end."""
    panel = TOP + len(rungs) * (BAR + GAP) + GAP
    height = 2 * panel
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 150} {height}">',
        f"<style>{STYLE}</style>",
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for number, phase in enumerate(COLOURS):
        parts += _panel(phase, rungs, number * panel, panel)
    return "\n".join((*parts, "</svg>", ""))


def _panel(phase: str, rungs: Sequence[Report], top: int, height: int) -> list[str]:
    rates = [rung[phase]["median"] for rung in rungs]
    low = math.floor(math.log10(min(rates)))
    high = max(low + 1, math.ceil(math.log10(max(rates))))

    def x(rate: float) -> float:
        return LEFT + WIDTH * (math.log10(rate) - low) / (high - low)

    parts = [f'<text class="t" x="{LEFT}" y="{top + 14}">{phase}, tokens/s</text>']
    for power in range(low, high + 1):
        at = x(10.0**power)
        parts.append(
            f'<line class="g" x1="{at:.1f}" x2="{at:.1f}" y1="{top + TOP - 4}" '
            f'y2="{top + height - GAP}"/>'
            f'<text x="{at:.1f}" y="{top + TOP - 6}" text-anchor="middle">{10.0**power:g}</text>'
        )
    for row, (rung, rate) in enumerate(zip(rungs, rates, strict=True)):
        y = top + TOP + GAP + row * (BAR + GAP)
        label = f"{rate:.4g} ({rung[f'{phase}_speedup']:.2f}x)"
        middle = y + BAR - 5
        parts.append(
            f'<text x="{LEFT - 8}" y="{middle}" text-anchor="end">{escape(rung["profile"])}</text>'
            f'<rect x="{LEFT}" y="{y}" width="{x(rate) - LEFT:.1f}" height="{BAR}" '
            f'fill="{COLOURS[phase]}"/>'
            f'<text x="{x(rate) + 6:.1f}" y="{middle}">{label}</text>'
        )
    return parts


def main() -> None:
    for name, (document, table) in TABLES.items():
        path = ROOT / document
        text = path.read_text(encoding="utf-8")
        path.write_text(filled(text, name, table(results(name))), encoding="utf-8")
    LADDER.write_text(ladder(results("cpu.json")["results"]), encoding="utf-8")


if __name__ == "__main__":
    main()

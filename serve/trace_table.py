"""A trace's report as aligned text: the table of docs/trace.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FOLDED_SHARE = 0.005  # kernels below it share one line of the table
HEADER = (
    "kernel", "rule", "calls", "ms", "share", "MFLOP", "MB", "GFLOP/s", "GB/s", "roof", "bound",
)  # fmt: skip


def table(report: Mapping[str, Any], show_all: bool = False) -> list[str]:
    """The report as aligned text: each phase, its kernels by time, and what is outside of them."""
    blocks = [(_title(phase), _rows(phase, report["roof"], show_all)) for phase in report["phases"]]
    widths = [
        max(len(row[i]) for row in (HEADER, *(row for _, rows in blocks for row in rows)))
        for i in range(len(HEADER))
    ]
    lines = [_roof_line(report)]
    for title, rows in blocks:
        lines += ["", title]
        for row in (HEADER, *rows):
            texts = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
            texts += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
            lines.append("  ".join(texts).rstrip())
    return lines


def _roof_line(report: Mapping[str, Any]) -> str:
    threads, roof = report["workload"]["threads"], report["roof"]
    if roof is None:
        return "roof: not measured on this backend"
    return (
        f"roof with {threads} threads: {roof['gflops']:.0f} GFLOP/s (multiply-adds "
        f"{roof['fma_gflops']:.0f}, numpy's matmul {roof['matmul_gflops']:.0f}), "
        f"{roof['read_gbps']:.1f} GB/s from memory"
    )


def _title(phase: Mapping[str, Any]) -> str:
    steps = f"{phase['steps']} step{'s' if phase['steps'] > 1 else ''}"
    seconds, plain = 1e3 * phase["seconds"], 1e3 * phase["plain_seconds"]
    return f"{phase['phase']}: {steps}, {seconds:.1f} ms ({plain:.1f} ms untraced)"


def _rows(
    phase: Mapping[str, Any], roof: Mapping[str, float] | None, show_all: bool
) -> list[tuple[str, ...]]:
    kernels = phase["kernels"]
    shown = [row for row in kernels if show_all or row["share"] >= FOLDED_SHARE]
    folded = [row for row in kernels if row not in shown]
    rows = [_cells(row, roof) for row in shown]
    if folded:
        name = f"others ({len(folded)} kernel{'s' if len(folded) > 1 else ''})"
        rows.append(_time_cells(name, folded))
    for name, key in (("outside kernels", "outside_seconds"), ("total", "seconds")):
        share = phase[key] / phase["seconds"]
        rows.append(_time_cells(name, [{"calls": None, "seconds": phase[key], "share": share}]))
    return rows


def _time_cells(name: str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """A line without work."""
    calls = [row["calls"] for row in rows]
    seconds, share = (sum(row[key] for row in rows) for key in ("seconds", "share"))
    told = "" if None in calls else str(sum(calls))
    rest = ("",) * (len(HEADER) - 5)
    return name, "", told, f"{1e3 * seconds:.2f}", f"{100 * share:.1f}%", *rest


def _cells(row: Mapping[str, Any], roof: Mapping[str, float] | None) -> tuple[str, ...]:
    name, _, calls, ms, share, *_ = _time_cells(row["kernel"], [row])
    rule = row["rule"] or ("as written" if row["as_written"] else "none")
    fraction = row["roof_fraction"]
    return (
        name,
        rule,
        calls,
        ms,
        share,
        _number(row["flop"], 1e6),
        _number(row["bytes"], 1e6),
        _number(row["gflops"]),
        _number(row["gbps"]),
        "-" if fraction is None else f"{100 * fraction:.0f}%",
        _bound(row, roof),
    )


def _bound(row: Mapping[str, Any], roof: Mapping[str, float] | None) -> str:
    """Which side of the roof is the nearer one."""
    if roof is None or row["roof_fraction"] is None:
        return "-"
    is_compute = row["flop"] / roof["gflops"] > row["bytes"] / roof["read_gbps"]
    return "compute" if is_compute else "memory"


def _number(value: float | None, unit: float = 1.0) -> str:
    """Three digits."""
    if value is None:
        return "-"
    scaled = value / unit
    return (
        f"{scaled:.0f}" if scaled >= 100 else f"{scaled:.1f}" if scaled >= 10 else f"{scaled:.2f}"
    )

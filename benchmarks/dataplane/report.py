"""The rows as people and programs read them: a table, a picture, JSON."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.dataplane.plan import ALL_PATHS, MATCH, OPS
from benchmarks.dataplane.row import Row

_COLORS = dict(zip(ALL_PATHS, ("C0", "C1", "C2", "C3", "C4", "C5"), strict=True))
_BAR_WIDTH = 0.7
LEAST_PANEL, BAR_ROOM = 5.0, 0.55
"""How wide a panel is at least, and for each bar: inches."""
BUSY_SHARE = 0.5
"""From so much load on each CPU on, others take a part of the machine that can be seen."""


def as_dict(machine: str, rows: Sequence[Row], load_before: float = 0.0) -> dict[str, Any]:
    """For JSON. `load_before` is the load average of the minute before the run."""
    return {
        "machine": machine,
        "load_before": round(load_before, 2),
        "rows": [row.as_dict() for row in rows],
    }


def warning(load_before: float) -> str:
    """What to think of figures from a machine that had other things to do; empty: it had none."""
    cpus = os.cpu_count() or 1
    if load_before < BUSY_SHARE * cpus:
        return ""
    return (
        f"The machine was busy (load {load_before:.1f} on {cpus} CPUs before the run): speeds and "
        "ratios are noise there; CPU seconds hold better."
    )


def size_text(size: int) -> str:
    """Bytes as people say them."""
    return f"{size / (1 << 20):g} MiB" if size >= 1 << 20 else f"{size / (1 << 10):g} KiB"


def table(machine: str, rows: Sequence[Row], note: str = "") -> Table:
    """One line for each row, path by path; below it why rows are empty."""
    table = Table(title="Data plane", caption=_caption(machine, rows, note), caption_justify="left")
    for heading in ("path", "op", "block", "batch", "clients"):
        table.add_column(heading, justify="left" if heading in ("path", "op") else "right")
    for heading in ("GB/s", "floor", "ratio", "goal", "p50 ms", "p99 ms", "CPU s/GB", "floor's"):
        table.add_column(heading, justify="right")
    previous = ""
    for row in sorted(rows, key=_order):
        if previous and previous != row.path:
            table.add_section()
        previous = row.path
        table.add_row(
            row.path, row.op, size_text(row.block_bytes), f"{row.batch:,}", str(row.clients),
            _number(row.gb_per_s, 2) if row.op != MATCH else "",
            _number(row.floor, 2) if row.op != MATCH else f"{_number(row.floor_p50_ms, 2)} ms",
            _ratio(row), _goal(row), _number(row.p50_ms, 2), _number(row.p99_ms, 2),
            _number(row.cpu_s_per_gb, 2), _number(row.floor_cpu_s_per_gb, 2),
        )  # fmt: skip
    return table


def _order(row: Row) -> tuple[int, int, int, int, int]:
    op = (*OPS, MATCH).index(row.op)
    return ALL_PATHS.index(row.path), op, row.block_bytes, row.batch, row.clients


def _caption(machine: str, rows: Sequence[Row], note: str) -> str:
    floors = {row.path: row.floor_name for row in rows if row.op != MATCH}
    words = [machine, "Floors: " + ", ".join(f"{path}: {name}" for path, name in floors.items())]
    reasons = {(row.path, row.reason) for row in rows if row.reason}
    words += [f"{path} did not run: {reason}" for path, reason in sorted(reasons)]
    return "\n".join([*words, *([note] if note else [])])


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _ratio(row: Row) -> str:
    color = {True: "green", False: "red", None: "default"}[row.reached]
    return f"[{color}]{_number(row.ratio_to_floor, 2)}[/]"


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    return f"{'≤' if row.op == MATCH else '≥'} {row.goal:.2f}"


def draw(machine: str, rows: Sequence[Row], file: Path, note: str = "") -> None:
    """Speed by path and block size for the largest batch, each bar below the line of its floor."""
    from matplotlib.figure import Figure

    moving = [row for row in rows if row.op in OPS]
    batch = max((row.batch for row in moving), default=1)
    clients = sorted({row.clients for row in moving}) or [1]
    bars = len({(row.path, row.block_bytes) for row in moving})
    width = max(LEAST_PANEL, bars * BAR_ROOM)
    figure = Figure(figsize=(1 + width * len(clients), 8), dpi=120, layout="constrained")
    panels = figure.subplots(len(OPS), len(clients), squeeze=False, sharey=True)
    for line, op in enumerate(OPS):
        for column, count in enumerate(clients):
            chosen = [
                row for row in moving if (row.op, row.clients, row.batch) == (op, count, batch)
            ]
            _draw_panel(panels[line][column], chosen)
            said = f"{count} client{'s' if count > 1 else ''}"
            panels[line][column].set_title(f"{op}, {said}, batches of {batch}", loc="left")
            if column == 0:
                panels[line][column].set_ylabel("GB/s")
    words = [machine, "bar: our path, with its ratio; line: its floor", *([note] if note else [])]
    figure.suptitle("\n".join(words), fontsize=8, wrap=True)
    figure.savefig(file)


def _draw_panel(axes: Any, rows: Sequence[Row]) -> None:
    ordered = sorted(rows, key=lambda row: (ALL_PATHS.index(row.path), row.block_bytes))
    for place, row in enumerate(ordered):
        top = max(row.gb_per_s or 0.0, row.floor or 0.0)
        axes.bar(place, row.gb_per_s or 0.0, _BAR_WIDTH, color=_COLORS[row.path])
        if row.floor is not None:
            half = _BAR_WIDTH / 2
            axes.hlines(row.floor, place - half, place + half, color="black", linewidth=2)
        said = "not run" if row.ratio_to_floor is None else f"{row.ratio_to_floor:.2f}"
        weight = "bold" if row.reached else "normal"
        axes.annotate(
            said, (place, top), xytext=(0, 3), textcoords="offset points", ha="center",
            fontsize=8, fontweight=weight,
        )  # fmt: skip
    labels = [f"{row.path}\n{size_text(row.block_bytes)}" for row in ordered]
    axes.set_xticks(range(len(ordered)), labels, fontsize=7)
    axes.grid(visible=True, axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)

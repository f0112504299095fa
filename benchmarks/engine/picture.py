"""The restore curve as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {
    "memory, shared": "#1b9e77",
    "memory, stream": "#7570b3",
    "disk, cold": "#d95f02",
    "slow to answer": "#999999",
}
COMPUTED = "#000000"
Points = Sequence[Mapping[str, Any]]


def draw(machine: str, rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Above when the first token comes; below how much sooner, and what the gate decided."""
    from matplotlib.figure import Figure

    points: Points = rows[0]["details"]["points"]
    models = list(dict.fromkeys(point["model"] for point in points))
    figure = Figure(figsize=(1 + 5.5 * len(models), 9), dpi=110, layout="constrained")
    panels = figure.subplots(2, len(models), squeeze=False)
    for column, model in enumerate(models):
        chosen = [point for point in points if point["model"] == model]
        _draw_times(panels[0][column], chosen)
        panels[0][column].set_title(model, loc="left")
        even = rows[0]["details"]["pays"][model]
        _draw_speed_ups(panels[1][column], chosen, even)
    for axes in figure.axes:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.grid(visible=True, color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(machine, fontsize=8)
    figure.savefig(file)


def _draw_times(axes: Any, points: Points) -> None:
    computed = {point["prompt_tokens"]: point["recompute_ms"] for point in points}
    lengths = sorted(computed)
    times = [computed[length] for length in lengths]
    axes.plot(lengths, times, "o-", color=COMPUTED, label="computed")
    for prefix, style in (("8 blocks", "s:"), ("80% of the prompt", "o-")):
        for source, colour in COLOURS.items():
            these = [p for p in points if (p["prefix"], p["source"]) == (prefix, source)]
            axes.plot(
                [point["prompt_tokens"] for point in these],
                [point["restore_ms"] for point in these],
                style, color=colour, markersize=4, label=f"{prefix} from {source}",
            )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("ms to the first token")
    axes.legend(frameon=False, fontsize=7)


def _draw_speed_ups(axes: Any, points: Points, even: Mapping[str, str]) -> None:
    axes.axhline(1, color=COMPUTED, linewidth=1)
    for source, colour in COLOURS.items():
        these = [point for point in points if point["source"] == source]
        axes.plot([], [], "o", color=colour, label=f"{source}: pays {even[source]}")
        for point in these:
            filled = colour if point.get("gate_restores", True) else "none"
            axes.plot(
                point["restored_tokens"], point["times_sooner"], "o", color=colour,
                markerfacecolor=filled, markersize=7,
            )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("tokens restored (hollow: the gate has them computed)")
    axes.set_ylabel("times sooner than computed")
    axes.legend(frameon=False, fontsize=7, loc="best")

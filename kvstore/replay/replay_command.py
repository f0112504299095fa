"""`kvstore replay`: what each policy would have kept of a trace, beside the optimum."""

import json
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from kvstore.policy.policies import POLICIES
from kvstore.replay.options import progress, read_source, trace_options
from kvstore.replay.replay_report import ReplayReport
from kvstore.replay.runs import OPTIMUM, Cell, PolicyCell, Source, run_cells
from kvstore.replay.trace import Trace

_SHARES = "0.01,0.02,0.05,0.1,0.2,0.5"
_NAMES = [*POLICIES, OPTIMUM]


class Capacity(click.ParamType[str]):
    """A number of blocks, or a share of all that occur in the trace."""

    name = "capacity"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text itself, once each of its parts makes sense."""
        for part in value.split(","):
            try:
                valid = 0 < _amount(part)[0] < float("inf")
            except ValueError:
                valid = False
            if not valid:
                self.fail(
                    f"{part!r} is neither 1000 (blocks) nor 0.05 nor 5% (a share)", param, ctx
                )
        return value


def _amount(text: str) -> tuple[float, bool]:
    """A number, and whether it is a share: it has a point or a percent sign."""
    text = text.strip()
    if text.endswith("%"):
        return float(text[:-1]) / 100, True
    return (float(text), True) if "." in text else (int(text), False)


def capacities_of(texts: Sequence[str], trace: Trace) -> dict[int, float]:
    """What the texts mean for a trace: blocks, at least one, and their share; the least first."""
    found: dict[int, float] = {}
    for part in ",".join(texts).split(","):
        amount, is_share = _amount(part)
        blocks = max(1, int(amount * trace.unique_blocks if is_share else amount))
        found[blocks] = amount if is_share else blocks / max(1, trace.unique_blocks)
    return dict(sorted(found.items()))


@click.command(
    epilog="""\b
Examples:
  kvstore replay trace.jsonl
  kvstore replay trace.jsonl --policy lru --policy default --capacity 1%,10%
  kvstore replay trace.jsonl --hints hints.jsonl --json out.json --png out.png
"""
)
@trace_options
@click.option(
    "--policy",
    "policies",
    multiple=True,
    type=click.Choice(_NAMES),
    help="What evicts; min is the optimum. May be repeated; without it, all of them.",
)
@click.option(
    "--capacity",
    "capacities",
    multiple=True,
    type=Capacity(),
    default=[_SHARES],
    show_default=True,
    help="Room for so many blocks (1000), or for a share of the trace's different blocks (0.05, "
    "5%); may be repeated, or a list with commas.",
)
def replay(
    trace_file: Path,
    hints_file: Path | None,
    limit: int | None,
    jobs: int,
    json_file: Path | None,
    png_file: Path | None,
    policies: Sequence[str],
    capacities: Sequence[str],
) -> None:
    """Run a trace through eviction policies, without moving bytes, beside the offline optimum.

    TRACE has one JSON object per line (the Mooncake or the Qwen-Bailian format, plain or
    gzipped); lines are replayed in the order of their timestamps. The policies are the code that
    a node runs; each begins with an empty cache. The result is the share of all prompt tokens
    that were hits: tokens in the leading full blocks of a prompt that are all there.
    """
    source = Source(trace_file, hints_file, limit)
    trace = read_source(source)
    sizes = capacities_of(capacities, trace)
    names = [name for name in _NAMES if name in policies or not policies]
    cells: list[Cell[float]] = [PolicyCell(name, size) for name in names for size in sizes]
    with progress("replay", len(cells) * len(trace.requests)) as tick:
        rates = dict(run_cells(source, trace, cells, jobs, tick))
    report = ReplayReport(trace, names, sizes, rates)
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    if png_file is not None:
        report.draw(png_file)
    Console().print(report.table())

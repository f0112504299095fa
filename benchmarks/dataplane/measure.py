"""From a plan to rows: each path and its floor in turn, so that noise hits both alike."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.dataplane.plan import MATCH, MATCH_BLOCK_BYTES, Cell, Plan
from benchmarks.dataplane.report import size_text
from benchmarks.dataplane.row import Row, row_of
from benchmarks.dataplane.sampler import Sample
from benchmarks.dataplane.stage import Refused, Stage
from benchmarks.dataplane.through_client import ARGUMENTS, NotThisWay, arguments_for
from benchmarks.dataplane.ways import KNOBS, SERVERS

LEAST_SAMPLES = 3
CELL_S = 3.0
"""A cell without a goal that has taken longer, and has so many samples, gets no more of them."""
KNOB_ROUNDS = 3
"""Each choice of a floor is sampled so often; its median counts."""

Tick = Callable[[str], None]
"""To be called with what comes next, after each cell."""


def measure(plan: Plan, home: Path, tick: Tick) -> list[Row]:
    """All rows of a plan. Files are made in `home` and are the caller's to remove."""
    rows = []
    for block_bytes in plan.block_bytes:
        cells = plan.cells(block_bytes)
        rows += _measure_cells(plan, home, block_bytes, plan.ring_blocks(block_bytes), cells, tick)
    if matches := plan.match_cells():
        blocks = max(cell.batch for cell in matches)
        rows += _measure_cells(plan, home, MATCH_BLOCK_BYTES, blocks, matches, tick)
    return rows


def why_not(path: str) -> str:
    """Why this version of the client cannot be asked for a path; empty: it can."""
    try:
        arguments_for(path)
    except NotThisWay as error:
        return str(error)
    return ""


def _measure_cells(
    plan: Plan, home: Path, block_bytes: int, ring_blocks: int, cells: list[Cell], tick: Tick
) -> list[Row]:
    """The cells of one block size, over one set of processes."""
    clients = max(cell.clients for cell in cells)
    servers = {server for cell in cells for server in SERVERS[cell.floor]}
    servers |= {s for cell in cells for s in SERVERS[cell.path] if not why_not(cell.path)}
    rows: list[Row] = []
    knobs: dict[tuple[str, str], int] = {}
    with Stage(home, block_bytes, ring_blocks, clients, servers) as stage:
        for number, cell in enumerate(cells):
            tick(f"{cell.path} {cell.op} {cell.batch} × {size_text(cell.block_bytes)}")
            if (cell.floor, cell.op) not in knobs:
                knobs[cell.floor, cell.op] = best_knob(plan, stage, cell)
            rows.append(measure_cell(plan, stage, cell, knobs[cell.floor, cell.op]))
            if number + 1 == len(cells) or cells[number + 1].path != cell.path:
                stage.close_way(cell.path)
                stage.close_way(cell.floor)
    return rows


def best_knob(plan: Plan, stage: Stage, cell: Cell) -> int:
    """What the floor of a cell is fastest with; 0: there is nothing to choose."""
    if cell.op == MATCH or cell.floor not in KNOBS:
        return 0
    rates: dict[int, list[float]] = {}
    for _ in range(KNOB_ROUNDS):
        for knob in KNOBS[cell.floor]:
            stage.prepare(cell.floor, cell.op, cell.clients, knob)
            sample = stage.sample(cell.floor, cell.op, cell.batch, cell.clients, plan.sample_s)
            rates.setdefault(knob, []).append(sample.gb_per_s)
    return max(rates, key=lambda knob: statistics.median(rates[knob]))


def measure_cell(plan: Plan, stage: Stage, cell: Cell, knob: int) -> Row:
    """One row. Who begins changes from sample to sample; the first of each warms up."""
    ours: list[Sample] = []
    floors: list[Sample] = []
    reason = why_not(cell.path) if cell.path in ARGUMENTS else ""
    end_s = time.monotonic() + CELL_S
    for number in range(plan.repeats + 1):
        taken: dict[str, Sample] = {}
        pair = [cell.floor, cell.path]
        for way in pair if number % 2 else reversed(pair):
            if way == cell.path and reason:
                continue
            try:
                stage.prepare(way, cell.op, cell.clients, knob if way == cell.floor else 0)
                taken[way] = stage.sample(way, cell.op, cell.batch, cell.clients, plan.sample_s)
                if number == 0 and cell.op == "get":
                    stage.check(way, cell.batch, cell.clients)
            except Refused as refused:
                if way == cell.floor:
                    raise
                reason, ours = str(refused), []
        if number > 0:
            floors.append(taken[cell.floor])
            ours += [taken[cell.path]] if cell.path in taken and not reason else []
        if cell.goal is None and number >= LEAST_SAMPLES and time.monotonic() > end_s:
            break
    return row_of(cell, ours, floors, knob=knob, reason=reason)

"""Whether the default policy keeps up: with LRU in every cell, and with the best of the others.

A cell is a trace and a capacity. The given trace is one; the others are generated, because a
policy that suits one workload proves little.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.proof import Claim, Finding, Proof, Setting, Size, main
from benchmarks.traces import SHAPES, generate
from kvstore.policy.policies import DEFAULT, POLICIES
from kvstore.replay.runs import OPTIMUM, Cell, PolicyCell, Source, run_cells
from kvstore.replay.trace import Trace

CAPACITIES: Mapping[Size, Sequence[float]] = {
    "test": (0.05,),
    "short": (0.01, 0.1),
    "long": (0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
}
SHAPES_OF: Mapping[Size, Sequence[str]] = {
    "test": ("mixed",),
    "short": ("chat", "retrieval", "agents"),
    "long": tuple(name for name in SHAPES if name != "tiny"),
}
STAND_IN = "mixed"
"""The shape that is replayed where no trace is given."""
TRACE_SEED = "1"
"""Generated traces are the same in every run: it is the policy that is measured."""
WITHIN_POINTS = 0.5
LEAST_BLOCKS = 200
"""Smaller caches hold a few prompts: what is best among them is chance."""
OVER_LRU_GENERATED, WITHIN_POINTS_GENERATED = -0.25, 1.0
"""A change of the leader costs: what only the new one holds is computed once more. On traces that
are short beside the cache (a few turnovers) that is not always earned back."""

Rates = Mapping[str, float]
"""Token hit rates in % by policy."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What all policies have on one trace at one capacity."""

    trace: str
    share: float
    rates: Rates

    def over_lru(self) -> float:
        """Points by which the default has more than LRU."""
        return self.rates[DEFAULT] - self.rates["lru"]

    def over_best(self) -> float:
        """Points by which the default has more than the best of the others."""
        return self.rates[DEFAULT] - max(
            rate for name, rate in self.rates.items() if name not in (DEFAULT, OPTIMUM)
        )


def given_trace(setting: Setting) -> tuple[Trace, Source | None, str]:
    """The trace to replay without hints, its file, and what to say where it is none."""
    if setting.trace is not None:
        source = Source(setting.trace)
        return source.read(), source, ""
    trace = generate(STAND_IN, setting.trials, TRACE_SEED)
    reason = f"no trace was given: a generated one of {len(trace.requests):,} requests"
    return trace.hinted([None] * len(trace.requests)), None, reason


def blocks_of(trace: Trace, share: float) -> int:
    """A share of the trace's blocks, one at least."""
    return max(1, int(share * trace.unique_blocks))


def measured(
    trace: Trace, source: Source | None, size: Size, tick: Callable[[int], None]
) -> Iterator[Measured]:
    """Every policy and the optimum at every capacity."""
    names = [*POLICIES, OPTIMUM]
    shares = [share for share in CAPACITIES[size] if blocks_of(trace, share) >= LEAST_BLOCKS]
    cells: list[Cell[float]] = [
        PolicyCell(name, blocks_of(trace, share)) for share in shares for name in names
    ]
    # What was generated is in this process only.
    jobs = 1 if source is None else os.cpu_count() or 1
    found = dict(run_cells(source or Source(Path(os.devnull)), trace, cells, jobs, tick))
    for share in shares:
        blocks = blocks_of(trace, share)
        rates = {name: 100 * found[PolicyCell(name, blocks)] for name in names}
        yield Measured(trace.name, share, rates)


def findings(
    cells: Sequence[Measured], least_over_lru: float, within_points: float, reason: str = ""
) -> list[Finding]:
    """The worst cell against LRU, and the worst against the best of the others."""
    table = {
        f"{cell.trace} {cell.share:.0%}": {
            name: round(rate, 2) for name, rate in cell.rates.items()
        }
        for cell in cells
    }
    below = sum(cell.over_lru() < 0 for cell in cells)
    lru = min(cell.over_lru() for cell in cells)
    best = min(cell.over_best() for cell in cells)
    details = {"cells": len(cells), "below_lru": below, "table": table}
    return [
        Finding(round(lru, 3), lru >= least_over_lru, reason=reason, details=details),
        Finding(round(best, 3), best >= -within_points, reason=reason, details=details),
    ]


def run(setting: Setting) -> list[Finding]:
    """The given trace, then generated ones."""
    names = SHAPES_OF[setting.size]
    step = setting.trials // (1 + len(names))
    trace, source, reason = given_trace(setting)
    given = list(measured(trace, source, setting.size, lambda done: None))
    setting.tick(setting.trials - step * len(names))
    cells: list[Measured] = []
    for name in names:
        made = generate(name, setting.trials, TRACE_SEED)
        made = made.hinted([None] * len(made.requests))
        cells += measured(made, None, setting.size, lambda done: None)
        setting.tick(step)
    return [
        *findings(given, 0.0, WITHIN_POINTS, reason),
        *findings(cells, OVER_LRU_GENERATED, WITHIN_POINTS_GENERATED),
    ]


PROOF = Proof(
    module="eviction",
    about="The default policy against LRU, the best of the others and the optimum. Trials are the "
    "requests of a generated trace.",
    claims=(
        Claim("eviction: default over LRU, worst cell", "points", ">= 0"),
        Claim("eviction: default over the best of the others, worst cell", "points", ">= -0.5"),
        Claim(
            "generated traces: default over LRU, worst cell", "points", f">= {OVER_LRU_GENERATED}"
        ),
        Claim(
            "generated traces: default over the best of the others",
            "points",
            f">= -{WITHIN_POINTS_GENERATED:g}",
        ),
    ),
    trials={"test": 1_000, "short": 5_000, "long": 8_000},
    run=run,
    beside=(),
)

if __name__ == "__main__":
    main(PROOF)

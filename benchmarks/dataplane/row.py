"""What is said of one cell: medians of its samples, beside those of its floor."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.dataplane.plan import MATCH, Cell
from benchmarks.dataplane.sampler import Sample


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the result. None stands where nothing was measured; `reason` says why."""

    path: str
    op: str
    block_bytes: int
    batch: int
    clients: int
    gb_per_s: float | None
    """10^9 bytes per second, over all clients: the median of the samples."""
    floor: float | None
    """The same of the floor."""
    ratio_to_floor: float | None
    """`gb_per_s` by `floor`; for a match its median time by that of the floor's call."""
    p50_ms: float | None
    """Of single calls, those of all samples and clients together."""
    p99_ms: float | None
    cpu_s_per_gb: float | None
    """Of clients and servers together."""
    floor_name: str = ""
    floor_knob: int = 0
    """What the floor was best with: bytes of a message, or requests in flight; 0: no choice."""
    floor_p50_ms: float | None = None
    floor_p99_ms: float | None = None
    floor_cpu_s_per_gb: float | None = None
    samples: int = 0
    ratios: tuple[float, ...] = ()
    """Of each sample to the one of the floor beside it: how far the machine's noise reaches."""
    goal: float | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def reached(self) -> bool | None:
        """Whether the ratio is what is asked for; None where nothing is."""
        if self.goal is None or self.ratio_to_floor is None:
            return None
        if self.op == MATCH:
            return self.ratio_to_floor <= self.goal
        return self.ratio_to_floor >= self.goal


def row_of(
    cell: Cell, ours: Sequence[Sample], floors: Sequence[Sample], *, knob: int = 0, reason: str = ""
) -> Row:
    """The row of a cell. `ours` may be empty: then only the floor was measured."""
    is_match = cell.op == MATCH
    ours_ms, floors_ms = _call_ms(ours), _call_ms(floors)
    measure = _median_call_s if is_match else _rate
    return Row(
        path=cell.path,
        op=cell.op,
        block_bytes=cell.block_bytes,
        batch=cell.batch,
        clients=cell.clients,
        gb_per_s=None if is_match else _median([sample.gb_per_s for sample in ours]),
        floor=None if is_match else _median([sample.gb_per_s for sample in floors]),
        ratio_to_floor=(
            _ratio(_median(ours_ms), _median(floors_ms))
            if is_match
            else _ratio(_median(list(map(_rate, ours))), _median(list(map(_rate, floors))))
        ),
        p50_ms=_median(ours_ms),
        p99_ms=_percentile(ours_ms, 99),
        cpu_s_per_gb=None if is_match else _median([sample.cpu_s_per_gb for sample in ours]),
        floor_name=cell.floor_title,
        floor_knob=knob,
        floor_p50_ms=_median(floors_ms),
        floor_p99_ms=_percentile(floors_ms, 99),
        floor_cpu_s_per_gb=None if is_match else _median([s.cpu_s_per_gb for s in floors]),
        samples=len(ours),
        ratios=tuple(
            measure(mine) / measure(floor) for mine, floor in zip(ours, floors, strict=False)
        ),
        goal=cell.goal,
        reason=reason,
    )


def _rate(sample: Sample) -> float:
    return sample.gb_per_s


def _median_call_s(sample: Sample) -> float:
    return statistics.median(sample.call_s)


def _call_ms(samples: Sequence[Sample]) -> list[float]:
    return sorted(1000 * seconds for sample in samples for seconds in sample.call_s)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _percentile(ascending: Sequence[float], percent: float) -> float | None:
    """The least value that so many percent of them do not exceed."""
    if not ascending:
        return None
    return ascending[max(0, math.ceil(len(ascending) * percent / 100) - 1)]


def _ratio(ours: float | None, floor: float | None) -> float | None:
    return None if ours is None or floor is None else ours / floor

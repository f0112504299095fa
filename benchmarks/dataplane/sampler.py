"""Calls on the clock: one sample of one way, in one client process."""

import asyncio
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Move = Callable[[range], Any]
"""Moves the blocks at these places: a coroutine function, or a function that blocks."""


@dataclass(slots=True)
class Sample:
    """What a few calls took. Times are those of the system's monotonic clock, in seconds."""

    moved_bytes: int
    start_s: float
    end_s: float
    call_s: list[float]
    cpu_s: float
    """Of this process alone."""

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes per second, over all clients."""
        return self.moved_bytes / 1e9 / (self.end_s - self.start_s)

    @property
    def cpu_s_per_gb(self) -> float:
        """Seconds of all CPUs for 10^9 bytes."""
        return self.cpu_s / (self.moved_bytes / 1e9)

    @classmethod
    def together(cls, samples: Sequence["Sample"], servers_cpu_s: float) -> "Sample":
        """One sample of clients that began at the same moment, with what the servers took."""
        return cls(
            sum(sample.moved_bytes for sample in samples),
            min(sample.start_s for sample in samples),
            max(sample.end_s for sample in samples),
            [seconds for sample in samples for seconds in sample.call_s],
            sum(sample.cpu_s for sample in samples) + servers_cpu_s,
        )


async def take_sample(
    move: Move,
    calls: Sequence[range],
    *,
    block_bytes: int,
    tasks: int,
    most_s: float,
    tidy: Move | None = None,
) -> Sample:
    """Makes the calls in order, `tasks` at a time, until all are made or the time is over.

    At least one call for each task. `tidy` is called after each call and is not timed.
    """
    spans: list[tuple[int, float, float]] = []
    shared = iter(calls)  # A list's iterator hands each call out once, to whichever thread.
    cpu_s = time.process_time()
    end_s = time.monotonic() + most_s
    if inspect.iscoroutinefunction(move):
        await asyncio.gather(*(_flow(move, shared, end_s, spans, tidy) for _ in range(tasks)))
    elif tasks == 1:
        _block(move, shared, end_s, spans)
    else:
        works = [asyncio.to_thread(_block, move, shared, end_s, spans) for _ in range(tasks)]
        await asyncio.gather(*works)
    cpu_s = time.process_time() - cpu_s
    return Sample(
        sum(blocks for blocks, _, _ in spans) * block_bytes,
        min(begun for _, begun, _ in spans),
        max(ended for _, _, ended in spans),
        [ended - begun for _, begun, ended in spans],
        cpu_s,
    )


async def _flow(
    move: Move,
    calls: Iterator[range],
    end_s: float,
    spans: list[tuple[int, float, float]],
    tidy: Move | None,
) -> None:
    for places in calls:
        begun = time.monotonic()
        await move(places)
        ended = time.monotonic()
        spans.append((len(places), begun, ended))
        if tidy is not None:
            await tidy(places)
        if ended >= end_s:
            return


def _block(
    move: Move, calls: Iterator[range], end_s: float, spans: list[tuple[int, float, float]]
) -> None:
    for places in calls:
        begun = time.monotonic()
        move(places)
        ended = time.monotonic()
        spans.append((len(places), begun, ended))
        if ended >= end_s:
            return

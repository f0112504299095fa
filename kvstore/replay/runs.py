"""Many replays of one trace: every policy at every capacity, in as many processes as asked."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Protocol, TypeVar

from kvstore.policy.policies import make_policy
from kvstore.replay.optimum import optimum
from kvstore.replay.readers import read_hints, read_trace
from kvstore.replay.replay import replay
from kvstore.replay.trace import Trace

OPTIMUM = "min"
"""What the optimum is called among the policies."""

_POLL_S = 0.2

R = TypeVar("R", covariant=True)


class Cell(Protocol[R]):
    """One replay of many. It travels to another process and back: it can be pickled and hashed."""

    def run(self, trace: Trace, tick: Callable[[int], None]) -> R:
        """Replays the trace; `tick` hears of the requests that were done since its last call."""


@dataclass(frozen=True, slots=True)
class PolicyCell:
    """The token hit rate of a policy, or of the optimum, at a capacity."""

    policy: str
    capacity_blocks: int

    def run(self, trace: Trace, tick: Callable[[int], None]) -> float:
        if self.policy == OPTIMUM:
            return optimum(trace, self.capacity_blocks, tick)
        policy = make_policy(self.policy, self.capacity_blocks)
        return replay(trace, policy, self.capacity_blocks, tick)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a trace comes from, for processes that read it themselves."""

    trace: Path
    hints: Path | None = None
    limit: int | None = None

    def read(self) -> Trace:
        """The trace, with its hints. Raises `TraceError`, `OSError`."""
        trace = read_trace(self.trace, self.limit)
        return trace if self.hints is None else trace.hinted(read_hints(self.hints, trace))


def run_cells(
    source: Source,
    trace: Trace,
    cells: Sequence[Cell[R]],
    jobs: int,
    tick: Callable[[int], None],
) -> Iterator[tuple[Cell[R], R]]:
    """What each cell finds, as they end; `trace` is what `source` reads.

    `tick` hears of the requests that were replayed. Leaving early ends the processes.
    """
    jobs = min(jobs, len(cells))
    if jobs <= 1:
        for cell in cells:
            yield cell, cell.run(trace, tick)
        return
    context = multiprocessing.get_context("spawn")
    done: Synchronized[int] = context.Value("q", 0)
    told = 0
    with ExitStack() as stack:
        with _interrupt_held_back():
            pool = stack.enter_context(context.Pool(jobs, _prepare, (source, done)))
        results = pool.imap_unordered(_run, cells)
        for _ in cells:
            finished = None
            while finished is None:
                with suppress(multiprocessing.TimeoutError):
                    finished = results.next(timeout=_POLL_S)
                total = done.value
                tick(total - told)
                told = total
            yield finished


@contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Ctrl-C waits until this is over, and processes that are begun meanwhile never hear of it.

    It reaches all processes of a terminal from their first moment on; the first one ends the
    others. The mask is what they inherit; it does not keep other threads of this one from hearing.
    """
    heard: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if heard:
            signal.raise_signal(signal.SIGINT)


class _Worker:
    """What a process of the pool keeps between cells."""

    trace: Trace
    done: "Synchronized[int]"


def _prepare(source: Source, done: "Synchronized[int]") -> None:
    _Worker.trace, _Worker.done = source.read(), done


def _run(cell: Cell[R]) -> tuple[Cell[R], R]:
    return cell, cell.run(_Worker.trace, _count)


def _count(requests: int) -> None:
    with _Worker.done.get_lock():
        _Worker.done.value += requests

"""Transfers beside the scheduler: each is submitted once and reported once."""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from kvstore.api.clock import Clock
from kvstore_client.vllm_tier.requests import Request

_log = logging.getLogger("kvstore.vllm_tier")


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """Chunks to move between rows of the primary tier and the node."""

    number: int
    """As vLLM calls it."""
    request: Request
    keys: Sequence[bytes]
    rows: Sequence[int]
    """Where each chunk lies, or shall lie."""
    is_load: bool
    submitted_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What became of a job. Nothing touches its rows any more."""

    job: Job
    moved: frozenset[bytes]
    """The chunks that are where they should be: in their rows, verified, or in the node."""
    seconds: float = 0.0
    refused: bool = False
    """It was not tried."""

    @property
    def succeeded(self) -> bool:
        """Whether all of it was moved."""
        return len(self.moved) == len(self.job.keys)


Move = Callable[[Job], Collection[bytes]]
"""Moves a job's chunks, within its budget, and answers which were moved."""


@dataclass(slots=True)
class _State:
    waiting: deque[Job] = field(default_factory=deque)
    waiting_chunks: int = 0
    running: int = 0
    closing: bool = False


class Lane:
    """A few threads that run jobs in the order in which they came.

    Invariant: each job that was submitted is put into `outcomes` once, when nothing touches its
    rows any more.
    """

    def __init__(
        self,
        name: str,
        move: Move,
        outcomes: "queue.SimpleQueue[Outcome]",
        clock: Clock,
        *,
        threads: int,
        max_waiting_chunks: int,
    ) -> None:
        self._move = move
        self._outcomes = outcomes
        self._clock = clock
        self._max_waiting_chunks = max_waiting_chunks
        self._changed = threading.Condition()
        self._state = _State()  # Guarded by the condition.
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Takes a job; one that finds as much waiting as may wait is refused, and reported so.

        However large: vLLM offers what a step has computed as one, and would never offer less.
        """
        with self._changed:
            state = self._state
            if not state.closing and state.waiting_chunks < self._max_waiting_chunks:
                state.waiting.append(job)
                state.waiting_chunks += len(job.keys)
                self._changed.notify()
                return
        self._outcomes.put(Outcome(job, frozenset(), refused=True))

    def drain(self) -> None:
        """Refuses what is waiting and returns when nothing is under way, which budgets bound."""
        with self._changed:
            refused = list(self._state.waiting)
            self._state.waiting.clear()
            self._state.waiting_chunks = 0
            self._changed.wait_for(lambda: not self._state.running)
        for job in refused:
            self._outcomes.put(Outcome(job, frozenset(), refused=True))

    def close(self) -> None:
        """Finishes what was submitted, as far as its budget goes, and ends the threads.

        Idempotent.
        """
        with self._changed:
            self._state.closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            start_s = self._clock.monotonic_s()
            moved: Collection[bytes] = ()
            try:
                moved = self._move(job)
            except Exception:  # noqa: BLE001 - the thread's edge: a lost job is a miss
                _log.exception("a transfer of %d chunks is lost", len(job.keys))
            seconds = self._clock.monotonic_s() - start_s
            self._outcomes.put(Outcome(job, frozenset(moved), seconds))
            with self._changed:
                self._state.running -= 1
                self._changed.notify_all()

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._state.waiting or self._state.closing)
            if not self._state.waiting:
                return None
            job = self._state.waiting.popleft()
            self._state.waiting_chunks -= len(job.keys)
            self._state.running += 1
            return job

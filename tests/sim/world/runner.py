"""The twin of a pool of threads: work ends after some time, in any order, whoever still waits."""

import asyncio
import random
from collections.abc import Callable
from typing import TypeVar

from tests.sim.world.loop import Process

T = TypeVar("T")

USUAL_S = 0.002


class SeededRunner:
    """A `Runner` whose work takes effect at a seeded moment, all of it at once.

    What has not begun when the process dies never happens.
    """

    def __init__(self, rng: random.Random, process: Process) -> None:
        self._rng = rng
        self._process = process
        self._loop = asyncio.get_running_loop()
        self.slow_s = 0.0
        """How much longer work may take for now."""

    async def run(self, work: Callable[[], T]) -> T:
        outcome: asyncio.Future[T] = self._loop.create_future()
        longest_s = self.slow_s or (USUAL_S if self._rng.random() < 0.5 else 0.0)
        if longest_s:
            self._loop.call_later(self._rng.random() * longest_s, self._do, work, outcome)
        else:
            self._loop.call_soon(self._do, work, outcome)
        return await outcome

    def _do(self, work: Callable[[], T], outcome: "asyncio.Future[T]") -> None:
        if not self._process.alive:
            return
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - it is the caller's to judge
            if not outcome.done():
                outcome.set_exception(error)
            return
        if not outcome.done():
            outcome.set_result(result)

    async def close(self, timeout_s: float) -> bool:
        return True

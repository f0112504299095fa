"""Twins of `kvstore.runner`: work that runs at once, or only when a test lets it."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from tests.sim.clock import settle

T = TypeVar("T")


class InlineRunner:
    """Runs work at once in the caller's thread: the same order at every run."""

    async def run(self, work: Callable[[], T]) -> T:
        return work()

    async def close(self, timeout_s: float) -> bool:
        return True


class GatedRunner:
    """Like a busy pool of threads: while `held`, work waits, and waits on when its caller is gone.

    `release` runs what waits, oldest first.
    """

    def __init__(self) -> None:
        self.held = False
        self._waiting: list[Callable[[], None]] = []

    @property
    def waiting(self) -> int:
        """How many pieces of work wait."""
        return len(self._waiting)

    async def run(self, work: Callable[[], T]) -> T:
        if not self.held:
            return work()
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def do() -> None:
            try:
                result = work()
            except Exception as error:  # noqa: BLE001 - it is the caller's to judge
                if not outcome.done():
                    outcome.set_exception(error)
                return
            if not outcome.done():
                outcome.set_result(result)

        self._waiting.append(do)
        return await outcome

    async def step(self) -> None:
        """Does the oldest piece of what waits."""
        if self._waiting:
            self._waiting.pop(0)()
        await settle()

    async def release(self) -> None:
        """Does what waits, and lets through what comes later."""
        self.held = False
        waiting, self._waiting = self._waiting, []
        for do in waiting:
            do()
        await settle()

    async def close(self, timeout_s: float) -> bool:
        return not self._waiting

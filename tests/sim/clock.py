"""The twin of `kvstore.api.clock`: time that moves when a test says so, and never back."""

import asyncio
import heapq
import itertools

SETTLE_ROUNDS = 20
"""Turns of the event loop after which everything that needs no other thread has happened."""


async def settle() -> None:
    """Lets every coroutine that could go on do so."""
    for _ in range(SETTLE_ROUNDS):
        await asyncio.sleep(0)


class ManualClock:
    """A `Clock` whose time stands still between two calls of `advance`."""

    def __init__(self, wall_s: float = 1_700_000_000.0) -> None:
        self._now_s = 0.0
        self._started_wall_s = wall_s
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def monotonic_s(self) -> float:
        return self._now_s

    def wall_s(self) -> float:
        return self._started_wall_s + self._now_s

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        wake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now_s + seconds, next(self._order), wake))
        await wake

    async def advance(self, seconds: float) -> None:
        """Moves time on, from sleeper to sleeper, and lets each do what it waited for."""
        assert seconds >= 0, "time does not go back"
        await settle()
        end_s = self._now_s + seconds
        while self._sleepers and self._sleepers[0][0] <= end_s:
            due_s, _, wake = heapq.heappop(self._sleepers)
            self._now_s = max(self._now_s, due_s)
            if not wake.done():
                wake.set_result(None)
            await settle()
        self._now_s = end_s
        await settle()

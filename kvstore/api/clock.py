"""The seam of time: whoever waits or expires gets a `Clock` as an argument."""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Where time comes from."""

    def monotonic_s(self) -> float:
        """Seconds since some fixed moment; never goes back. All intervals use it."""

    def wall_s(self) -> float:
        """Seconds since 1970. For what outlives the process, such as an expiry on disk."""

    async def sleep(self, seconds: float) -> None:
        """Waits."""


class SystemClock:
    """The machine's own clocks."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

"""A tier that is broken or late is a miss and a counter, nothing else."""

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from kvstore.api.clock import Clock
from kvstore.api.errors import TierError
from kvstore.api.tier import Block, BlockRef, Load, Loaded, Tier, Usage
from kvstore.metrics import Metrics

T = TypeVar("T")

_log = logging.getLogger("kvstore.tiers")

FAILURES_TO_OPEN = 3
OPEN_S = 1.0


class Guarded:
    """`inner` with a deadline for each batch (a shorter one for look-ups) and a breaker.

    After three failures in a row the breaker opens: for a second everything is a miss at once,
    then one batch at a time tries again, until one succeeds.
    """

    def __init__(
        self,
        inner: Tier,
        *,
        lookup_timeout_s: float,
        timeout_s: float,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._inner = inner
        self._lookup_s = lookup_timeout_s
        self._batch_s = timeout_s
        self._clock = clock
        self._metrics = metrics
        self._failures = 0
        self._retry_at_s = 0.0
        self.name = inner.name

    @property
    def serving(self) -> bool:
        """False while the breaker is open."""
        return self._failures < FAILURES_TO_OPEN

    async def locate(self, refs: Sequence[BlockRef]) -> list[str | None]:
        return await self._attempt(self._inner.locate(refs), self._lookup_s, [None] * len(refs))

    async def wants(self, refs: Sequence[BlockRef]) -> list[bool]:
        # A tier that does not answer is offered the blocks, and will be seen to refuse them.
        unknown = [True] * len(refs)
        return await self._attempt(self._inner.wants(refs), self._lookup_s, unknown)

    async def load(self, loads: Sequence[Load]) -> list[Loaded | None]:
        miss: list[Loaded | None] = [None] * len(loads)
        return await self._attempt(self._inner.load(loads), self._batch_s, miss)

    async def store(self, blocks: Sequence[Block]) -> list[bool]:
        return await self._attempt(self._inner.store(blocks), self._batch_s, [False] * len(blocks))

    async def discard(self, refs: Sequence[BlockRef]) -> int:
        return await self._inner.discard(refs)

    async def clear(self, namespace: bytes) -> int:
        return await self._inner.clear(namespace)

    def usage(self) -> list[Usage]:
        return [usage._replace(serving=self.serving) for usage in self._inner.usage()]

    async def close(self) -> None:
        await self._inner.close()

    async def _attempt(self, call: Coroutine[Any, Any, T], timeout_s: float, miss: T) -> T:
        if not self._admit():
            call.close()
            self._metrics.tier_errors.labels(self.name, "open").inc()
            return miss
        try:
            async with asyncio.timeout(timeout_s):
                answer = await call
        except TimeoutError:
            self._failed("late", f"no answer within {timeout_s} s")
            return miss
        except (TierError, OSError) as error:
            self._failed("error", str(error))
            return miss
        if not self.serving:
            _log.info("tier %s serves again", self.name)
        self._failures = 0
        return answer

    def _admit(self) -> bool:
        now_s = self._clock.monotonic_s()
        if self.serving:
            return True
        if now_s < self._retry_at_s:
            return False
        self._retry_at_s = now_s + OPEN_S
        return True

    def _failed(self, cause: str, message: str) -> None:
        self._metrics.tier_errors.labels(self.name, cause).inc()
        self._failures += 1
        if self._failures == FAILURES_TO_OPEN:
            _log.warning("tier %s is skipped for now: %s", self.name, message)
        if not self.serving:
            self._retry_at_s = self._clock.monotonic_s() + OPEN_S

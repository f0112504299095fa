"""A tier that is broken, late or too busy is a miss and a counter, nothing else."""

import asyncio
import logging
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any, TypeVar

from kvstore.api.clock import Clock
from kvstore.api.errors import TierError
from kvstore.api.tier import Block, BlockRef, Load, Loaded, Tier, Usage
from kvstore.metrics import Metrics
from kvstore.tiers.breaker import FAILURES_TO_OPEN, OPEN_S, Breaker
from kvstore.tiers.window import Window

__all__ = ["FAILURES_TO_OPEN", "OPEN_S", "Guarded"]

T = TypeVar("T")

_log = logging.getLogger("kvstore.tiers")

MAX_LOOKUPS = 256
"""Batches of look-ups under way at once."""
QUEUE_BYTES = 256 << 20
"""Of blocks that are being read, and as many that are being written, at most."""
CLEAR_S = 30.0
"""For a clear, where a batch has less: it may have to look through all that the tier holds."""
FOREVER_S = 1e9
TARGET = 0.25
"""Part of the deadline that an answer may take before the tier counts as overloaded."""


class Guarded:
    """`inner` with a deadline for each batch (a shorter one for look-ups), bounds and breakers.

    A clear has `clear_timeout_s`, or the deadline of a batch if that is longer.

    More than fits under way is a miss at once. After three failures in a row a breaker opens: for
    a second everything is a miss at once, then one batch at a time tries again, at most one a
    second, until one succeeds. Writes have a breaker of their own, because what is full or
    read-only can still be read; but what cannot be read is not written to.
    """

    def __init__(
        self,
        inner: Tier,
        *,
        lookup_timeout_s: float,
        timeout_s: float,
        clock: Clock,
        metrics: Metrics,
        queue_bytes: int = QUEUE_BYTES,
        clear_timeout_s: float = CLEAR_S,
    ) -> None:
        self._inner = inner
        self._lookup_s = lookup_timeout_s
        self._batch_s = timeout_s
        self._clear_s = max(timeout_s, clear_timeout_s)
        self._clock = clock
        self._metrics = metrics
        self._reads = Breaker()
        self._writes = Breaker()
        self._lookups = Window(MAX_LOOKUPS, FOREVER_S)
        self._loads = Window(queue_bytes, timeout_s * TARGET)
        self._stores = Window(queue_bytes, timeout_s * TARGET)
        self.name = inner.name

    @property
    def serving(self) -> bool:
        """False while a breaker is open."""
        return self._reads.closed and self._writes.closed

    @property
    def room_bytes(self) -> float:
        """How much more may be under way to be read."""
        return max(self._loads.limit_bytes - self._loads.used_bytes, 0.0)

    def full(self, size: int) -> bool:
        """Whether a load of `size` bytes would be a miss at once."""
        return not self._loads.admits(size)

    async def locate(self, refs: Sequence[BlockRef]) -> list[str | None]:
        call = self._inner.locate(refs)
        return await self._attempt(
            call, [None] * len(refs), self._lookup_s, [self._reads], self._lookups, 1
        )

    async def wants(self, refs: Sequence[BlockRef]) -> list[bool]:
        # A tier that does not answer is offered the blocks, and will be seen to refuse them.
        unknown = [True] * len(refs)
        if not self._writes.closed:
            self._metrics.tier_errors.labels(self.name, "open").inc()
            return unknown
        # That it can tell what it wants does not mean that it takes it: only a store proves that.
        call = self._inner.wants(refs)
        return await self._attempt(
            call, unknown, self._lookup_s, [self._reads], self._lookups, 1, blamed=self._writes
        )

    async def load(self, loads: Sequence[Load]) -> list[Loaded | None]:
        call, size = self._inner.load(loads), sum(len(load.into) for load in loads)
        miss: list[Loaded | None] = [None] * len(loads)
        return await self._attempt(call, miss, self._batch_s, [self._reads], self._loads, size)

    async def store(self, blocks: Sequence[Block]) -> list[bool]:
        call, size = self._inner.store(blocks), sum(len(block.data) for block in blocks)
        refused = [False] * len(blocks)
        breakers = [self._reads, self._writes]
        return await self._attempt(call, refused, self._batch_s, breakers, self._stores, size)

    async def discard(self, refs: Sequence[BlockRef]) -> int:
        return await self._insist(self._inner.discard(refs), self._batch_s)

    async def clear(self, namespace: bytes) -> int:
        return await self._insist(self._inner.clear(namespace), self._clear_s)

    def usage(self) -> list[Usage]:
        return [usage._replace(serving=self.serving) for usage in self._inner.usage()]

    async def close(self) -> None:
        await self._inner.close()

    async def _insist(self, call: Awaitable[int], timeout_s: float) -> int:
        """What was not forgotten in time was not forgotten: TierError, and no miss."""
        try:
            async with asyncio.timeout(timeout_s):
                return await call
        except TimeoutError:
            raise TierError(f"{self.name}: no answer within {timeout_s} s") from None

    async def _attempt(
        self,
        call: Coroutine[Any, Any, T],
        miss: T,
        timeout_s: float,
        breakers: Sequence[Breaker],
        window: Window,
        size: int,
        *,
        blamed: Breaker | None = None,
    ) -> T:
        began_s = self._clock.monotonic_s()
        cause = None
        if not all(breaker.admits(began_s) for breaker in breakers):
            cause = "open"
        elif not window.admits(size):
            cause = "full"
        if cause is not None:
            call.close()
            self._metrics.tier_errors.labels(self.name, cause).inc()
            return miss
        for breaker in breakers:
            breaker.begin(began_s)
        window.begin(size, began_s)
        answer = miss
        try:
            answer = await self._answer(call, miss, timeout_s, breakers, blamed or breakers[-1])
        finally:
            # A batch that fails is as good as none: what is always late gets a short queue.
            window.end(size, self._clock.monotonic_s(), delivered=answer is not miss)
        return answer

    async def _answer(
        self,
        call: Coroutine[Any, Any, T],
        miss: T,
        timeout_s: float,
        breakers: Sequence[Breaker],
        blamed: Breaker,
    ) -> T:
        try:
            async with asyncio.timeout(timeout_s):
                answer = await call
        except TimeoutError:
            self._failed("late", f"no answer within {timeout_s} s", breakers, blamed)
            return miss
        except (TierError, OSError) as error:
            self._failed("error", str(error), breakers, blamed)
            return miss
        except BaseException:
            for breaker in breakers:
                breaker.abandoned()
            raise
        self._succeeded(breakers)
        return answer

    def _succeeded(self, breakers: Sequence[Breaker]) -> None:
        was_serving = self.serving
        if not self._reads.closed:
            breakers = [self._reads, self._writes]  # What is back may be written to again.
        for breaker in breakers:
            breaker.succeeded()
        if self.serving and not was_serving:
            _log.info("tier %s serves again", self.name)

    def _failed(
        self, cause: str, message: str, breakers: Sequence[Breaker], blamed: Breaker
    ) -> None:
        self._metrics.tier_errors.labels(self.name, cause).inc()
        now_s = self._clock.monotonic_s()
        for breaker in breakers:
            # A refused write says nothing about reads, unless it was their way to try again.
            if breaker is not blamed and not breaker.closed:
                breaker.failed(now_s)
        if blamed.failed(now_s):
            _log.warning("tier %s is skipped for now: %s", self.name, message)

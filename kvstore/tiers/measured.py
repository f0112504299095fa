"""Counts and times what any tier does."""

from collections.abc import Sequence

from kvstore.api.clock import Clock
from kvstore.api.tier import Block, BlockRef, Load, Loaded, Tier, Usage
from kvstore.metrics import Metrics


class Measured:
    """`inner`, with its hits, misses, bytes and times in `metrics`."""

    def __init__(self, inner: Tier, clock: Clock, metrics: Metrics) -> None:
        self._inner = inner
        self._clock = clock
        self._metrics = metrics
        self.name = inner.name

    async def locate(self, refs: Sequence[BlockRef]) -> list[str | None]:
        return await self._inner.locate(refs)

    async def wants(self, refs: Sequence[BlockRef]) -> list[bool]:
        return await self._inner.wants(refs)

    async def load(self, loads: Sequence[Load]) -> list[Loaded | None]:
        started = self._clock.monotonic_s()
        answers = await self._inner.load(loads)
        sizes = [len(load.into) for load, hit in zip(loads, answers, strict=True) if hit]
        self._count("load", started, "hit", len(sizes), "miss", len(loads), sum(sizes))
        return answers

    async def store(self, blocks: Sequence[Block]) -> list[bool]:
        started = self._clock.monotonic_s()
        answers = await self._inner.store(blocks)
        sizes = [len(block.data) for block, held in zip(blocks, answers, strict=True) if held]
        self._count("store", started, "held", len(sizes), "refused", len(blocks), sum(sizes))
        return answers

    async def discard(self, refs: Sequence[BlockRef]) -> int:
        return await self._inner.discard(refs)

    async def clear(self, namespace: bytes) -> int:
        return await self._inner.clear(namespace)

    def usage(self) -> list[Usage]:
        return self._inner.usage()

    async def close(self) -> None:
        await self._inner.close()

    def _count(
        self, op: str, started: float, good: str, goods: int, bad: str, asked: int, size: int
    ) -> None:
        seconds = self._clock.monotonic_s() - started
        self._metrics.tier_seconds.labels(self.name, op).observe(seconds)
        self._metrics.tier_operations.labels(self.name, op, good).inc(goods)
        self._metrics.tier_operations.labels(self.name, op, bad).inc(asked - goods)
        self._metrics.tier_bytes.labels(self.name, op).inc(size)

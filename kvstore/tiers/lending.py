"""Blocks read without their chain: one read however many ask, shared while it is fresh."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from kvstore.api.tier import Block, BlockRef, Load, Loaded, Tier, Usage
from kvstore.metrics import Metrics


class Lent(NamedTuple):
    """A block for several readers at once. `view` is read-only and stays valid while it is held."""

    view: memoryview
    digest: bytes
    tier: str


class Lending:
    """`inner`, which also lends blocks to callers who cannot say to which chain they belong.

    A block gets a place in memory only with its parent, or what memory keeps would have gaps.
    What is asked for without one is read into a buffer that all callers of the moment share, and
    the last `keep_bytes` of such blocks are kept for those who come a little later.

    Invariant: `kept_bytes` is the sum of what is kept, and at most `keep_bytes`.
    """

    def __init__(self, inner: Tier, metrics: Metrics, *, keep_bytes: int) -> None:
        self._inner = inner
        self._metrics = metrics
        self._keep_bytes = keep_bytes
        self._kept: OrderedDict[BlockRef, Lent] = OrderedDict()
        self._readings: dict[BlockRef, asyncio.Task[dict[BlockRef, Lent]]] = {}
        self.kept_bytes = 0
        self.name = inner.name

    async def lend(self, sizes: Mapping[BlockRef, int]) -> dict[BlockRef, Lent]:
        """The blocks of these sizes that are here; nothing for the others.

        A reading goes on when its caller is cancelled: others may wait for it.
        """
        answers = self._recall(sizes)
        missing = [ref for ref in sizes if ref not in answers]
        fresh = {ref: sizes[ref] for ref in missing if ref not in self._readings}
        self._metrics.shared_blocks.inc(len(sizes) - len(fresh))
        if fresh:
            reading = asyncio.create_task(self._read(fresh))
            # Whoever waits hears of its error; it may be that nobody is left.
            reading.add_done_callback(lambda task: task.cancelled() or task.exception())
            self._readings |= dict.fromkeys(fresh, reading)
        answers |= await self._arriving(missing)
        return {ref: lent for ref, lent in answers.items() if len(lent.view) == sizes[ref]}

    def lends(self, ref: BlockRef) -> bool:
        """Whether the block is kept, or on its way."""
        return ref in self._kept or ref in self._readings

    async def load(self, loads: Sequence[Load]) -> list[Loaded | None]:
        """As ever; but what is being lent is not read again, and has then found its place."""
        refs = [load.ref for load in loads]
        awaited = {ref for ref in refs if ref in self._readings}
        lent = self._recall(refs) | await self._arriving(awaited)
        answers: list[Loaded | None] = [None] * len(loads)
        rest = []
        for index, load in enumerate(loads):
            here = lent.get(load.ref)
            if here is not None and len(here.view) == len(load.into):
                load.into[:] = here.view
                answers[index] = Loaded(here.tier, here.digest)
            elif load.ref not in awaited:
                rest.append(index)
        self._metrics.shared_blocks.inc(len(loads) - len(rest))
        if rest:
            read = await self._inner.load([loads[index] for index in rest])
            for index, answer in zip(rest, read, strict=True):
                answers[index] = answer
        self._drop(lent)
        return answers

    async def locate(self, refs: Sequence[BlockRef]) -> list[str | None]:
        return await self._inner.locate(refs)

    async def wants(self, refs: Sequence[BlockRef]) -> list[bool]:
        return await self._inner.wants(refs)

    async def store(self, blocks: Sequence[Block]) -> list[bool]:
        return await self._inner.store(blocks)

    async def discard(self, refs: Sequence[BlockRef]) -> int:
        gone = set(refs)
        return await self.forget(self._inner.discard(refs), lambda ref: ref in gone)

    async def clear(self, namespace: bytes) -> int:
        return await self.forget(
            self._inner.clear(namespace), lambda ref: ref.namespace == namespace
        )

    def usage(self) -> list[Usage]:
        return self._inner.usage()

    async def close(self) -> None:
        if self._readings:
            await asyncio.wait(set(self._readings.values()))
        self._drop(list(self._kept))
        await self._inner.close()

    def check(self) -> None:
        """Recomputes the invariant; AssertionError if it broke."""
        kept = sum(len(lent.view) for lent in self._kept.values())
        assert kept == self.kept_bytes <= self._keep_bytes, f"{kept} kept, {self.kept_bytes} known"

    async def _read(self, sizes: Mapping[BlockRef, int]) -> dict[BlockRef, Lent]:
        try:
            places = await self._inner.locate(list(sizes))
            # A buffer only for what is there: who asks for what is nowhere must not cost much.
            here = [ref for ref, place in zip(sizes, places, strict=True) if place is not None]
            loads = [Load(ref, memoryview(bytearray(sizes[ref]))) for ref in here]
            answers = await self._inner.load(loads) if loads else []
            read = {
                load.ref: Lent(load.into.toreadonly(), loaded.digest, loaded.tier)
                for load, loaded in zip(loads, answers, strict=True)
                if loaded is not None
            }
            self._keep(read)
            return read
        finally:
            for ref in sizes:
                del self._readings[ref]

    async def _arriving(self, refs: Collection[BlockRef]) -> dict[BlockRef, Lent]:
        """Those of the blocks that are being read, once they are."""
        readings = {self._readings[ref] for ref in refs if ref in self._readings}
        if not readings:
            return {}
        await asyncio.wait(readings)
        read = {ref: lent for reading in readings for ref, lent in reading.result().items()}
        return {ref: read[ref] for ref in refs if ref in read}

    def _recall(self, refs: Collection[BlockRef]) -> dict[BlockRef, Lent]:
        return {ref: self._kept[ref] for ref in refs if ref in self._kept}

    def _keep(self, read: Mapping[BlockRef, Lent]) -> None:
        for ref, lent in read.items():
            self._kept[ref] = lent
            self.kept_bytes += len(lent.view)
        while self.kept_bytes > self._keep_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.kept_bytes -= len(oldest.view)

    def _drop(self, refs: Collection[BlockRef]) -> None:
        for ref in refs:
            lent = self._kept.pop(ref, None)
            self.kept_bytes -= len(lent.view) if lent is not None else 0

    async def forget(self, forgetting: Awaitable[int], concerns: Callable[[BlockRef], bool]) -> int:
        """What `forgetting` answers; what it concerns is not lent any more."""
        try:
            return await forgetting
        finally:
            # What was read before it was forgotten must not be kept after.
            readings = {task for ref, task in self._readings.items() if concerns(ref)}
            if readings:
                await asyncio.wait(readings)
            self._drop([ref for ref in self._kept if concerns(ref)])

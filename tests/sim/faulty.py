"""A tier that hangs, fails, forgets or counts when a test says so."""

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

from kvstore.api.tier import Block, BlockRef, Load, Loaded, Tier, Usage

Fault = Callable[[str, Sequence[BlockRef]], Awaitable[None]]
"""Awaited with the operation and what it is about; may wait, and may raise."""


async def _nothing(operation: str, refs: Sequence[BlockRef]) -> None:
    return


class Faulty:
    """`inner`, with `before` awaited ahead of every call, and `after` behind its effect.

    `asked` counts how often each operation was asked of each block.
    """

    def __init__(self, inner: Tier, before: Fault = _nothing, after: Fault = _nothing) -> None:
        self._inner = inner
        self.before = before
        self.after = after
        self.asked: Counter[tuple[str, BlockRef]] = Counter()
        self.name = inner.name

    async def locate(self, refs: Sequence[BlockRef]) -> list[str | None]:
        await self._enter("locate", refs)
        answer = await self._inner.locate(refs)
        await self.after("locate", refs)
        return answer

    async def wants(self, refs: Sequence[BlockRef]) -> list[bool]:
        await self._enter("wants", refs)
        answer = await self._inner.wants(refs)
        await self.after("wants", refs)
        return answer

    async def load(self, loads: Sequence[Load]) -> list[Loaded | None]:
        refs = [load.ref for load in loads]
        await self._enter("load", refs)
        answer = await self._inner.load(loads)
        await self.after("load", refs)
        return answer

    async def store(self, blocks: Sequence[Block]) -> list[bool]:
        refs = [block.ref for block in blocks]
        await self._enter("store", refs)
        answer = await self._inner.store(blocks)
        await self.after("store", refs)
        return answer

    async def discard(self, refs: Sequence[BlockRef]) -> int:
        await self._enter("discard", refs)
        answer = await self._inner.discard(refs)
        await self.after("discard", refs)
        return answer

    async def clear(self, namespace: bytes) -> int:
        await self._enter("clear", ())
        answer = await self._inner.clear(namespace)
        await self.after("clear", ())
        return answer

    def usage(self) -> list[Usage]:
        return self._inner.usage()

    async def close(self) -> None:
        await self._inner.close()

    async def _enter(self, operation: str, refs: Sequence[BlockRef]) -> None:
        self.asked.update((operation, ref) for ref in refs)
        await self.before(operation, refs)

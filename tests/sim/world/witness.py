"""A tier that remembers what the tier behind it said to hold."""

from collections.abc import Callable, Iterable, Sequence

from kvstore.api.tier import Block, BlockRef, Load, Loaded, Tier, Usage


class Witness:
    """`inner`; `note` is told of every block that it said to hold."""

    def __init__(self, inner: Tier, note: Callable[[Iterable[BlockRef]], None]) -> None:
        self._inner = inner
        self._note = note
        self.name = inner.name

    async def locate(self, refs: Sequence[BlockRef]) -> list[str | None]:
        places = await self._inner.locate(refs)
        self._note(ref for ref, place in zip(refs, places, strict=True) if place is not None)
        return places

    async def wants(self, refs: Sequence[BlockRef]) -> list[bool]:
        wanted = await self._inner.wants(refs)
        self._note(ref for ref, want in zip(refs, wanted, strict=True) if not want)
        return wanted

    async def load(self, loads: Sequence[Load]) -> list[Loaded | None]:
        return await self._inner.load(loads)

    async def store(self, blocks: Sequence[Block]) -> list[bool]:
        held = await self._inner.store(blocks)
        self._note(block.ref for block, here in zip(blocks, held, strict=True) if here)
        return held

    async def discard(self, refs: Sequence[BlockRef]) -> int:
        return await self._inner.discard(refs)

    async def clear(self, namespace: bytes) -> int:
        return await self._inner.clear(namespace)

    def usage(self) -> list[Usage]:
        return self._inner.usage()

    async def close(self) -> None:
        await self._inner.close()

"""What this node has for itself, and beyond that what others hold, as one tier."""

from collections.abc import Sequence

from kvstore.api.tier import Block, BlockRef, Load, Loaded, Tier, Usage
from kvstore.tiers.beside import forgotten, load_in_turn


class Beyond:
    """`own`, and `others` for what that lacks, which are read and never written to."""

    name = "beyond"

    def __init__(self, own: Tier, others: Tier) -> None:
        self._first = own
        self._second = others

    async def locate(self, refs: Sequence[BlockRef]) -> list[str | None]:
        places = await self._first.locate(refs)
        missing = [index for index, place in enumerate(places) if place is None]
        if missing:
            elsewhere = await self._second.locate([refs[index] for index in missing])
            for index, place in zip(missing, elsewhere, strict=True):
                places[index] = place
        return places

    async def wants(self, refs: Sequence[BlockRef]) -> list[bool]:
        return await self._first.wants(refs)

    async def load(self, loads: Sequence[Load]) -> list[Loaded | None]:
        return await load_in_turn(self._first, self._second, loads)

    async def store(self, blocks: Sequence[Block]) -> list[bool]:
        return await self._first.store(blocks)

    async def discard(self, refs: Sequence[BlockRef]) -> int:
        return await forgotten(self._first.discard(refs), self._second.discard(refs))

    async def clear(self, namespace: bytes) -> int:
        return await forgotten(self._first.clear(namespace), self._second.clear(namespace))

    def usage(self) -> list[Usage]:
        return [*self._first.usage(), *self._second.usage()]

    async def close(self) -> None:
        try:
            await self._second.close()
        finally:
            await self._first.close()

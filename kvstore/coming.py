"""Blocks that somebody is fetching one after the other, and the readers who wait for them."""

import asyncio
from collections.abc import Collection, Iterable

from kvstore.api.tier import BlockRef


class Coming:
    """What has been tried is not coming any more, whether it came or not."""

    def __init__(self) -> None:
        self._refs: set[BlockRef] = set()
        self._moved = asyncio.Event()

    def begin(self, refs: Iterable[BlockRef]) -> None:
        """These will be tried, in some order; `end` says that no more will be."""
        self._refs.update(refs)

    def tried(self, refs: Iterable[BlockRef]) -> None:
        """Whoever waits for these looks again."""
        self._refs.difference_update(refs)
        self._moved.set()
        self._moved = asyncio.Event()

    def end(self) -> None:
        """Nothing more will be tried."""
        self.tried(list(self._refs))

    async def passed(self, refs: Collection[BlockRef]) -> None:
        """Returns when none of these is coming."""
        while not self._refs.isdisjoint(refs):
            await self._moved.wait()

"""Digests of blocks that their writers put into the arena themselves, computed behind them.

A block needs its digest when it leaves memory. Computing it before its writer gets his answer
would cost him a third of a copy; so threads do it afterwards, and who comes earlier waits.
"""

import asyncio
from collections.abc import Iterable, Sequence
from functools import partial

from kvstore.api.digest import block_digest
from kvstore.runner import Runner
from kvstore.tiers.memory import Memory, Slot


class Digests:
    """Which slots still lack their digest. Without a runner none ever does.

    Invariant: those slots are pinned, so that their bytes stay what was written.
    """

    def __init__(self, memory: Memory, runner: Runner | None) -> None:
        self._memory = memory
        self._runner = runner
        self._coming: dict[Slot, asyncio.Task[None]] = {}

    def begin(self, space_id: bytes, slots: Sequence[Slot]) -> None:
        """Computes the digests of slots that were committed without."""
        for slot in slots:
            if self._runner is None:
                slot.digest = block_digest(space_id, slot.ref.key, slot.view)
                continue
            self._memory.pin(slot)
            self._coming[slot] = asyncio.create_task(self._compute(self._runner, space_id, slot))

    async def settle(self, slots: Iterable[Slot]) -> None:
        """Returns when all of these have their digests."""
        coming = {self._coming[slot] for slot in slots if slot in self._coming}
        if coming:
            await asyncio.wait(coming)

    async def close(self) -> None:
        """Returns when nothing is computed any more."""
        await self.settle(list(self._coming))

    async def _compute(self, runner: Runner, space_id: bytes, slot: Slot) -> None:
        try:
            slot.digest = await runner.run(partial(block_digest, space_id, slot.ref.key, slot.view))
        finally:
            del self._coming[slot]
            self._memory.unpin(slot)

"""Digests of blocks that their writers put into the arena themselves, computed behind them.

A block needs its digest when it leaves memory. Computing it before its writer gets his answer
would cost him a third of a copy, and computing it while he copies on costs him a fifth: both read
the same memory. So a thread does it when writers pause, and who comes earlier has it done at once.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from functools import partial

from kvstore.api.digest import block_digest
from kvstore.runner import Runner
from kvstore.tiers.memory import Memory, Slot

BATCH_BYTES = 4 << 20
"""So much is digested before it is asked again whether somebody writes or waits."""
PAUSE_S = 0.005
"""So long nobody must have written: one write often follows another."""
LAG_S = 0.25
"""Writers are not waited for any longer, batch by batch."""
LAG_FRACTION = 0.5
"""Of memory: when so much lacks its digest, writers are not waited for at all."""

_log = logging.getLogger("kvstore.digests")


class Digests:
    """Which slots still lack their digest. Without a runner none ever does.

    Invariant: those slots are pinned, so that their bytes stay what was written.
    """

    def __init__(self, memory: Memory, runner: Runner | None) -> None:
        self._memory = memory
        self._runner = runner
        self._due: dict[Slot, bytes] = {}
        """With their spaces, in the order in which they are digested."""
        self._due_bytes = 0
        self._coming: dict[Slot, asyncio.Future[None]] = {}
        """Done when the slot has its digest."""
        self._asked: set[Slot] = set()
        """For these somebody waits."""
        self._writers: set[object] = set()
        self._change = asyncio.Event()
        self._working: asyncio.Task[None] | None = None

    def begin(self, space_id: bytes, slots: Sequence[Slot]) -> None:
        """Computes the digests of slots that were committed without."""
        if self._runner is None:
            for slot in slots:
                slot.digest = block_digest(space_id, slot.ref.key, slot.view)
            return
        loop = asyncio.get_running_loop()
        for slot in slots:
            self._due[slot] = space_id
            self._due_bytes += slot.size
            self._coming[self._memory.pin(slot)] = loop.create_future()
        self._change.set()
        if self._working is None and slots:
            self._working = asyncio.create_task(self._work(self._runner))

    def give_way(self, writer: object) -> None:
        """Says that somebody copies into the arena, until `go_on`."""
        self._writers.add(writer)

    def go_on(self, writer: object) -> None:
        """Says that he does not; he may never have."""
        self._writers.discard(writer)
        self._change.set()

    async def settle(self, slots: Iterable[Slot]) -> None:
        """Returns when all of these have their digests."""
        asked = [slot for slot in slots if slot in self._coming]
        if asked:
            self._asked.update(asked)
            self._change.set()
            await asyncio.wait([self._coming[slot] for slot in asked])

    async def catch_up(self) -> bool:
        """Returns when all slots of now have their digests; False: none lacks one."""
        lacking = list(self._coming)
        await self.settle(lacking)
        return bool(lacking)

    async def close(self) -> None:
        """Returns when nothing is computed any more."""
        await self.catch_up()
        if self._working is not None:
            await asyncio.wait([self._working])

    async def _work(self, runner: Runner) -> None:
        batch: dict[Slot, bytes] = {}
        try:
            while self._due:
                await self._turn()
                batch = self._next_batch()
                try:
                    await runner.run(partial(_compute, batch))
                except Exception:  # noqa: BLE001 - those after them shall get theirs
                    _log.exception("blocks stay without a digest")
                self._settled(batch)
        finally:
            self._working = None
            self._settled({**batch, **self._due})
            self._due.clear()
            self._due_bytes = 0

    async def _turn(self) -> None:
        """Lets writers go first, unless somebody waits or too much has gathered.

        Where nothing has changed since the last turn, and nobody writes, it is at once.
        """
        most_bytes = LAG_FRACTION * self._memory.capacity_bytes
        end_s = asyncio.get_running_loop().time() + LAG_S
        while self._change.is_set() or self._writers:
            left_s = end_s - asyncio.get_running_loop().time()
            if left_s <= 0 or self._asked or self._due_bytes >= most_bytes:
                return
            self._change.clear()
            try:
                async with asyncio.timeout(left_s if self._writers else PAUSE_S):
                    await self._change.wait()
            except TimeoutError:
                continue  # Nothing has changed.

    def _next_batch(self) -> dict[Slot, bytes]:
        """What is asked for first, then what has waited the longest."""
        batch: dict[Slot, bytes] = {}
        size = 0
        asked = [slot for slot in self._due if slot in self._asked] if self._asked else []
        for slot in asked or list(self._due):
            if batch and size + slot.size > BATCH_BYTES:
                break
            batch[slot] = self._due.pop(slot)
            size += slot.size
        self._due_bytes -= size
        return batch

    def _settled(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            coming = self._coming.pop(slot, None)
            if coming is None:
                continue
            self._asked.discard(slot)
            if not coming.done():
                coming.set_result(None)
            self._memory.unpin(slot)


def _compute(batch: dict[Slot, bytes]) -> None:
    for slot, space_id in batch.items():
        slot.digest = block_digest(space_id, slot.ref.key, slot.view)

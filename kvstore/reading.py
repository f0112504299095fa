"""The sending end of a read: blocks in order, a window at a time, as far as the time allows."""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from kvstore.api.errors import Shed
from kvstore.api.tier import BlockRef
from kvstore.coming import Coming
from kvstore.leases import Lease
from kvstore.tiers.lending import Lent
from kvstore.tiers.tiered import Acquired, Tiered, Want

READ_WINDOW_BYTES = 8 << 20
BUSY_S = 0.1
"""After which it is worth asking a busy tier again."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """One block of a read. `view` is valid until the iterator moves on; None: missing."""

    index: int
    view: memoryview | None
    digest: bytes = b""
    tier: str = ""


class Gathered:
    """A window of a read. The views of its blocks are valid until `close`."""

    def __init__(self, tiers: Tiered, blocks: list[Delivered], held: Collection[Acquired]) -> None:
        self.blocks = blocks
        self._tiers = tiers
        self._held = held

    def close(self) -> None:
        """Lets the blocks go. Later calls change nothing."""
        held, self._held = self._held, ()
        self._tiers.release(held)


class Reading:
    """One read, under a lease or none, for a caller who has `left_s` of time.

    What lies below is promoted, if the lease says to which chain it belongs, or lent.
    """

    def __init__(
        self,
        tiers: Tiered,
        lease: Lease | None,
        refs: Sequence[BlockRef],
        size: int,
        slow_is_full: Callable[[int], bool],
        left_s: Callable[[], float],
    ) -> None:
        self._tiers = tiers
        self._coming = lease.coming if lease else Coming()
        self._known = lease.known if lease else {}
        self._wants = [self._known.get(ref) or Want(ref, None, size) for ref in refs]
        self._origin = lease.tiers if lease else {}
        self._slow_is_full = slow_is_full
        self._left_s = left_s
        self._gathered = 0

    async def blocks(self) -> AsyncGenerator[Delivered, None]:
        """The blocks in order. Raises Shed ahead of the first one."""
        for window in windows(self._wants):
            gathered = await self.gather(window)
            try:
                for block in gathered.blocks:
                    yield block
            finally:
                gathered.close()

    async def gather(self, window: list[Want]) -> Gathered:
        """The next window of `windows`, as far as it can be had in time; the caller closes it.

        Raises Shed ahead of the first one.
        """
        if not self._gathered:
            self._check_busy(window)
        held, lent = await self._gather(window, self._left_s())
        blocks = []
        for index, want in enumerate(window, start=self._gathered):
            block = held.get(want.ref)
            if block is None:
                blocks.append(Delivered(index, *lent.get(want.ref, (None,))))
                continue
            blocks.append(Delivered(index, block.slot.view, block.slot.digest, self.tier(block)))
        self._gathered += len(window)
        return Gathered(self._tiers, blocks, held.values())

    def windows(self, most_bytes: int, first_bytes: int | None = None) -> Iterator[list[Want]]:
        """The blocks in order, about so many bytes at a time or fewer at first, for `pin`."""
        return windows(self._wants, most_bytes, first_bytes)

    async def pin(self, window: list[Want], left_s: float) -> list[Acquired | None]:
        """The blocks of a window that come to lie in memory in time; the caller releases them.

        For who reads the arena himself: what could only be lent is not in it.
        """
        if at_once := self._tiers.pin_all(window):
            return list(at_once)
        try:
            async with within(max(left_s, 0.0)):
                held = await self._hold(window)
        except TimeoutError:
            held = self._pin_complete(window)
        first, given = set(held), [held.get(want.ref) for want in window]
        for block in given:
            if block is None:
                continue
            if block.slot.ref not in first:  # Asked for twice: each place needs a pin.
                self._tiers.memory.pin(block.slot)
            first.discard(block.slot.ref)
        return given

    def tier(self, block: Acquired) -> str:
        """Where a block lay when it was matched, or else before it was read."""
        return self._origin.get(block.slot.ref, block.tier)

    def _check_busy(self, window: list[Want]) -> None:
        """Better refused at once than answered with misses: the caller may come again."""
        nothing = not any(self._tiers.at_hand(want.ref) for want in window)
        if nothing and self._slow_is_full(window[0].size):
            raise Shed("the slower tiers have as much to read as they can in time", "tier", BUSY_S)

    async def _gather(
        self, window: list[Want], left_s: float
    ) -> tuple[dict[BlockRef, Acquired], dict[BlockRef, Lent]]:
        """The blocks of a window that can be had in the time that is left, pinned or lent."""
        held: dict[BlockRef, Acquired] = {}
        if left_s <= 0:
            return held, {}
        try:
            async with within(left_s):
                held = await self._hold(window)
                sizes = {want.ref: want.size for want in window if want.ref not in held}
                return held, await self._tiers.lend(sizes)
        except TimeoutError:
            return held or self._pin_complete(window), {}
        except BaseException:
            self._tiers.release(held.values())
            raise

    async def _hold(self, window: list[Want]) -> dict[BlockRef, Acquired]:
        """The blocks of a window in memory; those of the lease's chain are promoted for it."""
        asked = {want.ref: want for want in window}  # A block may be asked for twice.
        await self._coming.passed(asked)
        coming = [w for ref, w in asked.items() if ref in self._known or self._tiers.promoting(ref)]
        acquired = await self._tiers.acquire(coming) if coming else []
        held = {block.slot.ref: block for block in acquired if block is not None}
        held |= self._pin([want for ref, want in asked.items() if ref not in held])
        try:
            await self._tiers.digests.settle([block.slot for block in held.values()])
        except BaseException:
            self._tiers.release(held.values())
            raise
        return held

    def _pin_complete(self, wants: list[Want]) -> dict[BlockRef, Acquired]:
        """As `_pin`, without what still lacks its digest: nobody has the time to wait for it."""
        held = self._pin(wants)
        lacking = [ref for ref, block in held.items() if not block.slot.digest]
        self._tiers.release(held.pop(ref) for ref in lacking)
        return held

    def _pin(self, wants: list[Want]) -> dict[BlockRef, Acquired]:
        """Those of the blocks that are in memory now, pinned."""
        asked = {want.ref: self._tiers.pin(want) for want in {w.ref: w for w in wants}.values()}
        return {ref: block for ref, block in asked.items() if block is not None}


def always() -> float:
    """What is left of the time of a caller who waits as long as it takes."""
    return math.inf


def within(left_s: float) -> asyncio.Timeout:
    """Raises TimeoutError when nothing is left."""
    return asyncio.timeout(left_s if math.isfinite(left_s) else None)


def window_bytes(block_bytes: int) -> int:
    """How much a read of blocks of this size gathers at a time."""
    return max(READ_WINDOW_BYTES - READ_WINDOW_BYTES % block_bytes, block_bytes)


def windows(
    wants: list[Want], most_bytes: int = READ_WINDOW_BYTES, first_bytes: int | None = None
) -> Iterator[list[Want]]:
    """The blocks in pieces of about `most_bytes`, so that a read pins few at a time.

    With `first_bytes` the first one has about so much, and each twice as much as the one before.
    """
    largest = max((want.size for want in wants), default=1)
    most = max(most_bytes // largest, 1)
    step = most if first_bytes is None else max(first_bytes // largest, 1)
    start = 0
    while start < len(wants):
        yield wants[start : start + step]
        start += step
        step = min(2 * step, most)

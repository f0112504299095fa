"""The receiving end of a write over the bulk path: bytes go from the connection into slots."""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import NamedTuple

from kvstore.api.bulk import BulkSocket, Parcel
from kvstore.bulk_line import Line
from kvstore.calls import CallerGone
from kvstore.metrics import Metrics
from kvstore.offer import Offer
from kvstore.tiers.memory import Slot

_log = logging.getLogger("kvstore.write")

WINDOW_BYTES = 8 << 20
"""So much is reserved at a time."""
WINDOW_FRACTION = 16
"""Of memory at most: the windows of a few writers must not be all of it."""

WINDOWS = 2
"""One is filled while the next one waits for what follows."""

Place = tuple[int, Slot | None]
"""A block of the run and its slot; None: its bytes pass by."""


class _Window(NamedTuple):
    """Places that a thread fills, or will."""

    places: list[Place]
    digests: list[bytes]
    """It grows as blocks have come; empty for one that is damaged."""
    filled: asyncio.Future[None]


class Filling:
    """One run of a chain on its way in. Call `close` however it ends.

    Invariant: the slots in `_slots` are known to nobody else; what a thread fills is among them.
    """

    def __init__(self, offer: Offer, line: Line, metrics: Metrics) -> None:
        self._offer = offer
        self._line = line
        self._metrics = metrics
        self._left = deque(offer.wanted)
        self._slots: dict[int, Slot] = {}
        """By index in the run."""
        self._coming: deque[_Window] = deque()
        memory = offer.tiers.memory
        share_bytes = memory.share_bytes(offer.block_bytes)
        most_bytes = min(WINDOW_BYTES, memory.capacity_bytes // WINDOW_FRACTION)
        self._window_blocks = max(1, most_bytes // share_bytes)

    async def receive(self) -> None:
        """Takes the blocks of the offer. Raises CallerGone if the connection ends before."""
        await self._hold_above(self._left)
        try:
            while await self._prepare():
                await self._take_next()
        finally:
            if self._coming:
                self._line.wire.shut()
            while self._coming:
                # Who is cancelled once more leaves no sooner: threads still fill the slots.
                with suppress(CallerGone, asyncio.CancelledError):
                    await self._take_next()
        self._offer.advise()

    def close(self) -> None:
        """Gives back what was not committed."""
        slots, self._slots = self._slots, {}
        for slot in slots.values():
            self._offer.tiers.memory.abort(slot)
        self._offer.close()

    async def _prepare(self) -> bool:
        """Has windows ready for what comes next. False: nothing comes."""
        while self._left and len(self._coming) < WINDOWS:
            window = await self._reserve(is_alone=not self._coming)
            if not window:
                break
            digests: list[bytes] = []
            work = partial(self._fill, self._line.wire, window, digests)
            self._coming.append(_Window(window, digests, self._line.begin(work)))
        return bool(self._coming)

    async def _take_next(self) -> None:
        """Commits the window that comes first, as far as it came. Raises CallerGone."""
        first = self._coming[0]
        try:
            # Only then may its slots be given back, or be anybody's to read.
            await self._line.ended(first.filled)
        finally:
            self._coming.popleft()
            await self._commit(first.places, first.digests)
            coming = self._coming[0].places if self._coming else []
            await self._hold_above([index for index, _ in coming] or self._left)

    async def _hold_above(self, indexes: Sequence[int]) -> None:
        """Keeps the block above the first of these here while room is made for others."""
        if indexes:
            await self._offer.hold_parent(indexes[0])

    async def _reserve(self, *, is_alone: bool) -> list[Place]:
        """Slots for the next blocks, about a window of them; fewer if memory is full.

        Who is alone, with nothing of this run on its way in, has nothing to wait for: a block
        without room passes by then, and all that descends from it.
        """
        offer = self._offer
        window: list[Place] = []
        while self._left and len(window) < self._window_blocks:
            index, slot = self._left[0], None
            if self._has_parent(index):
                slot = await offer.tiers.reserve(offer.refs[index], offer.block_bytes)
                if slot is None and (window or not is_alone):
                    break
            if slot is not None:
                self._slots[index] = slot
            self._left.popleft()
            window.append((index, slot))
        return window

    def _has_parent(self, index: int) -> bool:
        """Whether the block above is here, or on its way: otherwise this one is of no use."""
        no_parent = index == 0 or self._offer.parents[index] is None
        return no_parent or self._offer.holds(index - 1) or index - 1 in self._slots

    def _fill(self, wire: BulkSocket, window: Sequence[Place], digests: list[bytes]) -> None:
        """In a thread."""
        offer = self._offer
        for is_kept, places in groupby(window, lambda place: place[1] is not None):
            if not is_kept:
                for _ in places:
                    wire.skip_block(offer.block_bytes)
                    digests.append(b"")
                continue
            parcels = [
                Parcel(offer.space_id, offer.refs[index].key, slot.view)
                for index, slot in places
                if slot is not None
            ]
            for digest in wire.receive_blocks(parcels):
                digests.append(digest)

    async def _commit(self, window: Sequence[Place], digests: Sequence[bytes]) -> None:
        """Takes the blocks that came whole, also where the connection ended behind them."""
        offer = self._offer
        for (index, slot), digest in zip(window, digests, strict=False):
            if slot is None:
                continue
            if not digest:
                self._metrics.corrupt.labels("bulk").inc()
                _log.warning("a block arrived damaged and was not stored")
            is_wanted = bool(digest) and await offer.hold_parent(index)
            del self._slots[index]
            if is_wanted:
                offer.commit(index, slot, digest)
            else:
                offer.tiers.memory.abort(slot)

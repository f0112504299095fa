"""The receiving end of a write over the bulk path: bytes go from the connection into slots."""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from functools import partial

from kvstore.api.bulk import BulkSocket, Parcel, undisturbed
from kvstore.bulk_line import Line
from kvstore.metrics import Metrics
from kvstore.offer import Offer
from kvstore.tiers.memory import Slot

_log = logging.getLogger("kvstore.write")

WINDOW_BYTES = 8 << 20
"""So much is reserved at a time: one window is filled while the next one is made room for."""
WINDOW_FRACTION = 16
"""Of memory at most: the windows of a few writers must not be all of it."""

Place = tuple[int, Slot | None]
"""A block of the run and its slot; None: there is none, and its bytes pass by."""


class Filling:
    """One run of a chain on its way in. Call `close` however it ends.

    Invariant: the slots in `_slots` are known to nobody else; what a thread fills is among them.
    """

    def __init__(self, offer: Offer, line: Line, metrics: Metrics) -> None:
        self._offer = offer
        self._line = line
        self._metrics = metrics
        self._left = deque(offer.wanted)
        self._slots: set[Slot] = set()
        memory = offer.tiers.memory
        share_bytes = memory.share_bytes(offer.block_bytes)
        most_bytes = min(WINDOW_BYTES, memory.capacity_bytes // WINDOW_FRACTION)
        self._window_blocks = max(1, most_bytes // share_bytes)

    async def receive(self) -> None:
        """Takes the blocks of the offer. Raises CallerGone if the connection ends before."""
        window = await self._reserve()
        while window or self._left:
            if not window:  # Nothing of ours takes room, and still there is none.
                window = [(self._left.popleft(), None)]
            digests: list[bytes] = []
            filling = asyncio.ensure_future(
                self._line.run(partial(self._fill, self._line.wire, window, digests))
            )
            try:
                following = await self._reserve()
            except BaseException:
                filling.cancel()
                raise
            finally:
                # Only then may slots be given back, or be anybody's to read.
                try:
                    await undisturbed(filling, filling.cancel)
                finally:
                    await self._commit(window, digests)
            window = following or await self._reserve()
        self._offer.advise()

    def close(self) -> None:
        """Gives back what was not committed."""
        slots, self._slots = self._slots, set()
        for slot in slots:
            self._offer.tiers.memory.abort(slot)
        self._offer.close()

    async def _reserve(self) -> list[Place]:
        """Slots for the next blocks, about a window of them; fewer if memory is full."""
        offer = self._offer
        window: list[Place] = []
        while self._left and len(window) < self._window_blocks:
            slot = await offer.tiers.reserve(offer.refs[self._left[0]], offer.block_bytes)
            if slot is None:
                break
            self._slots.add(slot)
            window.append((self._left.popleft(), slot))
        return window

    def _fill(self, wire: BulkSocket, window: Sequence[Place], digests: list[bytes]) -> None:
        """In a thread. `digests` grows as blocks have come; empty for one that is damaged."""
        offer = self._offer
        if window[0][1] is None:
            wire.skip_block(offer.block_bytes)
            return
        parcels = [
            Parcel(offer.space_id, offer.refs[index].key, slot.view)
            for index, slot in window
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
            elif await offer.hold_parent(index):
                self._slots.discard(slot)
                offer.commit(index, slot, digest)
                continue
            self._slots.discard(slot)
            offer.tiers.memory.abort(slot)

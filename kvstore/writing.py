"""The receiving end of a write: pieces become whole, verified blocks in memory, or nothing."""

import logging

from kvstore.api.digest import DIGEST_BYTES, BlockDigest
from kvstore.api.errors import InvalidArgument
from kvstore.metrics import Metrics
from kvstore.offer import Offer
from kvstore.tiers.memory import Slot

_log = logging.getLogger("kvstore.write")


class Incoming:
    """One run of a chain on its way in. Call `close` however it ends.

    Invariant: at most one block is half written, in a slot that nobody else knows.
    """

    def __init__(self, offer: Offer, metrics: Metrics) -> None:
        self._offer = offer
        self._metrics = metrics
        self._current: int | None = None
        self._next = 0
        self._slot: Slot | None = None
        self._digest = b""
        self._seen: BlockDigest | None = None
        """Of what came of the block under way, if it has a slot."""
        self._filled_bytes = 0

    @property
    def wanted(self) -> list[int]:
        """The blocks that shall be sent, as indexes into the run."""
        return self._offer.wanted

    @property
    def held(self) -> list[int]:
        """The blocks that the node holds now."""
        return self._offer.held

    async def begin_block(self, index: int, size: int, digest: bytes) -> None:
        """The header of the next block. Raises InvalidArgument for what does not fit the run."""
        self._check_complete()
        offer = self._offer
        if index < self._next or index >= len(offer.refs) or offer.holds(index):
            raise InvalidArgument(f"pieces.block: {index} is not the next block of the offer")
        if size != offer.block_bytes:
            raise InvalidArgument(
                f"pieces.header.bytes: blocks of this space have {offer.block_bytes}, got {size}"
            )
        if len(digest) != DIGEST_BYTES:
            raise InvalidArgument(f"pieces.header.digest: {DIGEST_BYTES} bytes are needed")
        self._current, self._digest, self._filled_bytes = index, digest, 0
        self._seen = BlockDigest(offer.space_id, offer.refs[index].key, size)
        if await offer.hold_parent(index):
            self._slot = await offer.tiers.reserve(offer.refs[index], size)

    def add(self, index: int, data: bytes | memoryview) -> None:
        """The next bytes of the block that was begun; its last ones complete it."""
        if index != self._current:
            raise InvalidArgument(f"pieces.header: block {index} came without its header")
        end = self._filled_bytes + len(data)
        if end > self._offer.block_bytes:
            raise InvalidArgument(f"pieces.data: block {index} is longer than its header says")
        if self._slot is not None and self._seen is not None:
            # What was copied is digested, not what came: the slot is what others will read.
            place = self._slot.view[self._filled_bytes : end]
            place[:] = data
            self._seen.update(place)
        self._filled_bytes = end
        if end == self._offer.block_bytes:
            self._complete(index)

    def finish(self) -> None:
        """No more pieces come. Raises InvalidArgument if a block is half written."""
        self._check_complete()
        self._offer.advise()

    def close(self) -> None:
        """Gives back the slot of a block that was never completed."""
        if self._slot is not None:
            self._offer.tiers.memory.abort(self._slot)
            self._slot = None
        self._offer.close()

    def _complete(self, index: int) -> None:
        slot, self._slot, self._current, self._next = self._slot, None, None, index + 1
        seen, self._seen = self._seen, None
        if slot is None or seen is None:
            return  # Memory had no room, or the parent is gone; the block passed by.
        if seen.digest() != self._digest:
            self._metrics.corrupt.labels("stream").inc()
            _log.warning("a block arrived damaged and was not stored")
            self._offer.tiers.memory.abort(slot)
            return
        self._offer.commit(index, slot, self._digest)

    def _check_complete(self) -> None:
        if self._current is not None:
            raise InvalidArgument(
                f"pieces.data: block {self._current} ended after {self._filled_bytes} of "
                f"{self._offer.block_bytes} bytes"
            )

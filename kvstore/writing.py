"""The receiving end of a write: pieces become whole, verified blocks in memory, or nothing."""

import logging
from collections.abc import Callable, Sequence

from kvstore.api.digest import DIGEST_BYTES, block_digest
from kvstore.api.errors import InvalidArgument
from kvstore.api.tier import BlockRef
from kvstore.metrics import Metrics
from kvstore.tiers.memory import Slot
from kvstore.tiers.oblivion import Watch
from kvstore.tiers.tiered import Tiered

_log = logging.getLogger("kvstore.write")


class Incoming:
    """One run of a chain on its way in. Call `close` however it ends.

    Invariant: at most one block is half written, in a slot that nobody else knows.
    """

    def __init__(
        self,
        tiers: Tiered,
        metrics: Metrics,
        space_id: bytes,
        block_bytes: int,
        refs: Sequence[BlockRef],
        *,
        parents: Sequence[BlockRef | None],
        wanted: Sequence[bool],
        rooted: bool,
        advise: Callable[[], None],
    ) -> None:
        self._tiers = tiers
        self._metrics = metrics
        self._space_id = space_id
        self._block_bytes = block_bytes
        self._refs = refs
        self._parents = parents
        self._rooted = rooted
        self._advise = advise
        self._held = [not want for want in wanted]
        self._current: int | None = None
        self._next = 0
        self._slot: Slot | None = None
        self._parent: Slot | None = None
        """The block above the one that is being written, pinned so that it does not leave."""
        self._watch: Watch | None = None
        """That block, where it lies below: whether somebody forgets it."""
        self._digest = b""
        self._filled_bytes = 0

    @property
    def wanted(self) -> list[int]:
        """The blocks that the node does not have and can use, as indexes into the run.

        Without the block above the run nobody could ever match them.
        """
        return [index for index, held in enumerate(self._held) if not held and self._rooted]

    @property
    def held(self) -> list[int]:
        """The blocks that the node holds now."""
        return [index for index, held in enumerate(self._held) if held]

    async def begin_block(self, index: int, size: int, digest: bytes) -> None:
        """The header of the next block. Raises InvalidArgument for what does not fit the run."""
        self._check_complete()
        if index < self._next or index >= len(self._refs) or self._held[index]:
            raise InvalidArgument(f"pieces.block: {index} is not the next block of the offer")
        if size != self._block_bytes:
            raise InvalidArgument(
                f"pieces.header.bytes: blocks of this space have {self._block_bytes}, got {size}"
            )
        if len(digest) != DIGEST_BYTES:
            raise InvalidArgument(f"pieces.header.digest: {DIGEST_BYTES} bytes are needed")
        self._current, self._digest, self._filled_bytes = index, digest, 0
        if await self._hold_parent(self._parents[index]):
            self._slot = await self._tiers.reserve(self._refs[index], size)

    def add(self, index: int, data: bytes) -> None:
        """The next bytes of the block that was begun; its last ones complete it."""
        if index != self._current:
            raise InvalidArgument(f"pieces.header: block {index} came without its header")
        end = self._filled_bytes + len(data)
        if end > self._block_bytes:
            raise InvalidArgument(f"pieces.data: block {index} is longer than its header says")
        if self._slot is not None:
            self._slot.view[self._filled_bytes : end] = data
        self._filled_bytes = end
        if end == self._block_bytes:
            self._complete(index)

    def finish(self) -> None:
        """No more pieces come. Raises InvalidArgument if a block is half written."""
        self._check_complete()
        self._advise()

    def close(self) -> None:
        """Gives back the slot of a block that was never completed."""
        if self._slot is not None:
            self._tiers.memory.abort(self._slot)
            self._slot = None
        self._let_parent_go()

    async def _hold_parent(self, parent: BlockRef | None) -> bool:
        """Whether the block above is here; in memory it then stays until its child has come."""
        self._let_parent_go()
        if parent is None:
            return True
        slot = self._tiers.memory.find(parent)
        if slot is None:
            self._watch = self._tiers.oblivion.watch([parent])
            [place] = await self._tiers.locate([parent])
            return place is not None
        self._parent = self._tiers.memory.pin(slot)
        return True

    def _let_parent_go(self) -> None:
        if self._parent is not None:
            self._tiers.memory.unpin(self._parent)
        self._parent = self._watch = None

    def _parent_is_gone(self, parent: BlockRef | None) -> bool:
        """Whether somebody discarded the block above while its child came."""
        if self._parent is not None:
            return not self._parent.indexed
        lost = self._watch is not None and bool(self._watch.lost)
        return lost and parent is not None and self._tiers.memory.find(parent) is None

    def _complete(self, index: int) -> None:
        slot, self._slot, self._current, self._next = self._slot, None, None, index + 1
        if slot is None:
            return  # Memory had no room, or the parent is gone; the block passed by.
        ref = self._refs[index]
        if block_digest(self._space_id, ref.key, slot.view) != self._digest:
            self._metrics.corrupt.labels("stream").inc()
            _log.warning("a block arrived damaged and was not stored")
            self._tiers.memory.abort(slot)
            return
        if self._parent_is_gone(self._parents[index]):
            self._tiers.memory.abort(slot)  # Without it the child would be of no use.
            return
        kept = self._tiers.memory.commit(slot, self._parents[index], self._digest)
        self._held[index] = kept is not None

    def _check_complete(self) -> None:
        if self._current is not None:
            raise InvalidArgument(
                f"pieces.data: block {self._current} ended after {self._filled_bytes} of "
                f"{self._block_bytes} bytes"
            )

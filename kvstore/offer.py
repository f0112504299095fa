"""One run of a chain that a caller offers: what the node wants of it, and what it holds by now.

However the bytes come, each block has to find the one above it here, or it would be of no use.
"""

from collections.abc import Callable, Sequence

from kvstore.api.tier import BlockRef
from kvstore.tiers.memory import Slot
from kvstore.tiers.oblivion import Watch
from kvstore.tiers.tiered import Tiered


class Offer:
    """The blocks of a run. Call `close` however its writing ends.

    Invariant: at most one block is pinned, as the parent of the one that is being written.
    """

    def __init__(
        self,
        tiers: Tiered,
        space_id: bytes,
        block_bytes: int,
        refs: Sequence[BlockRef],
        *,
        parents: Sequence[BlockRef | None],
        wanted: Sequence[bool],
        rooted: bool,
        advise: Callable[[], None],
    ) -> None:
        self.tiers = tiers
        self.space_id = space_id
        self.block_bytes = block_bytes
        self.refs = refs
        self.parents = parents
        self.advise = advise
        self._rooted = rooted
        self._held = [not want for want in wanted]
        self._parent: Slot | None = None
        """The block above the one that is being written, pinned so that it does not leave."""
        self._watch: Watch | None = None
        """That block, where it lies below: whether somebody forgets it."""

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

    def holds(self, index: int) -> bool:
        """Whether the node holds one of the blocks."""
        return self._held[index]

    async def hold_parent(self, index: int) -> bool:
        """Whether the block above is here; in memory it then stays until its child has come."""
        self.close()
        parent = self.parents[index]
        if parent is None:
            return True
        slot = self.tiers.memory.find(parent)
        if slot is None:
            self._watch = self.tiers.oblivion.watch([parent])
            [place] = await self.tiers.locate_own([parent])
            return place is not None
        self._parent = self.tiers.memory.pin(slot)
        return True

    def commit(self, index: int, slot: Slot, digest: bytes) -> Slot | None:
        """Takes a block that is complete; where it lies now, None if it is of no use any more."""
        if self._parent_is_gone(self.parents[index]):
            self.tiers.memory.abort(slot)  # Without it the child would be of no use.
            return None
        kept = self.tiers.memory.commit(slot, self.parents[index], digest)
        self._held[index] = kept is not None
        return kept

    def close(self) -> None:
        """Lets the block above go."""
        if self._parent is not None:
            self.tiers.memory.unpin(self._parent)
        self._parent = self._watch = None

    def _parent_is_gone(self, parent: BlockRef | None) -> bool:
        """Whether somebody discarded the block above while its child came."""
        if self._parent is not None:
            return not self._parent.indexed
        lost = self._watch is not None and bool(self._watch.lost)
        return lost and parent is not None and self.tiers.memory.find(parent) is None

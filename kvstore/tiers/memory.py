"""The memory tier: slots in an arena, an index over them, and a policy that names victims.

The synchronous half is what `Tiered` builds on: reserve → fill → commit, find → pin → read →
unpin, coldest → evict. It decides and never waits. The asynchronous half makes the tier usable
alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.api.hint import ReuseHint
from kvstore.api.tier import Block, BlockRef, Load, Loaded, Usage
from kvstore.policy.policy import Policy
from kvstore.tiers.arena import Arena
from kvstore.tiers.slabs import Slabs


@dataclass(slots=True, eq=False)
class Slot:
    """A block's place in memory. `view` may be read while pinned, written until committed."""

    ref: BlockRef
    view: memoryview
    offset: int
    parent: BlockRef | None = None
    digest: bytes = b""
    pins: int = 0
    indexed: bool = False
    hint: ReuseHint | None = None
    """What a caller last said of the block's future; evidence for the policy."""


class Memory:
    """Blocks in `capacity_bytes` of memory, cut into slabs of `slab_bytes`.

    Invariant: a slot is in the index, or reserved, or pinned after being forgotten; the policy
    knows exactly the indexed ones. A pinned slot is never reused.
    """

    name = "memory"

    def __init__(self, capacity_bytes: int, slab_bytes: int, policy: Policy) -> None:
        self._arena = Arena(capacity_bytes)
        self._slabs = Slabs(capacity_bytes, slab_bytes)
        self._index: dict[BlockRef, Slot] = {}
        self._unindexed: set[Slot] = set()
        self._policy = policy

    @property
    def capacity_bytes(self) -> int:
        """The size of the arena."""
        return self._arena.capacity_bytes

    @property
    def largest_block_bytes(self) -> int:
        """The largest block that fits."""
        return self._slabs.slab_bytes

    # What a composition needs: plain decisions, no waiting.

    def find(self, ref: BlockRef) -> Slot | None:
        """The slot of a block that is here. Counts as no use; pin it before any `await`."""
        return self._index.get(ref)

    def pin(self, slot: Slot) -> Slot:
        """Keeps the slot from being evicted or reused until `unpin`."""
        slot.pins += 1
        return slot

    def unpin(self, slot: Slot) -> None:
        """Ends one `pin`; a slot that was forgotten meanwhile is freed with the last one."""
        assert slot.pins > 0, "unpinned more often than pinned"
        slot.pins -= 1
        if not slot.indexed and not slot.pins:
            self._free(slot)

    def reserve(self, ref: BlockRef, size: int) -> Slot | None:
        """An empty slot that only the caller knows, to be filled and committed; None if full."""
        offset = self._slabs.allocate(size)
        if offset is None:
            return None
        slot = Slot(ref, self._arena.view(offset, size), offset)
        self._unindexed.add(slot)
        return slot

    def commit(self, slot: Slot, parent: BlockRef | None, digest: bytes) -> Slot:
        """Makes a filled slot findable. A block that is here already stays and is returned."""
        present = self._index.get(slot.ref)
        if present is not None:
            self.abort(slot)
            return present
        slot.parent, slot.digest, slot.indexed = parent, digest, True
        self._unindexed.remove(slot)
        self._index[slot.ref] = slot
        self._policy.insert(slot.ref)
        return slot

    def abort(self, slot: Slot) -> None:
        """Gives a reserved slot back unused."""
        self._free(slot)

    def coldest(self, size: int, least_bytes: int) -> list[Slot]:
        """What should leave to make room for `size`, about `least_bytes`; [] if nothing can.

        Slots of the class of `size` go first. If it has none, the slab of the coldest block of
        any class is emptied, so that the slab can change its class.
        """
        slot_bytes = self._slabs.slot_bytes(size)
        chosen: list[Slot] = []
        for ref in self._policy.victims():
            slot = self._index[ref]
            if not slot.pins and self._slabs.slot_bytes(len(slot.view)) == slot_bytes:
                chosen.append(slot)
                if len(chosen) * slot_bytes >= least_bytes:
                    break
        return chosen or self._coldest_slab()

    def _coldest_slab(self) -> list[Slot]:
        """The blocks of one slab that can be emptied, the coldest of them; [] if none can."""
        slots = [*self._index.values(), *self._unindexed]
        busy = {self._slabs.slab_of(s.offset) for s in slots if s.pins or not s.indexed}
        for ref in self._policy.victims():
            slab = self._slabs.slab_of(self._index[ref].offset)
            if slab not in busy:
                return [s for s in slots if self._slabs.slab_of(s.offset) == slab]
        return []

    def evict(self, slot: Slot) -> None:
        """Forgets a block; its slot is free at once, or with the last pin."""
        if slot.indexed:
            del self._index[slot.ref]
            self._policy.remove(slot.ref)
            slot.indexed = False
            self._unindexed.add(slot)
            if not slot.pins:
                self._free(slot)

    def touch(self, chain: Sequence[BlockRef], hint: ReuseHint | None = None) -> None:
        """Blocks were used, given parents first, perhaps with a hint of what comes next."""
        self._policy.touch(chain)
        self.note(chain, hint)

    def note(self, chain: Sequence[BlockRef], hint: ReuseHint | None) -> None:
        """Records a hint with the blocks of a chain that are here."""
        if hint is not None:
            for ref in chain:
                slot = self._index.get(ref)
                if slot is not None:
                    slot.hint = hint

    def slots(self) -> list[Slot]:
        """All findable slots, the one to evict first at the front."""
        return [self._index[ref] for ref in self._policy.victims()]

    def _free(self, slot: Slot) -> None:
        self._unindexed.remove(slot)
        self._slabs.free(slot.offset)

    # The tier.

    async def locate(self, refs: Sequence[BlockRef]) -> list[str | None]:
        return [self.name if ref in self._index else None for ref in refs]

    async def wants(self, refs: Sequence[BlockRef]) -> list[bool]:
        return [ref not in self._index for ref in refs]

    async def load(self, loads: Sequence[Load]) -> list[Loaded | None]:
        self.touch([load.ref for load in loads])
        return [self.read(load) for load in loads]

    def read(self, load: Load) -> Loaded | None:
        """Copies a block out, if it is here and as long as the buffer."""
        slot = self._index.get(load.ref)
        if slot is None or len(slot.view) != len(load.into):
            return None
        load.into[:] = slot.view
        return Loaded(self.name, slot.digest)

    async def store(self, blocks: Sequence[Block]) -> list[bool]:
        held = [self._write(block) for block in blocks]
        self.touch([block.ref for block in blocks])
        return held

    def _write(self, block: Block) -> bool:
        if block.ref in self._index:
            return True
        size = len(block.data)
        slot = self.reserve(block.ref, size)
        if slot is None:
            for victim in self.coldest(size, 1):
                self.evict(victim)
            slot = self.reserve(block.ref, size)
        if slot is None:
            return False
        slot.view[:] = block.data
        self.commit(slot, block.parent, block.digest)
        return True

    async def discard(self, refs: Sequence[BlockRef]) -> int:
        here = [self._index[ref] for ref in refs if ref in self._index]
        for slot in here:
            self.evict(slot)
        return len(here)

    async def clear(self, namespace: bytes) -> int:
        return await self.discard([ref for ref in self._index if ref.namespace == namespace])

    def usage(self) -> list[Usage]:
        used = self._slabs.used_bytes
        return [Usage(self.name, self.capacity_bytes, used, len(self._index))]

    async def close(self) -> None:
        self._index.clear()
        self._unindexed.clear()
        self._arena.close()

    def check(self) -> None:
        """Recomputes every invariant; AssertionError tells which one broke."""
        self._slabs.check()
        assert set(self._policy.victims()) == set(self._index), "policy and index differ"
        taken = [*self._index.values(), *self._unindexed]
        assert len({slot.offset for slot in taken}) == len(taken), "slot used twice"
        used = sum(self._slabs.slot_bytes(len(slot.view)) for slot in taken)
        assert used == self._slabs.used_bytes, "bytes lost"
        assert all(slot.indexed for slot in self._index.values()), "index holds a forgotten slot"

"""The memory tier: slots in an arena, an index over them, and a policy that names victims.

The synchronous half is what `Tiered` builds on: reserve → fill → commit, find → pin → read →
unpin, coldest → evict. It decides and never waits. The asynchronous half makes the tier usable
alone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import repeat
from typing import cast

from kvstore.api.clock import Clock
from kvstore.api.tier import Block, BlockRef, Load, Loaded, Usage
from kvstore.policy.deferred import Deferred
from kvstore.policy.policy import Policy, Use
from kvstore.tiers.arena import Arena
from kvstore.tiers.lineage import Member, with_descendants
from kvstore.tiers.slabs import Slabs

SLABS_TO_TRY = 64
"""So many of the coldest slabs are looked at for one that can be emptied."""


class Slot(Member):
    """A block's place in memory. `view` may be read while pinned, written until committed.

    It begins on a page, for direct I/O.
    """

    __slots__ = ("_arena", "digest", "indexed", "offset", "parent", "pins", "ref", "size")

    def __init__(self, ref: BlockRef, arena: Arena, offset: int, size: int) -> None:
        super().__init__()
        self.ref = ref
        self.size = size
        self.offset = offset
        self.parent: BlockRef | None = None
        self.digest = b""
        self.pins = 0
        self.indexed = False
        self._arena = arena

    @property
    def view(self) -> memoryview:
        """The bytes of the block."""
        return self._arena.view(self.offset, self.size)


class Memory:
    """Blocks in `capacity_bytes` of memory, cut into slabs of `slab_bytes`.

    Invariant: a slot is in the index, or reserved, or pinned after being forgotten; the policy
    knows exactly the indexed ones. A pinned slot is never reused.
    """

    name = "memory"

    def __init__(
        self, capacity_bytes: int, slab_bytes: int, policy: Policy[BlockRef], clock: Clock
    ) -> None:
        self.arena = Arena(capacity_bytes)
        self._slabs = Slabs(capacity_bytes, slab_bytes)
        self._index: dict[BlockRef, Slot] = {}
        self._unindexed: set[Slot] = set()
        self._orphans: dict[BlockRef, list[Slot]] = {}
        """Slots whose parent is not in memory, by that parent."""
        self._rows: list[list[Slot | None]] = [[] for _ in range(capacity_bytes // slab_bytes)]
        """The slots of each slab."""
        self._policy = Deferred(policy)
        self.clock = clock
        self.on_change: Callable[[BlockRef], None] | None = None
        """Hears of each block that has come or left."""

    @property
    def capacity_bytes(self) -> int:
        """The size of the arena."""
        return self.arena.capacity_bytes

    @property
    def largest_block_bytes(self) -> int:
        """The largest block that fits."""
        return self._slabs.slab_bytes

    def share_bytes(self, size: int) -> int:
        """How much of the capacity a block of `size` costs as long as it stays."""
        return self._slabs.share_bytes(size)

    # What a composition needs: plain decisions, no waiting.

    def find(self, ref: BlockRef) -> Slot | None:
        """The slot of a block that is here. Counts as no use; pin it before any `await`."""
        return self._index.get(ref)

    def find_all(self, namespace: bytes, keys: Iterable[bytes]) -> list[Slot | None]:
        """As `find`, for many blocks of a namespace."""
        # A pair is equal to the `BlockRef` of the same, and `zip` makes no new one for each.
        index = cast("dict[tuple[bytes, bytes], Slot]", self._index)
        return list(map(index.get, zip(repeat(namespace), keys)))

    def pin(self, slot: Slot) -> Slot:
        """Keeps the slot from being evicted or reused until `unpin`."""
        slot.pins += 1
        return slot

    def pin_leading(self, slots: Sequence[Slot | None], size: int) -> int:
        """Pins slots that were found earlier up to the first that is not here any more, or not of
        this size; how many those are."""
        count = 0
        for slot in slots:
            if slot is None or not slot.indexed or slot.size != size:
                break
            slot.pins += 1
            count += 1
        return count

    def unpin(self, slot: Slot) -> None:
        """Ends one `pin`; a slot that was forgotten meanwhile is freed with the last one."""
        assert slot.pins > 0, "unpinned more often than pinned"
        slot.pins -= 1
        if not slot.indexed and not slot.pins:
            self._free(slot)

    def unpin_all(self, slots: Iterable[Slot]) -> None:
        """Ends one `pin` of each."""
        for slot in slots:
            if slot.indexed and slot.pins:  # Without a call: there are many of them.
                slot.pins -= 1
            else:
                self.unpin(slot)

    def reserve(self, ref: BlockRef, size: int) -> Slot | None:
        """An empty slot that only the caller knows, to be filled and committed; None if full.

        Who pins it before that gives it back by `unpin`.
        """
        offset = self._slabs.allocate(size)
        if offset is None:
            return None
        slot = Slot(ref, self.arena, offset, size)
        self._unindexed.add(slot)
        row, place = self._place(slot)
        row[place] = slot
        return slot

    def commit(self, slot: Slot, parent: BlockRef | None, digest: bytes) -> Slot | None:
        """Makes a filled slot findable. A block that is here already stays and is returned.

        None, with the slot given back, for a block that would descend from itself: no chain has
        such a block, and nothing above it would ever come to an end.
        """
        present = self._index.get(slot.ref)
        if present is not None:
            self.abort(slot)
            return present
        if self._descends_from(parent, slot.ref):
            self.abort(slot)
            return None
        slot.parent, slot.digest, slot.indexed = parent, digest, True
        self._unindexed.remove(slot)
        self._index[slot.ref] = slot
        self._relate(slot)
        self._policy.insert(slot.ref, slot.parent, self._slabs.slot_bytes(slot.size))
        if self.on_change is not None:
            self.on_change(slot.ref)
        return slot

    def abort(self, slot: Slot) -> None:
        """Gives a reserved slot back unused; it is free at once, or with the last pin."""
        if not slot.pins:
            self._free(slot)

    def coldest(self, size: int, least_bytes: int, *, parents: bool = False) -> list[Slot]:
        """What should leave to make room for `size`, about `least_bytes`; [] if nothing can.

        Children stand before their parents. Slots of the class of `size` go first. Where all its
        leaves are pinned, `parents` allows blocks whose children stay: they have to lie below.
        If the class has none of either, the slab of the coldest block of any class is emptied, so
        that it can change its class.
        """
        return (
            self._coldest_of_class(size, least_bytes, parents=False)
            or (self._coldest_of_class(size, least_bytes, parents=True) if parents else [])
            or self._coldest_slab()
        )

    def _coldest_of_class(self, size: int, least_bytes: int, *, parents: bool) -> list[Slot]:
        slot_bytes = self._slabs.slot_bytes(size)
        chosen: list[Slot] = []
        leaving: set[BlockRef] = set()
        for ref in self._policy.victims(self.clock.monotonic_s()):
            slot = self._index[ref]
            if slot.pins or self._slabs.slot_bytes(slot.size) != slot_bytes:
                continue
            if not parents and any(child.ref not in leaving for child in slot.children()):
                continue
            chosen.append(slot)
            leaving.add(ref)
            if len(chosen) * slot_bytes >= least_bytes:
                break
        return chosen

    def _coldest_slab(self) -> list[Slot]:
        """The blocks of one slab and what descends from them, if all that can leave; or []."""
        tried: set[int] = set()
        for ref in self._policy.victims(self.clock.monotonic_s()):
            slab = self._slabs.slab_of(self._index[ref].offset)
            if slab in tried:
                continue
            tried.add(slab)
            slots = [slot for slot in self._rows[slab] if slot is not None]
            if all(slot.indexed for slot in slots):
                leaving = with_descendants(slots)
                if not any(slot.pins for slot in leaving):
                    return leaving[::-1]
            if len(tried) == SLABS_TO_TRY:
                break
        return []

    def evict(self, slot: Slot) -> None:
        """Forgets a block; its slot is free at once, or with the last pin."""
        if not slot.indexed:
            return
        self._part(slot)
        del self._index[slot.ref]
        self._policy.remove(slot.ref)
        slot.indexed = False
        self._unindexed.add(slot)
        if not slot.pins:
            self._free(slot)
        if self.on_change is not None:
            self.on_change(slot.ref)

    def forget(self, slots: Iterable[Slot]) -> int:
        """Evicts blocks and all that descends from them; how many there were."""
        leaving = with_descendants(slots)
        for slot in reversed(leaving):
            self.evict(slot)
        return len(leaving)

    def forget_waiting(self, parents: Iterable[BlockRef]) -> int:
        """Forgets who waits for parents that seem to be nowhere; how many there were.

        What is pinned stays: a tier that does not answer looks like one that has forgotten.
        """
        count = 0
        for ref in parents:
            for slot in list(self._orphans.get(ref, ())):
                if not any(member.pins for member in with_descendants([slot])):
                    count += self.forget([slot])
        return count

    def use(self, use: Use[BlockRef]) -> None:
        """Tells the policy of a request: its whole chain, whether here or not.

        It hears of it when it is asked next, or by `settle`.
        """
        self._policy.use(self._sized(use))

    def expect(self, use: Use[BlockRef]) -> None:
        """Tells the policy what is about to be written, as far as no request has yet."""
        unknown = [ref for ref in use.chain if ref not in self._policy]
        if unknown:
            self._policy.use(self._sized(replace(use, chain=unknown)))

    def advise(self, use: Use[BlockRef]) -> None:
        """Tells the policy what a caller says of a chain's future."""
        self._policy.advise(self._sized(use))

    def settle(self) -> bool:
        """Has the policy hear of some more requests; True if there are others."""
        return self._policy.settle()

    def _sized(self, use: Use[BlockRef]) -> Use[BlockRef]:
        """The same with what its blocks take here.

        A policy remembers as many blocks as fit the capacity: of tiny ones, each of which takes a
        page, there would be far more than can ever be here.
        """
        return replace(use, block_bytes=self._slabs.slot_bytes(use.block_bytes))

    def awaited(self) -> list[BlockRef]:
        """The parents that are not here of blocks that are."""
        return list(self._orphans)

    def refs(self) -> list[BlockRef]:
        """What all findable blocks are called, in no order."""
        return list(self._index)

    def slots(self) -> list[Slot]:
        """All findable slots, the one to evict first at the front."""
        return [self._index[ref] for ref in self._policy.victims(self.clock.monotonic_s())]

    def _place(self, slot: Slot) -> tuple[list[Slot | None], int]:
        """Where a slot stands among those of its slab."""
        slot_bytes = self._slabs.slot_bytes(slot.size)
        slab, within = divmod(slot.offset, self._slabs.slab_bytes)
        slots = self._slabs.slab_bytes // slot_bytes
        if len(self._rows[slab]) != slots:  # It was of another class, and is empty.
            self._rows[slab] = [None] * slots
        return self._rows[slab], within // slot_bytes

    def _descends_from(self, ref: BlockRef | None, ancestor: BlockRef) -> bool:
        """Whether a block is `ancestor`, which is not here, or descends from it."""
        if ref == ancestor:
            return True
        if ref is None or ancestor not in self._orphans:
            return False  # Nobody here has it as a parent.
        slot = self._index.get(ref)
        while slot is not None and slot.parent != ancestor:
            slot = slot.above
        return slot is not None

    def _relate(self, slot: Slot) -> None:
        """Finds the relatives of a block that has come."""
        above = self._index.get(slot.parent) if slot.parent is not None else None
        if above is not None:
            slot.parent = above.ref  # One object for each name: there are many of them.
            above.adopt(slot)
        elif slot.parent is not None:
            self._orphans.setdefault(slot.parent, []).append(slot)
        for child in self._orphans.pop(slot.ref, ()):
            child.parent = slot.ref
            slot.adopt(child)

    def _part(self, slot: Slot) -> None:
        """Takes a block that leaves from its relatives."""
        if slot.above is None and slot.parent is not None:
            waiting = self._orphans[slot.parent]
            waiting.remove(slot)
            if not waiting:
                del self._orphans[slot.parent]
        slot.leave()
        for child in list(slot.children()):
            child.leave()
            self._orphans.setdefault(slot.ref, []).append(child)

    def _free(self, slot: Slot) -> None:
        self._unindexed.remove(slot)
        row, place = self._place(slot)
        row[place] = None
        self._slabs.free(slot.offset)

    # The tier.

    async def locate(self, refs: Sequence[BlockRef]) -> list[str | None]:
        return [self.name if ref in self._index else None for ref in refs]

    async def wants(self, refs: Sequence[BlockRef]) -> list[bool]:
        return [ref not in self._index for ref in refs]

    async def load(self, loads: Sequence[Load]) -> list[Loaded | None]:
        self.use(Use([load.ref for load in loads], self.clock.monotonic_s()))
        return [self.read(load) for load in loads]

    def read(self, load: Load) -> Loaded | None:
        """Copies a block out, if it is here and as long as the buffer."""
        slot = self._index.get(load.ref)
        if slot is None or slot.size != len(load.into):
            return None
        load.into[:] = slot.view
        return Loaded(self.name, slot.digest)

    async def store(self, blocks: Sequence[Block]) -> list[bool]:
        self.expect(Use([block.ref for block in blocks], self.clock.monotonic_s()))
        return [self._write(block) for block in blocks]

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
        return self.commit(slot, block.parent, block.digest) is not None

    async def discard(self, refs: Sequence[BlockRef]) -> int:
        """Also forgets the children of blocks that are not here: they wait for nobody now."""
        here = [self._index[ref] for ref in refs if ref in self._index]
        waiting = [child for ref in refs for child in self._orphans.get(ref, ())]
        return self.forget([*here, *waiting])

    async def clear(self, namespace: bytes) -> int:
        known = [*self._index, *self._orphans]
        return await self.discard([ref for ref in known if ref.namespace == namespace])

    def usage(self) -> list[Usage]:
        used = self._slabs.used_bytes
        return [Usage(self.name, self.capacity_bytes, used, len(self._index))]

    async def close(self) -> None:
        self._index.clear()
        self._unindexed.clear()
        self._orphans.clear()
        self._rows.clear()
        self.arena.close()

    def check(self) -> None:
        """Recomputes every invariant; AssertionError tells which one broke."""
        self._slabs.check()
        victims = list(self._policy.victims(self.clock.monotonic_s()))
        assert len(victims) == len(self._policy) == len(self._index), "policy and index differ"
        assert set(victims) == set(self._index), "policy and index differ"
        taken = [*self._index.values(), *self._unindexed]
        assert len({slot.offset for slot in taken}) == len(taken), "slot used twice"
        used = sum(self._slabs.slot_bytes(slot.size) for slot in taken)
        assert used == self._slabs.used_bytes, "bytes lost"
        assert all(slot.indexed for slot in self._index.values()), "index holds a forgotten slot"
        for slot in taken:
            row, place = self._place(slot)
            assert row[place] is slot, "a slab does not know its slot"
        self._check_relatives()

    def _check_relatives(self) -> None:
        for slot in self._index.values():
            above = self._index.get(slot.parent) if slot.parent is not None else None
            assert slot.above is above, "a block and its parent do not know each other"
            assert all(child.above is slot for child in slot.children()), "a child is astray"
            waits = slot.parent is not None and above is None
            assert waits == (slot in self._orphans.get(slot.parent or slot.ref, ())), "not waiting"
        assert all(self._orphans.values()), "a parent is waited for by nobody"

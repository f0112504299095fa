"""What this node holds, by the names under which others know blocks."""

import asyncio
from collections.abc import Iterator
from itertools import islice

from kvstore.api.tier import BlockRef
from kvstore.names import block_name
from kvstore.tiers.disk_index import DiskIndex
from kvstore.tiers.memory import Memory, Slot

MAX_CHANGES = 65_536
"""That wait to be looked at; of more than that only is known that there were some."""
SLICE_BLOCKS = 512
"""So many names are computed before other tasks have their turn: that takes half a millisecond."""


class Holdings:
    """The blocks of memory and disk by name, and what has changed of them lately.

    Memory knows blocks by their keys. Their names cost a microsecond each, which is not spent
    where blocks come and go, but behind it, in slices. Until then a block is not found.

    Invariant: the index has a name for each block of memory that is not among the changes, unless
    some were missed.
    """

    def __init__(self, memory: Memory, disk: DiskIndex | None) -> None:
        self._memory = memory
        self._disk = disk
        self._refs: dict[bytes, BlockRef] = {}
        """Of memory; a few of them may have left it."""
        self._changed_refs: dict[BlockRef, None] = {}
        self._changed_names: dict[bytes, None] = {}
        self._has_changed = asyncio.Event()
        self.missed = 0
        """Changes of which is only known that there were some, since the last survey."""
        memory.on_change = self._ref_changed
        if disk is not None:
            disk.on_change = self._name_changed

    def in_memory(self, name: bytes) -> Slot | None:
        """The slot of a block that is in memory. Pin it before any `await`."""
        ref = self._refs.get(name)
        return self._memory.find(ref) if ref is not None else None

    def holds(self, name: bytes) -> bool:
        """Whether a block is in memory or on disk."""
        on_disk = self._disk is not None and self._disk.find(name) is not None
        return on_disk or self.in_memory(name) is not None

    def look_again(self, name: bytes) -> None:
        """Somebody was told of a block that he did not find here: that counts as a change.

        So an entry that was wrong is taken back, by nobody but its owner.
        """
        self._name_changed(name)

    async def changed(self) -> None:
        """Returns when there are changes that nobody has taken."""
        await self._has_changed.wait()

    async def take(self, most: int) -> tuple[list[bytes], list[bytes]]:
        """The names of the next blocks that have come, and of those that have left."""
        await self._name_changes(most)
        names = list(islice(self._changed_names, most))
        for name in names:
            del self._changed_names[name]
        if not self._changed_refs and not self._changed_names:
            self._has_changed.clear()
        held = [name for name in names if self.holds(name)]
        kept = set(held)
        return held, [name for name in names if name not in kept]

    async def survey(self) -> None:
        """Brings the index up to date with memory, also where changes were missed."""
        if not self.missed:
            await self._name_changes(len(self._changed_refs))
            return
        self.missed = 0
        refs = [*self._refs.values(), *self._memory.refs()]
        for start in range(0, len(refs), SLICE_BLOCKS):
            for ref in refs[start : start + SLICE_BLOCKS]:
                self._look_at(ref)
            await asyncio.sleep(0)

    def names(self) -> Iterator[list[bytes]]:
        """The names of all that is here, in slices, between which it may change."""
        for all_names in (list(self._refs), self._disk.names() if self._disk is not None else []):
            for start in range(0, len(all_names), SLICE_BLOCKS):
                yield [name for name in all_names[start : start + SLICE_BLOCKS] if self.holds(name)]

    def refs(self, names: set[bytes]) -> list[BlockRef]:
        """What those of the blocks are called that are in memory; `survey` first."""
        return [self._refs[name] for name in names if name in self._refs]

    def check(self) -> None:
        """Recomputes the invariant; AssertionError if it broke."""
        known = set(self._refs.values()) | set(self._changed_refs)
        lacking = [ref for ref in self._memory.refs() if ref not in known]
        assert self.missed or not lacking, f"{len(lacking)} blocks have no name"

    async def _name_changes(self, most: int) -> None:
        """Computes the names of so many changes in memory."""
        while self._changed_refs and most > 0:
            for ref in list(islice(self._changed_refs, min(most, SLICE_BLOCKS))):
                del self._changed_refs[ref]
                self._changed_names[self._look_at(ref)] = None
                most -= 1
            await asyncio.sleep(0)

    def _look_at(self, ref: BlockRef) -> bytes:
        """Notes whether a block is in memory; its name."""
        name = block_name(ref)
        if self._memory.find(ref) is not None:
            self._refs[name] = ref
        else:
            self._refs.pop(name, None)
        return name

    def _ref_changed(self, ref: BlockRef) -> None:
        if len(self._changed_refs) < MAX_CHANGES:
            self._changed_refs[ref] = None
        else:
            self.missed += 1
        self._has_changed.set()

    def _name_changed(self, name: bytes) -> None:
        if len(self._changed_names) < MAX_CHANGES:
            self._changed_names[name] = None
        else:
            self.missed += 1
        self._has_changed.set()

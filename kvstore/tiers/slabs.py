"""Who uses which bytes of an arena: slabs, cut into slots of one size class each.

Plain bookkeeping without bytes. After the slab allocator of memcached, with the real block sizes
(rounded up to a page) as classes; an empty slab goes back and serves any class.
"""

from dataclasses import dataclass, field

PAGE_BYTES = 4096


@dataclass(slots=True)
class _Slab:
    slot_bytes: int = 0
    slots: int = 0
    free: list[int] = field(default_factory=list)


class Slabs:
    """Slots in `capacity_bytes`, from slabs of `slab_bytes`.

    Invariant: every slab is either unassigned or holds slots of one class; no slot is handed out
    twice.
    """

    def __init__(self, capacity_bytes: int, slab_bytes: int) -> None:
        self.slab_bytes = slab_bytes
        self._slabs = [_Slab() for _ in range(capacity_bytes // slab_bytes)]
        self._unassigned = list(range(len(self._slabs) - 1, -1, -1))
        self._open: dict[int, list[int]] = {}
        self.used_bytes = 0

    def slot_bytes(self, size: int) -> int:
        """What a block of `size` really takes."""
        return -(-size // PAGE_BYTES) * PAGE_BYTES

    def share_bytes(self, size: int) -> int:
        """What a block of `size` costs: its slot, and its part of what the slots leave unused."""
        return self.slab_bytes // (self.slab_bytes // self.slot_bytes(size))

    def slab_of(self, offset: int) -> int:
        """Which slab a slot lies in."""
        return offset // self.slab_bytes

    def allocate(self, size: int) -> int | None:
        """The offset of a slot for `size` bytes; None if its class has no room left."""
        slot_bytes = self.slot_bytes(size)
        if slot_bytes > self.slab_bytes:
            return None
        open_slabs = self._open.setdefault(slot_bytes, [])
        if not open_slabs:
            if not self._unassigned:
                return None
            open_slabs.append(self._assign(slot_bytes))
        index = open_slabs[-1]
        slab = self._slabs[index]
        offset = slab.free.pop()
        if not slab.free:
            open_slabs.pop()
        self.used_bytes += slot_bytes
        return offset

    def free(self, offset: int) -> None:
        """Takes a slot back; its bytes may be handed out again at once."""
        index = self.slab_of(offset)
        slab = self._slabs[index]
        if not slab.free:
            self._open[slab.slot_bytes].append(index)
        slab.free.append(offset)
        self.used_bytes -= slab.slot_bytes
        if len(slab.free) == slab.slots:
            self._open[slab.slot_bytes].remove(index)
            self._slabs[index] = _Slab()
            self._unassigned.append(index)

    def _assign(self, slot_bytes: int) -> int:
        index = self._unassigned.pop()
        start = index * self.slab_bytes
        slots = self.slab_bytes // slot_bytes
        offsets = [start + slot * slot_bytes for slot in range(slots - 1, -1, -1)]
        self._slabs[index] = _Slab(slot_bytes, slots, offsets)
        return index

    def check(self) -> None:
        """Recomputes every count; AssertionError tells which one is wrong."""
        used = sum((slab.slots - len(slab.free)) * slab.slot_bytes for slab in self._slabs)
        assert used == self.used_bytes, f"used {used}, counted {self.used_bytes}"
        for index, slab in enumerate(self._slabs):
            assert (index in self._unassigned) == (slab.slot_bytes == 0), "slab lost"
            assert len(set(slab.free)) == len(slab.free), "slot twice free"
            if slab.slot_bytes:
                listed = index in self._open[slab.slot_bytes]
                assert listed == bool(slab.free), "slab with room is not listed"

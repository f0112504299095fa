"""The memory of one client: blocks to send, and buffers for what comes back."""

import mmap
import random

_PATTERN_BYTES = 1 << 20
_STAMP_BYTES = 16


class Ring:
    """`blocks` blocks and as many buffers, all faulted in, private like an engine's own memory.

    Calls go round in it, so that neither side finds in the cache what it moved a moment ago.
    Every block begins with a stamp of its own: one in another's place is noticed.
    """

    def __init__(self, block_bytes: int, blocks: int, owner: int) -> None:
        self.block_bytes = block_bytes
        self.blocks = blocks
        self._sources = faulted_in(blocks * block_bytes)
        self._targets = faulted_in(blocks * block_bytes)
        pattern = random.Random(owner).randbytes(_PATTERN_BYTES)
        for start in range(0, len(self._sources), _PATTERN_BYTES):
            end = min(start + _PATTERN_BYTES, len(self._sources))
            self._sources[start:end] = pattern[: end - start]
        for place in range(blocks):
            stamp = owner.to_bytes(8, "little") + place.to_bytes(8, "little")
            start = place * block_bytes
            self._sources[start : start + _STAMP_BYTES] = stamp

    def source(self, places: range) -> memoryview:
        """The blocks at consecutive places, as one stretch."""
        return self._sources[places.start * self.block_bytes : places.stop * self.block_bytes]

    def target(self, places: range) -> memoryview:
        """The buffers at consecutive places, as one stretch."""
        return self._targets[places.start * self.block_bytes : places.stop * self.block_bytes]

    def sources(self, places: range) -> list[memoryview]:
        """The blocks at these places, one by one."""
        return [self.source(range(place, place + 1)) for place in places]

    def targets(self, places: range) -> list[memoryview]:
        """The buffers at these places, one by one."""
        return [self.target(range(place, place + 1)) for place in places]

    def calls(self, batch: int) -> list[range]:
        """The places of each call that one turn makes."""
        return [range(start, start + batch) for start in range(0, self.blocks - batch + 1, batch)]


def faulted_in(size: int) -> memoryview:
    """Fresh private memory; its first touch, which costs several copies, is over."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    return memoryview(mmap.mmap(-1, size, flags=flags))

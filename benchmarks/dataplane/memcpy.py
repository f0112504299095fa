"""The floor of shared memory: the copy itself."""

from benchmarks.dataplane.ring import Ring, faulted_in


class Memcpy:
    """Copies blocks into another stretch of memory and back, one block at a time."""

    knob = 0

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._arena = faulted_in(ring.blocks * ring.block_bytes)

    async def prepare(self, op: str) -> None:
        """Fills the other stretch, so that a get brings what was put."""
        if op == "get":
            self.put(range(self._ring.blocks))

    def put(self, places: range) -> None:
        """Out of the ring."""
        size = self._ring.block_bytes
        for place, source in zip(places, self._ring.sources(places), strict=True):
            self._arena[place * size : (place + 1) * size] = source

    def get(self, places: range) -> None:
        """Into the ring."""
        size = self._ring.block_bytes
        for place, target in zip(places, self._ring.targets(places), strict=True):
            target[:] = self._arena[place * size : (place + 1) * size]

    async def close(self) -> None:
        """Nothing to let go of but memory."""

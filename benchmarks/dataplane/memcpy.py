"""The floor of shared memory: the copy itself."""

from collections.abc import Sequence

from benchmarks.dataplane.ring import Ring, faulted_in
from benchmarks.dataplane.through_client import NotThisWay, ThroughClient


class Memcpy:
    """Copies blocks into other memory and back, one block at a time.

    That memory is what a node lends, slot by slot, as our own path has it: of two stretches of
    the same process one may be a third faster than the other for as long as it lives, because of
    the pages that the kernel had left. Without a lender it is memory of its own.
    """

    knob = 0

    def __init__(self, ring: Ring, lender: ThroughClient | None = None) -> None:
        self._ring = ring
        self._lender = lender
        self._slots: Sequence[memoryview] = ()

    async def prepare(self, op: str) -> None:
        """Has the blocks lie in the other memory, so that a get brings what was put."""
        if self._lender is not None:
            try:
                self._slots = await self._lender.lend()
                return
            except NotThisWay:  # The row of our own path says why.
                await self.close()
        if not self._slots:
            size = self._ring.block_bytes
            memory = faulted_in(self._ring.blocks * size)
            self._slots = [memory[start : start + size] for start in range(0, len(memory), size)]
        if op == "get":
            self.put(range(self._ring.blocks))

    def put(self, places: range) -> None:
        """Out of the ring."""
        for place, source in zip(places, self._ring.sources(places), strict=True):
            self._slots[place][:] = source

    def get(self, places: range) -> None:
        """Into the ring."""
        for place, target in zip(places, self._ring.targets(places), strict=True):
            target[:] = self._slots[place]

    async def close(self) -> None:
        """Gives back what was lent."""
        lender, self._lender, self._slots = self._lender, None, ()
        if lender is not None:
            await lender.close()

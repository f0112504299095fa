"""The sending end of a peer's read: what this node itself has of the blocks, window by window."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from kvstore.peers.holdings import Holdings
from kvstore.reading import Delivered, within
from kvstore.staging import Loan, Staging
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.memory import Memory, Slot
from kvstore.tiers.tiered import Tiered


class Sought(NamedTuple):
    """A block that a peer asks for, and how long it has to be."""

    name: bytes
    size: int


class Found:
    """A window of blocks on their way to a peer. Their views are valid until `close`."""

    def __init__(self, memory: Memory) -> None:
        self.blocks: list[Delivered] = []
        self.in_time = False
        """Whether all was looked for; otherwise what is missing may be here."""
        self._memory = memory
        self._pinned: list[Slot] = []
        self._loans: list[_HeldLoan] = []

    def pin(self, slot: Slot) -> None:
        """Keeps a block of memory where it is."""
        self._pinned.append(self._memory.pin(slot))

    def borrow(self, staging: Staging, size: int) -> "_HeldLoan":
        """A buffer for a block of the disk."""
        loan = _HeldLoan(staging.borrow(size))
        self._loans.append(loan)
        return loan

    def close(self) -> None:
        """Lets the blocks go. Later calls change nothing."""
        pinned, self._pinned = self._pinned, []
        loans, self._loans = self._loans, []
        self._memory.unpin_all(pinned)
        for loan in loans:
            loan.close()


class Finder:
    """Finds blocks by their names in memory and on disk. It asks nobody else: so nobody is asked
    in a circle."""

    def __init__(
        self, tiers: Tiered, disk: DiskTier | None, holdings: Holdings, staging: Staging
    ) -> None:
        self._tiers = tiers
        self._disk = disk
        self._holdings = holdings
        self._staging = staging

    async def find(self, sought: Sequence[Sought], left_s: float) -> Found:
        """What can be had of the blocks in the time that is left; the caller closes it."""
        found = Found(self._tiers.memory)
        found.blocks = [Delivered(index, None) for index in range(len(sought))]
        try:
            slots = [self._in_memory(each, found) for each in sought]
            with suppress(TimeoutError):
                async with within(max(left_s, 0.0)):
                    await self._tiers.digests.settle(slot for slot in slots if slot is not None)
                    for index, slot in enumerate(slots):
                        if slot is not None and slot.digest:
                            found.blocks[index] = Delivered(index, slot.view, slot.digest)
                    await self._read(sought, slots, found)
                    found.in_time = True
        except BaseException:
            found.close()
            raise
        for each, block in zip(sought, found.blocks, strict=True):
            if block.view is None and found.in_time:
                self._holdings.look_again(each.name)
        return found

    def _in_memory(self, sought: Sought, found: Found) -> Slot | None:
        slot = self._holdings.in_memory(sought.name)
        if slot is None or slot.size != sought.size:
            return None
        found.pin(slot)
        return slot

    async def _read(
        self, sought: Sequence[Sought], slots: Sequence[Slot | None], found: Found
    ) -> None:
        """Reads from disk, side by side, what is not in memory."""
        reads = [
            self._read_one(index, each, found)
            for index, (each, slot) in enumerate(zip(sought, slots, strict=True))
            if slot is None
        ]
        for outcome in await asyncio.gather(*reads, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def _read_one(self, index: int, sought: Sought, found: Found) -> None:
        if self._disk is None or not self._disk.has(*sought):
            return
        loan = found.borrow(self._staging, sought.size)
        with suppress(OSError):  # The device is broken: that is a miss.
            digest = await self._disk.read_named(sought.name, loan.view, loan)
            if digest is not None:
                found.blocks[index] = Delivered(index, loan.view, digest)


def windows(sought: Sequence[Sought], most_bytes: int) -> Iterator[Sequence[Sought]]:
    """The blocks in order, at most so many bytes at a time, and one at least."""
    start, size = 0, 0
    for index, each in enumerate(sought):
        if index > start and size + each.size > most_bytes:
            yield sought[start:index]
            start, size = index, 0
        size += each.size
    if start < len(sought):
        yield sought[start:]


class _HeldLoan:
    """A borrowed buffer, and its `Keeper`: it goes back when nobody writes to it any more."""

    def __init__(self, loan: Loan) -> None:
        self.view = loan.view
        self._loan = loan
        self._holds = 0
        self._closed = False

    @property
    def held(self) -> bool:
        return self._holds > 0

    def hold(self) -> None:
        self._holds += 1

    def release(self) -> None:
        assert self._holds > 0, "released more often than held"
        self._holds -= 1
        self._end()

    def close(self) -> None:
        """Nobody reads it any more."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        if self._closed and not self._holds:
            self._loan.give_back()

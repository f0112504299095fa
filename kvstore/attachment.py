"""What clients that have mapped the arena hold of it: slots that they read, slots that they fill.

Only the end of a client's connection proves that it is gone. Until then nothing that it holds is
reused, whatever becomes of its lease or its deadline: it might still be copying. What it may
hold is limited instead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.api.errors import InvalidArgument
from kvstore.placing import Placing
from kvstore.reading import Reading
from kvstore.tiers.memory import Slot
from kvstore.tiers.tiered import Acquired, Tiered, Want

PLACE_WINDOW_BYTES = 128 << 20
"""So much a write has reserved at a time; it gets more while it fills what it has."""
FIRST_READ_BYTES = 32 << 20
"""So much is acquired at first; the reader asks for the next window before he copies this one."""
READ_WINDOW_BYTES = 128 << 20
"""Each window is larger than the one before, up to this: each costs the reader a message."""


class Room:
    """How much of the arena attached clients may hold: all of them, and each."""

    def __init__(self, capacity_bytes: int, client_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.client_bytes = client_bytes
        self.held_bytes = 0


class Slots(NamedTuple):
    """What a writer shall fill next, by its place in the run. None, and none left: it is over."""

    slots: list[tuple[int, Slot]]
    held: list[int]
    full: bool
    """It is over, and not all that was wanted could be placed."""


@dataclass(slots=True)
class _Writing:
    """A write under way."""

    placing: Placing
    share_bytes: int
    slots: int = 0
    """How many it holds, to be filled or committed."""


class _Reading:
    """A read under way, and the windows that its reader may still be copying."""

    def __init__(
        self, reading: Reading, share_bytes: int, first_bytes: int, window_bytes: int
    ) -> None:
        self.reading = reading
        self.share_bytes = share_bytes
        self.windows = reading.windows(window_bytes, first_bytes)
        self.left: list[Want] = []
        """What of a window had no room yet."""
        self.held: list[list[Acquired]] = []
        self.coming = 0
        """How many blocks are being looked for, and counted as held already."""


class Attachment:
    """One client. Call `end` when its connection has ended.

    Invariant: `held_bytes` is what its slots cost, and within the limits of `room`.
    """

    def __init__(self, tiers: Tiered, room: Room) -> None:
        self._tiers = tiers
        self._room = room
        self._writes: dict[int, _Writing] = {}
        self._reads: dict[int, _Reading] = {}
        self.held_bytes = 0

    # Writing.

    async def begin_write(self, number: int, placing: Placing) -> Slots:
        """The first slots of a write."""
        self._check_new(number)
        share_bytes = self._tiers.memory.share_bytes(placing.block_bytes)
        self._writes[number] = _Writing(placing, share_bytes)
        return await self._more_slots(number)

    async def commit(self, number: int, blocks: int = 0) -> Slots:
        """Takes what was written to the first of the slots, or to all of them; the next ones.

        Raises InvalidArgument for more blocks than were given slots.
        """
        writing = self._writes.get(number)
        if writing is None:
            raise InvalidArgument(f"number: no write {number} is under way")
        if blocks > writing.slots:
            raise InvalidArgument(f"commit.blocks: {blocks} of {writing.slots} slots")
        try:
            await writing.placing.commit(blocks or writing.slots)
        finally:
            self._settle(writing)
        return await self._more_slots(number)

    async def _more_slots(self, number: int) -> Slots:
        writing = self._writes[number]
        placing, share_bytes = writing.placing, writing.share_bytes
        wanted = placing.left
        # Another write of this client finds room beside it.
        window_bytes = min(PLACE_WINDOW_BYTES, self._room.client_bytes // 2)
        window = max(window_bytes // share_bytes, 1)
        count = self._take(share_bytes, min(wanted, window - writing.slots))
        writing.slots += count
        try:
            slots = await placing.reserve(count) if count else []
        finally:
            self._settle(writing)
        over = not writing.slots
        if over:
            placing.finish()
            self.done(number)
        return Slots(slots, placing.held, full=bool(wanted) and over)

    def _settle(self, writing: _Writing) -> None:
        """Gives back the room of slots that a write does not have, or not any more."""
        unused = writing.slots - writing.placing.reserved
        writing.slots -= unused
        self._give_back(writing.share_bytes * unused)

    # Reading.

    async def begin_read(
        self, number: int, reading: Reading, block_bytes: int, left_s: Callable[[], float]
    ) -> tuple[list[Acquired | None], bool]:
        """The first window of a read, and whether it is the last."""
        self._check_new(number)
        share_bytes = self._tiers.memory.share_bytes(block_bytes)
        # One window is copied while the next one is looked for; large ones leave room beside them.
        client_bytes = self._room.client_bytes
        first_bytes = min(FIRST_READ_BYTES, client_bytes // 2)
        window_bytes = min(READ_WINDOW_BYTES, max(first_bytes, client_bytes // 8))
        self._reads[number] = _Reading(reading, share_bytes, first_bytes, window_bytes)
        return await self.next_window(number, left_s)

    async def next_window(
        self, number: int, left_s: Callable[[], float]
    ) -> tuple[list[Acquired | None], bool]:
        """The next window; the reader is done with all windows but the last one."""
        under_way = self._reads.get(number)
        if under_way is None:
            raise InvalidArgument(f"number: no read {number} is under way")
        self._release(under_way, keep=1)
        window = under_way.left or next(under_way.windows, [])
        count = self._take(under_way.share_bytes, len(window))
        if not count and any(under_way.held):
            # The reader still copies what has the room, and gives it back when he asks again.
            under_way.left = window
            under_way.held.append([])
            return [], False
        if not count:
            # Others of this client's calls, or of other clients, hold all that may be held.
            return [None] * sum(map(len, [window, *under_way.windows])), True
        part, under_way.left = window[:count], window[count:]
        under_way.coming = count
        try:
            given = await under_way.reading.pin(part, left_s())
        except BaseException:
            self._give_back(under_way.share_bytes * count)
            raise
        finally:
            under_way.coming = 0
        held = [block for block in given if block is not None]
        self._give_back(under_way.share_bytes * (count - len(held)))
        under_way.held.append(held)
        under_way.left = under_way.left or next(under_way.windows, [])
        return given, not under_way.left

    def _release(self, under_way: _Reading, keep: int) -> None:
        while len(under_way.held) > keep:
            held = under_way.held.pop(0)
            self._tiers.release(held)
            self._give_back(under_way.share_bytes * len(held))

    def tier(self, number: int, block: Acquired) -> str:
        """Where a block of a read lay."""
        return self._reads[number].reading.tier(block)

    # Ends.

    def done(self, number: int) -> None:
        """Gives back what a read or write holds; unknown ones are over already."""
        writing = self._writes.pop(number, None)
        if writing is not None:
            writing.placing.close()
            self._give_back(writing.share_bytes * writing.slots)
        under_way = self._reads.pop(number, None)
        if under_way is not None:
            self._release(under_way, keep=0)

    def end(self) -> None:
        """The client is gone: everything comes back."""
        for number in [*self._writes, *self._reads]:
            self.done(number)

    def check(self) -> None:
        """Recomputes the invariant; AssertionError tells what broke."""
        writes = sum(each.share_bytes * each.slots for each in self._writes.values())
        reads = sum(
            each.share_bytes * (each.coming + sum(map(len, each.held)))
            for each in self._reads.values()
        )
        assert writes + reads == self.held_bytes, "bytes lost"
        assert self.held_bytes <= self._room.client_bytes, "more than a client may hold"
        assert self._room.held_bytes <= self._room.capacity_bytes, "more than all may hold"

    def _check_new(self, number: int) -> None:
        if number in self._writes or number in self._reads:
            raise InvalidArgument(f"number: {number} is under way already")

    def _take(self, share_bytes: int, count: int) -> int:
        """Room for so many slots, or for fewer."""
        room = self._room
        left_bytes = min(room.client_bytes - self.held_bytes, room.capacity_bytes - room.held_bytes)
        count = max(0, min(count, left_bytes // share_bytes))
        self.held_bytes += share_bytes * count
        room.held_bytes += share_bytes * count
        return count

    def _give_back(self, size_bytes: int) -> None:
        self.held_bytes -= size_bytes
        self._room.held_bytes -= size_bytes

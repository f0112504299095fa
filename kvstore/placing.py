"""The receiving end of a write into the arena: slots to fill, then blocks in memory."""

from collections import deque

from kvstore.offer import Offer
from kvstore.tiers.memory import Slot


class Placing:
    """One run of a chain whose writer fills the slots himself. Call `close` however it ends.

    Invariant: the slots of `reserve` are known to nobody else until `commit`, or given back.
    """

    def __init__(self, offer: Offer) -> None:
        self._offer = offer
        self._left = deque(offer.wanted)
        self._slots: deque[tuple[int, Slot]] = deque()

    @property
    def block_bytes(self) -> int:
        """How long the blocks are."""
        return self._offer.block_bytes

    @property
    def held(self) -> list[int]:
        """The blocks that the node holds now, as indexes into the run."""
        return self._offer.held

    @property
    def left(self) -> int:
        """How many blocks are wanted that got no slot yet."""
        return len(self._left)

    @property
    def reserved(self) -> int:
        """How many slots are neither committed nor given back."""
        return len(self._slots)

    async def reserve(self, count: int) -> list[tuple[int, Slot]]:
        """Slots for the next blocks that are wanted, `count` at most; fewer if memory is full."""
        offer = self._offer
        given: list[tuple[int, Slot]] = []
        if self._left and not self._slots and not await offer.hold_parent(self._left[0]):
            return given  # Room is not made by what they descend from; without it they are useless.
        for _ in range(min(count, len(self._left))):
            index = self._left[0]
            slot = await offer.tiers.reserve(offer.refs[index], offer.block_bytes)
            if slot is None:
                break
            self._left.popleft()
            given.append((index, slot))
            self._slots.append((index, slot))
        if given:
            offer.tiers.digests.give_way(self)
        return given

    async def commit(self, blocks: int) -> None:
        """Takes the first blocks of those that have slots; they are filled."""
        offer = self._offer
        for _ in range(blocks):
            index, slot = self._slots[0]
            above = await offer.hold_parent(index)
            self._slots.popleft()
            if not above:
                offer.tiers.memory.abort(slot)
            elif offer.commit(index, slot, b"") is slot:
                # Not later: from here on others may want to read it.
                offer.tiers.digests.begin(offer.space_id, [slot])

    def finish(self) -> None:
        """No more blocks come."""
        self._offer.tiers.digests.go_on(self)
        self._offer.advise()

    def close(self) -> None:
        """Gives back the slots that were not committed."""
        self._offer.tiers.digests.go_on(self)
        slots, self._slots = self._slots, deque()
        for _, slot in slots:
            self._offer.tiers.memory.abort(slot)
        self._offer.close()

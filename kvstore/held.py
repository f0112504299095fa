"""Slots that stay pinned as long as a thread uses them, also behind its caller's back."""

from kvstore.tiers.memory import Memory, Slot


class HeldSlot:
    """The `Keeper` of a slot: as long as somebody holds it the slot is pinned, so never reused.

    Invariant: it has one pin of the slot for each `hold` that was not released.
    """

    __slots__ = ("_holds", "_memory", "_slot")

    def __init__(self, memory: Memory, slot: Slot) -> None:
        self._memory = memory
        self._slot = slot
        self._holds = 0

    @property
    def held(self) -> bool:
        return self._holds > 0

    def hold(self) -> None:
        self._memory.pin(self._slot)
        self._holds += 1

    def release(self) -> None:
        assert self._holds > 0, "released more often than held"
        self._holds -= 1
        self._memory.unpin(self._slot)

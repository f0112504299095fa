"""Host memory that blocks pass through: bounded, used again, pinned where there is a GPU."""

import threading
from collections.abc import Sequence

import torch

from kvstore.api.clock import Clock


class Staging:
    """Invariant: what is taken and what lies ready for reuse are together at most `capacity_bytes`,
    but for a single block that is larger than that alone.

    Fresh memory costs a fault for each of its pages, and pinning more than that; so it is kept.
    """

    def __init__(self, capacity_bytes: int, clock: Clock, *, pinned: bool) -> None:
        self._capacity_bytes = capacity_bytes
        self._clock = clock
        self._pinned = pinned
        # All below is guarded by the condition.
        self._given_back = threading.Condition()
        self._taken_bytes = 0
        self._ready: dict[int, list[torch.Tensor]] = {}
        self._closed = False

    def take(self, block_bytes: int, most: int, until_s: float | None = None) -> list[torch.Tensor]:
        """Up to `most` buffers of a block each; waits for the first until then, or not at all.

        They hold whatever they held. None at all once this is closed.
        """
        with self._given_back:
            while not self._closed:
                count = min(most, self._room(block_bytes))
                if count:
                    return [self._one(block_bytes) for _ in range(count)]
                left_s = until_s - self._clock.monotonic_s() if until_s is not None else 0.0
                if left_s <= 0 or not self._given_back.wait(left_s):
                    break
        return []

    def give(self, buffers: Sequence[torch.Tensor]) -> None:
        """Takes buffers back. Nothing may use them any more."""
        with self._given_back:
            for buffer in buffers:
                self._taken_bytes -= buffer.numel()
                if not self._closed:
                    self._ready.setdefault(buffer.numel(), []).append(buffer)
            self._given_back.notify_all()

    def close(self) -> None:
        """Wakes all who wait, and lets the memory go."""
        with self._given_back:
            self._closed = True
            self._ready.clear()
            self._given_back.notify_all()

    def _room(self, block_bytes: int) -> int:
        if not self._taken_bytes:
            return max(1, self._capacity_bytes // block_bytes)
        return (self._capacity_bytes - self._taken_bytes) // block_bytes

    def _one(self, block_bytes: int) -> torch.Tensor:
        self._taken_bytes += block_bytes
        ready = self._ready.get(block_bytes)
        if ready:
            return ready.pop()
        self._make_room(block_bytes)
        return torch.empty(block_bytes, dtype=torch.uint8, pin_memory=self._pinned)

    def _make_room(self, block_bytes: int) -> None:
        """Forgets buffers of other sizes that would take the place of this one."""
        ready_bytes = sum(size * len(buffers) for size, buffers in self._ready.items())
        for size, buffers in self._ready.items():
            while buffers and self._taken_bytes + ready_bytes > self._capacity_bytes:
                buffers.pop()
                ready_bytes -= size


def as_memory(buffer: torch.Tensor) -> memoryview:
    """The buffer as the client takes it, without a copy."""
    return memoryview(buffer.numpy())  # type: ignore[arg-type]

"""How much may be under way at a tier: what it delivers in the time that an answer may take.

A queue that is longer than that only turns work into answers that come too late. The limit is the
measured rate times the target, which is how congestion control by bandwidth and delay bounds what
is in flight (Cardwell et al., BBR, 2016); a first version by additive increase and multiplicative
decrease needed several deadlines to learn that a tier is slow, because it only sees late answers.
"""

START_BYTES = 16 << 20
"""Under way at most until the first answer has come."""
LEAST_BYTES = 1 << 20
HALF_LIFE_S = 1.0
"""Of what was measured. Only time counts in which something was under way."""
SHORTEST_S = 1e-4


class Window:
    """Bytes under way at a tier: at most `most_bytes`, and what it delivers in `target_s`.

    One batch alone is always admitted, however large. Plain bookkeeping.

    Invariant: `used_bytes` is the sum over batches that began and have not ended.
    """

    def __init__(self, most_bytes: int, target_s: float) -> None:
        self._most_bytes = most_bytes
        self._target_s = target_s
        self._delivered_bytes = 0.0
        self._busy_s = 0.0
        self._marked_s = 0.0
        self.used_bytes = 0

    @property
    def limit_bytes(self) -> float:
        """What may be under way now."""
        if not self._busy_s:
            return min(START_BYTES, self._most_bytes)
        rate = self._delivered_bytes / self._busy_s
        return min(max(rate * self._target_s, LEAST_BYTES), self._most_bytes)

    def admits(self, size: int) -> bool:
        """Whether a batch of `size` bytes may begin now."""
        return self.used_bytes == 0 or self.used_bytes + size <= self.limit_bytes

    def begin(self, size: int, now_s: float) -> None:
        """A batch begins."""
        if not self.used_bytes:
            self._marked_s = now_s
        self.used_bytes += size

    def end(self, size: int, now_s: float, *, delivered: bool) -> None:
        """A batch has ended; it was `delivered`, or it failed or was given up."""
        self.used_bytes -= size
        passed_s = max(now_s - self._marked_s, 0.0)
        fading = 0.5 ** (passed_s / HALF_LIFE_S)
        self._delivered_bytes = self._delivered_bytes * fading + (size if delivered else 0)
        self._busy_s = max(self._busy_s * fading + passed_s, SHORTEST_S)
        self._marked_s = now_s

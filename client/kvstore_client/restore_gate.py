"""Restore or recompute: what of a match is worth loading, because computing it would take longer.

Plain bookkeeping. It is told how long the engine computes and how long loads take, and forgets old
measurements by and by, so that it follows what the machine does now.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore_client.match import Run

DECAY = 0.9
"""What a measurement still weighs when the next one comes."""
EXPLORE_EVERY = 16
"""Of so many matches that were cut short one is loaded whole: a tier may have recovered."""


@dataclass(slots=True)
class _Line:
    """Seconds as a line over an amount, by least squares in which older points weigh less."""

    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, amount: float, seconds: float) -> None:
        """One more measurement."""
        self.n = self.n * DECAY + 1
        self.x = self.x * DECAY + amount
        self.y = self.y * DECAY + seconds
        self.xx = self.xx * DECAY + amount * amount
        self.xy = self.xy * DECAY + amount * seconds

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self.x > 0

    def line(self) -> tuple[float, float]:
        """Seconds of a call that moves nothing, and seconds for each unit beyond it."""
        spread = self.n * self.xx - self.x * self.x
        if spread > 1e-6 * self.xx * self.n:
            slope = (self.n * self.xy - self.x * self.y) / spread
            start = (self.y - slope * self.x) / self.n
            if slope > 0 and start >= 0:
                return start, slope
        return 0.0, self.y / self.x


class RestoreGate:
    """Decides for one engine and one space. Any thread may call.

    As long as the engine's speed, or a tier's, is not known, everything is loaded: that is how
    both come to be known.
    """

    def __init__(self, block_tokens: int, block_bytes: int) -> None:
        self._block_tokens = block_tokens
        self._block_bytes = block_bytes
        self._prefill = _Line()
        self._tiers: dict[str, _Line] = {}
        self._cut_short = 0
        self._lock = threading.Lock()

    def computed(self, tokens: int, seconds: float) -> None:
        """The engine has prefilled so many tokens in this time."""
        if tokens > 0:
            with self._lock:
                self._prefill.add(tokens, seconds)

    def loaded(self, tiers: Sequence[str], seconds: float) -> None:
        """One load brought these blocks, by the tier of each. One of several tiers says little."""
        if tiers and len(set(tiers)) == 1:
            with self._lock:
                line = self._tiers.setdefault(tiers[0], _Line())
                line.add(len(tiers) * self._block_bytes, seconds)

    def worth(self, runs: Sequence[Run], held_blocks: int = 0) -> int:
        """How many blocks beyond those held should be loaded, given where they lie, in order."""
        with self._lock:
            found = sum(run.blocks for run in runs) - held_blocks
            best = self._best(runs, held_blocks)
            if best is None or best == found:
                return found
            self._cut_short += 1
            return found if self._cut_short % EXPLORE_EVERY == 0 else best

    def _best(self, runs: Sequence[Run], held_blocks: int) -> int | None:
        """The length that saves the most time; None if not enough is known."""
        if not self._prefill.known:
            return None
        _, token_s = self._prefill.line()
        begun: set[str] = set()
        blocks = best = 0
        saved_s = best_s = 0.0
        for run in runs:
            count = max(0, run.blocks - held_blocks)
            held_blocks = max(0, held_blocks - run.blocks)
            if not run.tier or not count:
                blocks += count
                continue
            line = self._tiers.get(run.tier)
            if line is None:
                return None
            call_s, byte_s = line.line()
            saved_s -= 0.0 if run.tier in begun else call_s
            begun.add(run.tier)
            saved_s += count * (self._block_tokens * token_s - self._block_bytes * byte_s)
            blocks += count
            if saved_s >= best_s:
                best, best_s = blocks, saved_s
        return best

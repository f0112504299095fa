"""Time to first token of one prompt, restored and recomputed, and what follows from many."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

NEAR = 0.1
"""Ways that differ by less than this part are as good as each other."""


@dataclass(frozen=True, slots=True)
class Point:
    """One length of prompt, one length of prefix, one source. Times are medians."""

    model: str
    source: str
    prefix: str
    """How the length of the prefix was chosen."""
    prompt_tokens: int
    restored_tokens: int
    recompute_s: list[float] = field(default_factory=list)
    restore_s: list[float] = field(default_factory=list)
    gated_s: list[float] = field(default_factory=list)
    gate_restored: list[bool] = field(default_factory=list)

    @property
    def recomputed(self) -> float:
        """Seconds to the first token with everything computed."""
        return statistics.median(self.recompute_s)

    @property
    def restored(self) -> float:
        """The same with the prefix restored."""
        return statistics.median(self.restore_s)

    @property
    def speed_up(self) -> float:
        """How many times sooner the first token comes."""
        return self.recomputed / self.restored

    @property
    def saved_s(self) -> float:
        """What a restore saves; below 0 it costs."""
        return self.recomputed - self.restored

    @property
    def gate_decided(self) -> bool:
        """Whether the gate was asked here."""
        return bool(self.gated_s)

    @property
    def regret(self) -> float:
        """Time lost where the gate decides, as a part of the better of the two ways."""
        better = min(self.recomputed, self.restored)
        return statistics.median(self.gated_s) / better - 1

    @property
    def is_clear(self) -> bool:
        """Whether one way was better in every repeat, by more than `NEAR` of it."""
        for better, worse in (
            (self.recompute_s, self.restore_s),
            (self.restore_s, self.recompute_s),
        ):
            if min(worse) > max(better) * (1 + NEAR):
                return True
        return False

    @property
    def gate_restores(self) -> bool:
        """What the gate chose in most repeats."""
        return statistics.mean(self.gate_restored) > 0.5

    @property
    def gate_is_right(self) -> bool:
        """Whether that is the better way."""
        return self.gate_restores == (self.saved_s > 0)

    def as_row(self) -> dict[str, Any]:
        """For JSON; milliseconds."""
        row: dict[str, Any] = {
            "model": self.model,
            "source": self.source,
            "prefix": self.prefix,
            "prompt_tokens": self.prompt_tokens,
            "restored_tokens": self.restored_tokens,
            "recompute_ms": round(1e3 * self.recomputed, 2),
            "restore_ms": round(1e3 * self.restored, 2),
            "times_sooner": round(self.speed_up, 2),
            "repeats": len(self.restore_s),
        }
        if self.gate_decided:
            row["gate_restores"] = self.gate_restores
            row["gate_ms"] = round(1e3 * statistics.median(self.gated_s), 2)
            row["gate_regret"] = round(self.regret, 3)
        return row


@dataclass(frozen=True, slots=True)
class BreakEven:
    """From how many restored tokens on a restore pays."""

    tokens: float | None
    """None: at no length that was measured."""
    at_most: bool = False
    """True: it pays at the shortest length already, so it lies there or below."""

    def __str__(self) -> str:
        if self.tokens is None:
            return "at no length measured"
        return f"from {'at most ' if self.at_most else ''}{self.tokens:.0f} tokens on"


def break_even(points: Sequence[Point]) -> BreakEven:
    """Where the saved time of one source's points becomes positive for good."""
    saved: dict[int, list[float]] = {}
    for point in points:
        saved.setdefault(point.restored_tokens, []).append(point.saved_s)
    line = [(tokens, statistics.median(times)) for tokens, times in sorted(saved.items())]
    losing = [at for at, (_, saved_s) in enumerate(line) if saved_s <= 0]
    if not losing:
        return BreakEven(line[0][0], at_most=True)
    last = losing[-1]
    if last + 1 == len(line):
        return BreakEven(None)
    (left, lost_s), (right, gained_s) = line[last], line[last + 1]
    return BreakEven(left + (right - left) * -lost_s / (gained_s - lost_s))

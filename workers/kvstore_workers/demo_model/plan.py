"""What a training run does: through which phases, for how long, at which learning rates."""

import math
from dataclasses import dataclass
from pathlib import Path

WARMUP_STEPS = 200
LR_PEAK = 2.5e-3
LR_PEAK_MORE = 5e-4
LR_FLOOR_SHARE = 0.03


@dataclass(frozen=True)
class Phase:
    """One stretch of the run at one context length."""

    name: str
    context_tokens: int
    windows_per_batch: int
    time_share: float
    # A planning figure for two cores with bfloat16 matrix units. It is fixed, not measured, so
    # that the number of steps, and with it the weights, follows from the arguments alone.
    planned_tokens_per_second: float

    def steps(self, minutes: float) -> int:
        """Return how many steps this phase has in a run planned for `minutes`."""
        tokens = minutes * 60 * self.time_share * self.planned_tokens_per_second
        return max(1, round(tokens / (self.context_tokens * self.windows_per_batch)))


PHASES = (
    Phase("short", 256, 4, 0.68, 4800.0),
    Phase("middle", 1024, 1, 0.16, 4600.0),
    Phase("long", 3072, 1, 0.16, 2800.0),
)
MORE = (Phase("more", 3072, 1, 1.0, 2800.0),)


@dataclass(frozen=True)
class Plan:
    """What a run does: for how long, through which phases, from which weights."""

    minutes: float
    seed: int
    more_from: Path | None = None
    """A model to go on from, with long context alone; None: from drawn weights, all phases."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The stretches of the run, in order."""
        return PHASES if self.more_from is None else MORE

    @property
    def lr_peak(self) -> float:
        """The highest learning rate; a trained model is moved with care."""
        return LR_PEAK if self.more_from is None else LR_PEAK_MORE


def learning_rate(step: int, steps: int, lr_peak: float) -> float:
    """Return the learning rate of `step`: a short linear rise, then half a cosine down."""
    warmup_steps = min(WARMUP_STEPS, max(1, steps // 10))
    if step < warmup_steps:
        return lr_peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return lr_peak * (LR_FLOOR_SHARE + (1 - LR_FLOOR_SHARE) * cosine)

"""How long calls may take: the budgets of a client, and the deadline of one call."""

import math
from dataclasses import dataclass, fields

from kvstore.api.clock import Clock

MAX_BUDGET_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Seconds that each kind of call may take; past them it is a miss or an error.

    Raises ValueError, naming the field, for a value that is not above 0 and at most an hour.
    """

    open_s: float = 5.0
    """`open_space`."""
    match_s: float = 0.1
    """`match`: it stands before the first token, so it is short."""
    load_s: float = 2.0
    """`load` and `load_any`."""
    store_s: float = 5.0
    """`store`."""
    control_s: float = 5.0
    """All other calls but `watch`, which lasts until the caller ends it."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and 0 < value <= MAX_BUDGET_S):
                raise ValueError(
                    f"budgets.{field.name}: must lie above 0 and at most {MAX_BUDGET_S:g} s, "
                    f"got {value}"
                )


class Deadline:
    """The moment at which a call's budget is spent.

    A budget of 0 or less is spent at once: an engine may hand in what it has left.
    """

    def __init__(self, clock: Clock, budget_s: float) -> None:
        if math.isnan(budget_s):
            raise ValueError("budget_s: must be a number of seconds, got nan")
        self.budget_s = min(budget_s, MAX_BUDGET_S)
        self._clock = clock
        self._end_s = clock.monotonic_s() + self.budget_s

    def rest_s(self) -> float:
        """Seconds until then; 0 or less once it is over. It may be another call's budget."""
        return self._end_s - self._clock.monotonic_s()

    def left_s(self) -> float:
        """Seconds until then. Raises TimeoutError when none are left."""
        left_s = self.rest_s()
        if left_s <= 0:
            raise TimeoutError(f"the budget of {self.budget_s:g} s is spent")
        return left_s

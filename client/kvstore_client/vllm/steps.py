"""How fast the engine computes, seen from its scheduler."""

from collections.abc import Mapping

from kvstore.api.clock import Clock
from kvstore_client.restore_gate import RestoreGate


class StepTimes:
    """Takes the time from one step to the next as that of the first, while the engine is busy.

    That holds as well where the next step is scheduled before the last one has run: in the long
    run the scheduler is as fast as the engine.
    """

    def __init__(self, clock: Clock, least_tokens: int) -> None:
        self._clock = clock
        self._least_tokens = least_tokens
        """A step of fewer tokens says how long decoding takes."""
        self._began_s = 0.0
        self._last: Mapping[str, int] = {}

    def begins(self, scheduled: Mapping[str, int], gate: RestoreGate | None) -> None:
        """A step with so many tokens of each request begins; the gate hears of the last one."""
        now_s = self._clock.monotonic_s()
        tokens = sum(self._last.values())
        # With a request in common there was no pause in between.
        if gate is not None and tokens >= self._least_tokens and scheduled.keys() & self._last:
            gate.computed(tokens, now_s - self._began_s)
        self._began_s, self._last = now_s, dict(scheduled)

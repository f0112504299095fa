"""What a client lost without troubling its caller: counted always, logged now and then."""

import logging
from collections import Counter

import grpc

from kvstore.api.clock import Clock
from kvstore.api.errors import STATUS, KvstoreError

LOG_INTERVAL_S = 10.0
"""At most one line of each kind in this time: a dead node must not fill the engine's log."""

_OUTCOMES = {
    "late": "the budget was spent before the answer was complete",
    "refused": "the node said no: a limit, a right or a field",
    "failed": "the node could not be reached, broke off or answered nonsense",
}
MEANINGS: dict[str, str] = {
    f"{operation}_{outcome}": meaning
    for operation in ("match", "load", "store", "release", "hint")
    for outcome, meaning in _OUTCOMES.items()
} | {
    "locate_failed": "a remote tier could not ask where blocks lie",
    "load_corrupt": "a block came back damaged and was thrown away",
    "load_short": "the node ended its answer before the last block that was asked for",
    "release_dropped": "too many calls were under way; this lease runs until it expires",
    "hint_dropped": "too many calls were under way; this hint was not given",
    "space_reopened": "the node did not know a space, usually after a restart; it was opened again",
}
"""Every name that `Losses.counters` can hold."""

_LATE = {grpc.StatusCode.DEADLINE_EXCEEDED}
_REFUSED = {
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.INVALID_ARGUMENT,
}


class Losses:
    """Counts by the names of `MEANINGS` and logs each name at most once per `LOG_INTERVAL_S`.

    Invariant: `counters` holds no other names.
    """

    def __init__(self, clock: Clock, logger: logging.Logger) -> None:
        self.counters: Counter[str] = Counter()
        self._clock = clock
        self._logger = logger
        self._logged_at_s: dict[str, float] = {}

    def count(self, name: str, reason: str, times: int = 1) -> None:
        """Adds `times` to one counter. `reason` is for the log only."""
        if name not in MEANINGS:
            raise KeyError(f"{name}: not a counter; the names are those of MEANINGS")
        self.counters[name] += times
        now_s = self._clock.monotonic_s()
        logged_at_s = self._logged_at_s.get(name)
        if logged_at_s is not None and now_s - logged_at_s < LOG_INTERVAL_S:
            return
        self._logged_at_s[name] = now_s
        self._logger.warning("%s (%d so far): %s", name, self.counters[name], reason)

    def count_error(self, operation: str, error: BaseException) -> None:
        """Counts an operation that failed by how it failed: late, refused or failed."""
        self.count(f"{operation}_{_outcome(error)}", describe(error))


def describe(error: BaseException) -> str:
    """One line that says what happened, without a traceback."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {error}"


def _outcome(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "late"
    if isinstance(error, grpc.aio.AioRpcError):
        if error.code() in _LATE:
            return "late"
        if error.code() in _REFUSED:
            return "refused"
    if isinstance(error, KvstoreError) and STATUS.get(type(error)) in _REFUSED:
        return "refused"
    return "failed"

"""Nothing that goes wrong in a hook reaches vLLM's scheduler: it is counted and logged."""

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

LOG_INTERVAL_S = 10.0
"""At most one traceback of each hook in this time."""

_log = logging.getLogger("kvstore.vllm_tier")
_logged_at_s: dict[str, float] = {}


class Counting(Protocol):
    """What has hooks."""

    errors: Counter[str]
    """By the name of the hook."""


Hook = TypeVar("Hook", bound=Callable[..., Any])


def harmless(otherwise: Callable[[], Any]) -> Callable[[Hook], Hook]:
    """A hook that answers `otherwise()` where it would raise. Its object is `Counting`."""

    def guard(hook: Hook) -> Hook:
        @functools.wraps(hook)
        def guarded(self: Counting, *args: Any, **kwargs: Any) -> Any:
            try:
                return hook(self, *args, **kwargs)
            except Exception:  # noqa: BLE001 - the edge to the engine, which outlives its cache
                tell(self, hook.__name__)
                return otherwise()

        return guarded  # type: ignore[return-value]

    return guard


def tell(who: Counting, hook: str) -> None:
    """Counts and logs the exception that is being handled."""
    who.errors[hook] += 1
    now_s = time.monotonic()
    if now_s - _logged_at_s.get(hook, -LOG_INTERVAL_S) >= LOG_INTERVAL_S:
        _logged_at_s[hook] = now_s
        _log.exception("%s: kept from the engine", hook)

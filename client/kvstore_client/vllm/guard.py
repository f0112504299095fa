"""Nothing that goes wrong in a hook reaches the engine: it is logged now and then, and counted."""

import functools
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from kvstore_client.vllm.stats import Tally

LOG_INTERVAL_S = 10.0
"""At most one traceback of each hook in this time."""

Hook = TypeVar("Hook", bound=Callable[..., Any])
_log = logging.getLogger("kvstore.vllm")
_logged_at_s: dict[str, float] = {}


def guarded(otherwise: Callable[[], Any] = lambda: None) -> Callable[[Hook], Hook]:
    """A hook that answers `otherwise()` where it would raise. Its object has a `tally`."""

    def wrap(hook: Hook) -> Hook:
        name = hook.__name__

        @functools.wraps(hook)
        def inner(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return hook(self, *args, **kwargs)
            except Exception:  # noqa: BLE001  an engine outlives its cache
                tell(self.tally, name)
                return otherwise()

        return inner  # type: ignore[return-value]

    return wrap


def tell(tally: Tally, hook: str) -> None:
    """Counts and logs the exception that is being handled."""
    tally.add("errors", label=hook)
    now_s = time.monotonic()
    if now_s - _logged_at_s.get(hook, -LOG_INTERVAL_S) >= LOG_INTERVAL_S:
        _logged_at_s[hook] = now_s
        _log.exception("%s: kept from the engine; what it was about is computed or not saved", hook)

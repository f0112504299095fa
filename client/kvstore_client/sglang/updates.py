"""Updates of the running engine's weights, which SGLang names only where its caller did.

An update from disk, from tensors or over a connection may come without a `weight_version`; the
engine then says of its new weights what it said of the old ones. All four ways of updating pass
one method, in the process that has the backend.
"""

import functools
import sys
from typing import Any

_MODULE = "sglang.srt.managers.scheduler_components.weight_updater"
_CLASS = "SchedulerWeightUpdaterManager"
_METHOD = "record_weight_version_after_update"

_count = 0


def updates() -> int:
    """How many there were in this process since `watch_updates`."""
    return _count


def watch_updates() -> None:
    """Counts from now on. Idempotent; where there is no engine there is nothing to count.

    Raises ValueError for an engine that updates its weights in another way.
    """
    module = sys.modules.get(_MODULE)
    if module is None:
        return
    updater = getattr(module, _CLASS, None)
    method = getattr(updater, _METHOD, None)
    if method is None:
        raise ValueError(
            f"{_MODULE} has no {_CLASS}.{_METHOD}: updates of this engine's weights would go unseen"
        )
    if not hasattr(method, "__wrapped__"):
        setattr(updater, _METHOD, _counted(method))


def _counted(method: Any) -> Any:
    @functools.wraps(method)
    def counted(*args: Any, **named: Any) -> Any:
        global _count
        _count += 1
        return method(*args, **named)

    return counted

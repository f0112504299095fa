"""Reuse hints: what a request says of its future, and what the engine knows of it."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvstore.api.errors import InvalidArgument
from kvstore.api.hint import MAX_SESSION_ID_BYTES, Reuse, ReuseHint

FIELD = "kvstore"
"""Of a request's `kv_transfer_params`."""

_FIELDS = {"session_id", "reuse", "expected_return_ms"}
_log = logging.getLogger("kvstore.vllm.hints")


def hint_of(request: Any) -> ReuseHint | None:
    """The hint of a new request; None: nothing is known. What is wrong is logged and ignored."""
    given: Any = (request.kv_transfer_params or {}).get(FIELD)
    hint = ReuseHint()
    if given is not None:
        try:
            hint = _read(given)
        except ValueError as error:
            _log.warning("kv_transfer_params.%s ignored: %s", FIELD, error)
    if not hint.session_id and request.session_id:
        hint = replace(hint, session_id=_session(request.session_id))
    if hint.reuse is Reuse.UNKNOWN and request.pooling_params is not None:
        hint = replace(hint, reuse=Reuse.FINAL)  # Nobody extends what was embedded or scored.
    if hint.reuse is Reuse.UNKNOWN and request.resumable:
        hint = replace(hint, reuse=Reuse.AUTOMATIC)
    return hint if hint != ReuseHint() else None


def hint_at_end(hint: ReuseHint | None, finish_reason: str) -> ReuseHint | None:
    """What is known once a request has ended; None: nothing more than before."""
    if finish_reason != "stop" or (hint is not None and hint.reuse is not Reuse.UNKNOWN):
        return None
    # The model has said all that it had to say: whoever asked goes on, or nobody does.
    return replace(hint or ReuseHint(), reuse=Reuse.INTERACTIVE)


def _read(given: Any) -> ReuseHint:
    if not isinstance(given, Mapping):
        raise ValueError(f"an object with {', '.join(sorted(_FIELDS))} is needed")
    if unknown := sorted(map(str, set(given) - _FIELDS)):
        raise ValueError(f"{unknown[0]}: no such field; there are {', '.join(sorted(_FIELDS))}")
    try:
        return ReuseHint(
            _session(given.get("session_id", "")),
            _reuse(given.get("reuse", "unknown")),
            _milliseconds(given.get("expected_return_ms", 0)),
        )
    except InvalidArgument as error:
        raise ValueError(str(error)) from None


def _session(given: object) -> bytes:
    if not isinstance(given, str):
        raise ValueError(f"session_id: a text is needed, got {given!r}")
    session = given.encode()
    return session if len(session) <= MAX_SESSION_ID_BYTES else hashlib.sha256(session).digest()


def _reuse(given: object) -> Reuse:
    names = {each.name.lower(): each for each in Reuse}
    if not isinstance(given, str) or given.lower() not in names:
        raise ValueError(f"reuse: one of {', '.join(names)} is needed, got {given!r}")
    return names[given.lower()]


def _milliseconds(given: object) -> int:
    if not isinstance(given, int) or isinstance(given, bool):
        raise ValueError(f"expected_return_ms: a whole number is needed, got {given!r}")
    return given

"""Reuse hints: what a caller knows of a chain's future. Evidence for a policy, never an order."""

from dataclasses import dataclass
from enum import Enum

from kvstore.api.errors import InvalidArgument

MAX_SESSION_ID_BYTES = 32
MAX_RETURN_MS = 24 * 3600 * 1000


class Reuse(Enum):
    """Whether, and after whom, a chain will be extended."""

    UNKNOWN = 0
    FINAL = 1
    """Nobody will extend it: a one-shot call, a closed session."""
    AUTOMATIC = 2
    """It continues without a human: a tool call, an agent's loop."""
    INTERACTIVE = 3
    """It waits for a human."""


@dataclass(frozen=True, slots=True)
class ReuseHint:
    """Optional and advisory; it never changes what a request gets, only what is kept for later."""

    session_id: bytes = b""
    reuse: Reuse = Reuse.UNKNOWN
    expected_return_ms: int = 0
    """From the end of this answer to the next request on the chain; 0: unknown; at most 24 h."""

    def __post_init__(self) -> None:
        if len(self.session_id) > MAX_SESSION_ID_BYTES:
            raise InvalidArgument(
                f"hint.session_id: at most {MAX_SESSION_ID_BYTES} bytes, got {len(self.session_id)}"
            )
        if self.expected_return_ms < 0:
            raise InvalidArgument("hint.expected_return_ms: must be 0 or more")
        if self.expected_return_ms > MAX_RETURN_MS:
            object.__setattr__(self, "expected_return_ms", MAX_RETURN_MS)

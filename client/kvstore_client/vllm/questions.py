"""What a request asks the node before its prefill: asked once, answered in a later step."""

import concurrent.futures
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from kvstore.api.clock import Clock
from kvstore.api.hint import ReuseHint
from kvstore_client.client import Client
from kvstore_client.engine.options import EngineOptions
from kvstore_client.match import Match
from kvstore_client.space import Space

GRACE_S = 0.5
"""How much longer than its budget an answer may take: the client keeps the budget, but its thread
may be kept from running."""


class State(Enum):
    """Of a question."""

    WAITING = 0
    ANSWERED = 1
    LATE = 2
    STALE = 3
    """The answer's lease may end before a load has; ask again."""


@dataclass(slots=True, eq=False)
class Question:
    """One match under way or answered, and its lease, which `drop` gives back."""

    client: Client
    clock: Clock
    held_blocks: int
    """What the request had itself when it was asked."""
    asked_s: float
    late_s: float
    fresh_s: float
    """How long after the answer it may be used."""
    future: "concurrent.futures.Future[Match]"
    answered_s: float | None = None
    blocks: int | None = None
    """How much of the answer is worth a load, once that was judged."""
    dropped: bool = False

    def state(self) -> State:
        """How far it is. Never waits."""
        now_s = self.clock.monotonic_s()
        if not self.future.done():
            return State.LATE if now_s > self.late_s else State.WAITING
        answered_s = now_s if self.answered_s is None else self.answered_s
        if self.match.lease_id and now_s - answered_s > self.fresh_s:
            return State.STALE
        return State.ANSWERED

    def answered(self, _: object) -> None:
        """The answer has come; its lease runs from here on. Called in the client's thread."""
        self.answered_s = self.clock.monotonic_s()

    @property
    def match(self) -> Match:
        """The answer, once there is one."""
        if self.future.cancelled() or self.future.exception() is not None:
            return Match.none(self.held_blocks)
        return self.future.result()

    @property
    def waited_s(self) -> float:
        """How long the answer took."""
        return 0.0 if self.answered_s is None else self.answered_s - self.asked_s

    def drop(self) -> None:
        """Gives its lease back, also one that is still to come. Idempotent."""
        if not self.dropped:
            self.dropped = True
            self.future.add_done_callback(lambda _: self.client.release(self.match))


def ask(
    client: Client,
    clock: Clock,
    spaces: Sequence[Space],
    keys: Sequence[bytes],
    options: EngineOptions,
    *,
    request_id: bytes,
    held_blocks: int,
    hint: ReuseHint | None,
) -> Question:
    """Asks how much of a chain every space can restore. Does not wait."""
    now_s = clock.monotonic_s()
    future = client.match_soon(
        spaces,
        keys,
        scopes=options.scopes,
        lease_ms=options.lease_ms,
        hint=hint,
        request_id=request_id,
        held_blocks=held_blocks,
        budget_s=options.match_budget_s,
    )
    late_s = now_s + options.match_budget_s + GRACE_S
    lease_s = options.lease_ms / 1000
    fresh_s = max(lease_s - options.load_budget_s, lease_s / 2)
    question = Question(client, clock, held_blocks, now_s, late_s, fresh_s, future)
    future.add_done_callback(question.answered)
    return question

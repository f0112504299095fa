"""Runs a trace through a policy, as a node would, and counts the tokens that need no computing."""

from collections.abc import Callable
from itertools import islice
from typing import Any

from kvstore.policy.policy import Policy, Use
from kvstore.replay.trace import Trace, TraceRequest

PROGRESS_STEP = 256
"""Requests between two reports of progress."""


class Cache:
    """Blocks without bytes, of which at most `capacity_blocks` stay, chosen by a policy.

    The sequence of calls is a node's: a use of the whole chain, then what it lacks, parents
    first, then evictions. Blocks of the request itself may be evicted by it.
    """

    def __init__(self, policy: Policy[Any], capacity_blocks: int, block_tokens: int) -> None:
        self.here: dict[int, int | None] = {}
        """What it holds, each with its parent."""
        self._policy = policy
        self._capacity_blocks = capacity_blocks
        self._block_tokens = block_tokens

    def leading(self, request: TraceRequest) -> int:
        """How many of the first blocks of a request it holds."""
        count = 0
        for block in request.chain:
            if block not in self.here:
                break
            count += 1
        return count

    def use(self, request: TraceRequest) -> list[int]:
        """Takes a request in; what had to go for it, in that order."""
        policy, here = self._policy, self.here
        chain, now_s = request.chain, request.at_s
        policy.use(Use(chain, now_s, 1, self._block_tokens, request.hint))
        parent: int | None = None
        for block in chain:
            if block not in here:
                policy.insert(block, parent, 1)
                here[block] = parent
            parent = block
        return self._evict(now_s)

    def _evict(self, now_s: float) -> list[int]:
        surplus = len(self.here) - self._capacity_blocks
        if surplus <= 0:
            return []
        gone = list(islice(self._policy.victims(now_s), surplus))
        for block in gone:
            self._policy.remove(block)
            del self.here[block]
        return gone


def no_progress(requests: int) -> None:
    """For those who do not watch."""


def replay(
    trace: Trace,
    policy: Policy[Any],
    capacity_blocks: int,
    tick: Callable[[int], None] = no_progress,
) -> float:
    """The token hit rate of a policy on a trace, cold from the first request on.

    `tick` hears of the requests that were done since its last call.
    """
    cache = Cache(policy, capacity_blocks, trace.block_tokens)
    hit_tokens = 0
    for number, request in enumerate(trace.requests, start=1):
        hit = cache.leading(request) * trace.block_tokens
        hit_tokens += min(hit, request.input_tokens)
        cache.use(request)
        if not number % PROGRESS_STEP:
            tick(PROGRESS_STEP)
    tick(len(trace.requests) % PROGRESS_STEP)
    return hit_tokens / max(1, trace.input_tokens)

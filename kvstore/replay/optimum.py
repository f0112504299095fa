"""The offline optimum: what the best of all policies would have had, knowing the future.

The block whose next use lies furthest ahead goes, of several the deepest (Belady's MIN). For
blocks of equal size this is exact, the prefix rule included: a parent is used whenever its child
is, so its next use is never later, and with the deepest first it never goes before its child.
"""

from collections.abc import Callable
from heapq import heappop, heappush

from kvstore.replay.replay import PROGRESS_STEP, no_progress
from kvstore.replay.trace import Trace


def optimum(trace: Trace, capacity_blocks: int, tick: Callable[[int], None] = no_progress) -> float:
    """The token hit rate of the optimum; a request's own blocks may be what goes."""
    next_uses = _next_uses(trace)
    # Blocks that are here with their next use. In the heap, outdated entries wait to be skipped.
    here: dict[int, int] = {}
    furthest: list[tuple[int, int, int]] = []
    hit_tokens = 0
    for number, request in enumerate(trace.requests):
        leading = 0
        for block in request.chain:
            if block not in here:
                break
            leading += 1
        hit_tokens += min(leading * trace.block_tokens, request.input_tokens)
        for depth, (block, following) in enumerate(
            zip(request.chain, next_uses[number], strict=True)
        ):
            here[block] = following
            heappush(furthest, (-following, -depth, block))
        while len(here) > capacity_blocks:
            following, _, block = heappop(furthest)
            if here.get(block) == -following:
                del here[block]
        if not (number + 1) % PROGRESS_STEP:
            tick(PROGRESS_STEP)
    tick(len(trace.requests) % PROGRESS_STEP)
    return hit_tokens / max(1, trace.input_tokens)


def _next_uses(trace: Trace) -> list[list[int]]:
    """For each request the numbers of those that use its blocks next; past the end if none do."""
    never = len(trace.requests)
    upcoming: dict[int, int] = {}
    found: list[list[int]] = []
    for number in range(never - 1, -1, -1):
        chain = trace.requests[number].chain
        found.append([upcoming.get(block, never) for block in chain])
        upcoming.update(dict.fromkeys(chain, number))
    found.reverse()
    return found

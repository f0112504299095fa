"""A trace through memory over disk: which tier has what, and what is written below.

As in a node: what memory evicts is demoted, what is found below is promoted and its clean copy
stays, and the ancestors of what lies on disk lie there too.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvstore.policy.policies import make_policy
from kvstore.replay.replay import PROGRESS_STEP, Cache
from kvstore.replay.trace import Trace


@dataclass(frozen=True, slots=True)
class TierRates:
    """What a pair of sizes is worth on a trace. Rates are shares of all input tokens."""

    memory: float
    disk: float
    written_blocks: int
    """Blocks that were written to disk."""

    @property
    def total(self) -> float:
        """The share of tokens that need not be computed."""
        return self.memory + self.disk


class Disk:
    """Blocks on disk, the one to go next first: least recently demoted, children before parents.

    Invariant: where a block lies, its ancestors lie too, and behind it in the order.
    """

    def __init__(self, capacity_blocks: int) -> None:
        self._capacity_blocks = capacity_blocks
        self._order: OrderedDict[int, None] = OrderedDict()
        self.written_blocks = 0

    def __contains__(self, block: int) -> bool:
        return block in self._order

    def demote(self, blocks: Sequence[int], parents: Mapping[int, int | None]) -> None:
        """Takes what memory evicts, children first, and the ancestors that are missing.

        What lies here already is only refreshed.
        """
        if not self._capacity_blocks:
            return
        family: dict[int, None] = {}
        for block in blocks:
            each: int | None = block
            while each is not None and each not in family:
                family[each] = None
                each = parents[each]
        # An ancestor that was met from several children belongs behind all of them.
        for block in sorted(family, reverse=True):
            self.written_blocks += block not in self._order
            self._order[block] = None
            self._order.move_to_end(block)
        while len(self._order) > self._capacity_blocks:
            self._order.popitem(last=False)


@dataclass(frozen=True, slots=True)
class TiersCell:
    """One replay through memory and disk; `disk_blocks` 0: without a disk."""

    policy: str
    memory_blocks: int
    disk_blocks: int

    def run(self, trace: Trace, tick: Callable[[int], None]) -> TierRates:
        """The token hit rates of both tiers, cold from the first request on."""
        policy = make_policy(self.policy, self.memory_blocks)
        memory = Cache(policy, self.memory_blocks, trace.block_tokens)
        disk = Disk(self.disk_blocks)
        parents: dict[int, int | None] = {}
        memory_blocks = disk_blocks = 0
        for number, request in enumerate(trace.requests, start=1):
            for block in request.chain:
                if block in memory.here:
                    memory_blocks += 1
                elif block in disk:
                    disk_blocks += 1
                else:
                    break
            parents.update(zip(request.chain, [None, *request.chain], strict=False))
            disk.demote(memory.use(request), parents)
            if not number % PROGRESS_STEP:
                tick(PROGRESS_STEP)
        tick(len(trace.requests) % PROGRESS_STEP)
        share = trace.block_tokens / max(1, trace.input_tokens)
        return TierRates(memory_blocks * share, disk_blocks * share, disk.written_blocks)

"""A tournament of policies: the tier follows the one that is winning on the live workload.

Every expert simulates a complete cache of the tier's capacity on the requests as they come. The
tier keeps its own content and, when it must evict, gives up what the leader no longer holds,
that which the leader dropped the longest ago first. So a change of the leader moves no bytes:
the content turns into the new leader's by normal turnover, and while the leader stays it is his.
"""

import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Generic, cast

import numpy as np

from kvstore.policy.blocks import AWAITED, HERE, Blocks
from kvstore.policy.contest import Contest
from kvstore.policy.experts.expert import Expert, Request
from kvstore.policy.experts.lru import LruExpert
from kvstore.policy.policy import K, Use
from kvstore.policy.queues import Queue
from kvstore.policy.runs import Chain, view

LRU = 0
"""The expert that is always there: what the others have to beat, and the order of last resort."""

_END = 0
_SESSION_MASK = 2**32 - 1
_SHRINK = 1024
"""Experts get less room, or more, in steps of such a part: each takes milliseconds at most."""

MakeExpert = Callable[[Blocks[Any], int, int], Expert]
"""Makes an expert from the blocks, its flag and its capacity in bytes."""


class Tournament(Generic[K]):
    """A `Policy` that follows one of its experts at a time.

    Invariant: a block with children here never comes before them in `victims`.
    """

    def __init__(
        self, capacity_bytes: int, experts: Sequence[MakeExpert], contest: Contest
    ) -> None:
        self._capacity_bytes = capacity_bytes
        self._blocks: Blocks[K] = Blocks(capacity_bytes)
        self._lru = LruExpert(self._blocks, 1, capacity_bytes)
        self._experts: list[Expert] = [self._lru]
        for number, make in enumerate(experts, start=1):
            self._experts.append(make(self._blocks, 1 << number, capacity_bytes))
        # Bit i: the block stands in queue i, listed or aside.
        self._queued = self._blocks.column("H")
        self._queues = [
            Queue(self._blocks, self._queued, 1 << number) for number in range(len(self._experts))
        ]
        self._everyone = (1 << len(self._experts)) - 1
        # For each set of bits the queues that it means.
        self._queues_of = [
            [queue for number, queue in enumerate(self._queues) if bits >> number & 1]
            for bits in range(self._everyone + 1)
        ]
        self._parents = self._blocks.column("i")
        # What is awaited, the longest first: a list that ends at _END.
        self._next, self._previous = self._blocks.column("i"), self._blocks.column("i")
        self._awaited_bytes = 0
        self._contest = contest
        self._leader = LRU
        self._count = 0
        self._bytes = 0
        self._room_bytes = capacity_bytes
        self._now_s = 0.0

    @property
    def leader(self) -> int:
        """The number of the expert that the tier follows now."""
        return self._leader

    def use(self, use: Use[K]) -> None:
        blocks = self._blocks
        ids, add, size = blocks.ids, blocks.add, use.block_bytes
        found = list(map(ids.get, use.chain))
        if not all(found):  # No block has the number 0.
            # A key may stand in the chain twice.
            found = [ids.get(key) or add(key, size) for key in use.chain]
        chain = Chain(cast("list[int]", found))
        hits = self._hits(chain)
        request = self._request(use, chain)
        for expert in self._experts:
            expert.use(request)
        self._requeue_and_await(chain, size)
        self._trim(use.now_s)
        self._leader = self._contest.leader(hits, len(chain), use.block_tokens)

    def advise(self, use: Use[K]) -> None:
        found = (self._blocks.ids.get(key) for key in use.chain)
        request = self._request(use, [block for block in found if block is not None])
        for expert in self._experts:
            expert.advise(request)

    def __contains__(self, key: K) -> bool:
        block = self._blocks.ids.get(key)
        return block is not None and bool(self._blocks.flags[block] & (HERE | AWAITED))

    def insert(self, key: K, parent: K | None, size_bytes: int) -> None:
        blocks = self._blocks
        block = blocks.ids.get(key, _END)
        if not blocks.flags[block] & AWAITED:
            assert not blocks.flags[block] & HERE, "inserted twice"
            self.use(Use([key], self._now_s, size_bytes))
            block = blocks.ids[key]
        self._await_no_more(block)
        blocks.flags[block] |= HERE
        self._count += 1
        self._bytes += blocks.sizes[block]
        above = _END
        if parent is not None:
            above = blocks.ids.get(parent, _END) or blocks.add(parent, size_bytes)
            blocks.children[above] += 1
        self._parents[block] = above
        if blocks.flags[block] & self._everyone != self._everyone:
            # Who has dropped it already would give it up first.
            for queue in self._queues:
                queue.extend([block])
        if self._bytes > self._room_bytes + self._room_bytes // _SHRINK:
            self._resize(min(self._capacity_bytes, self._bytes))

    def remove(self, key: K) -> None:
        blocks = self._blocks
        block = blocks.ids[key]
        if not blocks.flags[block] & HERE:
            raise KeyError(key)
        blocks.flags[block] ^= HERE
        self._count -= 1
        self._bytes -= blocks.sizes[block]
        queued = self._queued[block]
        if queued:
            for queue in self._queues_of[queued]:
                queue.discard(block)
        above = self._parents[block]
        if not blocks.flags[block] and not blocks.children[block]:
            blocks.drop(block)
        if above != _END:
            left = blocks.children[above] = blocks.children[above] - 1
            if not left:
                for queue in self._queues_of[self._queued[above]]:
                    queue.freed(above)
                if not blocks.flags[above]:
                    blocks.drop(above)

    def victims(self, now_s: float) -> Iterator[K]:
        self._make_choice()
        keys = self._blocks.keys
        children, parents = self._blocks.children, self._parents
        # For what has had children go in this iteration: how many are left.
        left: dict[int, int] = {}
        waiting: set[int] = set()
        seen: set[int] = set()
        # What is aside in a queue is not met there: it follows the last of its children.
        aside, aside_of_lru = self._queues[self._leader].aside, self._queues[LRU].aside
        for block in self._unordered():
            if block in seen:
                continue
            if children[block] and left.get(block, 1):
                waiting.add(block)
                continue
            while True:
                seen.add(block)
                yield keys[block]  # type: ignore[misc]  # What is here has a key.
                above = parents[block]
                if above == _END:
                    break
                left[above] = left.get(above, children[above]) - 1
                if left[above]:
                    break
                if above not in waiting and above not in aside and above not in aside_of_lru:
                    break
                block = above
        # Whoever names a block as its own ancestor gets no order, and cannot stay for ever.
        for block in {*waiting, *aside, *aside_of_lru} - seen:
            yield keys[block]  # type: ignore[misc]

    def __len__(self) -> int:
        return self._count

    def _request(self, use: Use[K], chain: Sequence[int]) -> Request:
        self._now_s = use.now_s
        session: Hashable = use.session
        if session is None and use.hint is not None and use.hint.session_id:
            session = use.hint.session_id
        number = 0
        if session is not None:
            # Not `hash` for bytes: a run shall repeat exactly.
            hashed = zlib.crc32(session) if isinstance(session, bytes) else hash(session)
            number = hashed & _SESSION_MASK or 1
        return Request(chain, use.now_s, use.block_bytes, use.block_tokens, use.hint, number)

    def _hits(self, chain: Sequence[int]) -> list[int]:
        """How many leading blocks each expert holds."""
        flags = self._blocks.flags
        if isinstance(chain, Chain) and chain.tail_first is not None:
            held = view(flags)[chain.tail_first[::-1]]
            lacking = [np.flatnonzero(held & expert.flag == 0) for expert in self._experts]
            return [int(at[0]) if len(at) else len(chain) for at in lacking]
        hits = [len(chain)] * len(self._experts)
        alive = (1 << len(self._experts)) - 1
        for depth, block in enumerate(chain):
            still = alive & flags[block]
            if still != alive:
                for number in range(len(hits)):
                    if (alive ^ still) >> number & 1:
                        hits[number] = depth
                if not still:
                    break
                alive = still
        return hits

    def _requeue_and_await(self, chain: Sequence[int], size_bytes: int) -> None:
        """Experts hold the whole chain now; what is not here may arrive."""
        flags, queued = self._blocks.flags, self._queued
        following, previous = self._next, self._previous
        for block in self._unsettled(chain):
            flag = flags[block]
            if flag & HERE:
                held = queued[block] & flag
                if held:
                    for queue in self._queues_of[held]:
                        queue.discard(block)
                continue
            if flag & AWAITED:
                before, after = previous[block], following[block]
                following[before], previous[after] = after, before
            else:
                flags[block] = flag | AWAITED
                self._awaited_bytes += self._blocks.sizes[block]
            last = previous[_END]
            following[last] = previous[_END] = block
            following[block], previous[block] = _END, last
        limit = max(self._capacity_bytes, len(chain) * size_bytes)
        while self._awaited_bytes > limit:
            block = following[_END]
            self._await_no_more(block)
            if not flags[block] and not self._blocks.children[block]:
                self._blocks.drop(block)

    def _unsettled(self, chain: Sequence[int]) -> Iterable[int]:
        """Tail first, those that are queued although they are held, or are not here."""
        if not isinstance(chain, Chain) or chain.tail_first is None:
            return reversed(chain)
        held, queued = view(self._blocks.flags)[chain.tail_first], view(self._queued)
        unsettled = (held & HERE == 0) | (held & queued[chain.tail_first] != 0)
        return cast("list[int]", chain.tail_first[unsettled].tolist())

    def _await_no_more(self, block: int) -> None:
        before, after = self._previous[block], self._next[block]
        self._next[before], self._previous[after] = after, before
        self._blocks.flags[block] ^= AWAITED
        self._awaited_bytes -= self._blocks.sizes[block]

    def _trim(self, now_s: float) -> None:
        """Lets the experts evict; what is here and they dropped is queued."""
        blocks = self._blocks
        flags, children, keys = blocks.flags, blocks.children, blocks.keys
        for expert, queue in zip(self._experts, self._queues, strict=True):
            for block in queue.extend(expert.trim(now_s)):
                if not flags[block] and not children[block] and keys[block] is not None:
                    blocks.drop(block)

    def _resize(self, room_bytes: int) -> None:
        """Experts may hold as much as the tier turned out to hold, not more."""
        self._room_bytes = room_bytes
        for expert in self._experts:
            expert.capacity_bytes = room_bytes
        self._trim(self._now_s)

    def _make_choice(self) -> None:
        """Sees to it that the leader has dropped something that is here, if it can.

        The leader may hold all that is here: slots are larger than blocks, and some are pinned.
        Then it has more room than the tier, and its room is made smaller.
        """
        if not self._queues[self._leader].settle() and 2 * self._bytes > self._capacity_bytes:
            surplus_bytes = max(1, self._bytes // _SHRINK)
            self._resize(max(0, min(self._room_bytes, self._bytes) - surplus_bytes))
            self._queues[self._leader].settle()

    def _unordered(self) -> Iterator[int]:
        """All that is here: what the leader dropped, then the rest by last use; some twice."""
        yield from self._queues[self._leader]
        if self._leader != LRU:
            yield from self._queues[LRU]
        flags = self._blocks.flags
        yield from (block for block in self._lru if flags[block] & HERE)

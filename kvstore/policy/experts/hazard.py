"""The hazard expert: keeps what is likely to come back soon, by the record of its class.

Blocks are classed by evidence: who shares them, what the caller hinted, the turn and length of
their conversation. The blocks of a class lie in the order of their last use, so that only the
oldest and the youngest of each class can be the one that is worth least.
"""

from array import array
from collections.abc import Sequence
from heapq import heapify, heappop, heapreplace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstore.policy.blocks import Blocks
from kvstore.policy.experts.evidence import (
    BINS,
    CLASSES,
    SHARED_SESSIONS,
    Evidence,
    age_bin,
    age_bins,
    class_of_request,
    class_of_shared,
    classes_of_shared,
    values_at,
)
from kvstore.policy.experts.expert import Request
from kvstore.policy.runs import Chain, Ints, append, pieces, split, unlink, view

_SLACK = 512
"""It evicts a 512th of its capacity at once, because choosing looks at every class."""
_UNSET = -1
_MOST_USES = 65_535
_MOST_SESSIONS = 255
_MOST_TURNS = 255
_MOST_SESSION_NUMBER = 2**31

Candidate = tuple[float, float, int, bool]
"""Value, last use, class, whether the youngest of the class is meant."""


class HazardExpert:
    """Evicts the block whose class, at its age, promises the fewest hits for its space.

    Invariant: the held blocks of class c are the linked list that begins at node c of `_next`,
    ordered by last use, of one request the tail first. Block b is node CLASSES + b.
    """

    def __init__(self, blocks: Blocks[Any], flag: int, capacity_bytes: int) -> None:
        self.flag = flag
        self.capacity_bytes = capacity_bytes
        self._bytes = 0
        self._blocks = blocks
        self._evidence = Evidence(blocks)
        self._next, self._previous = blocks.column("i"), blocks.column("i")
        for column in (self._next, self._previous):
            column[0:0] = array("i", range(CLASSES))
        self._sessions = 0
        # For each class the first of those that were used last, where that is known.
        self._youngest = [_UNSET] * CLASSES
        self._filled: set[int] = set()

    def use(self, request: Request) -> None:
        chain = request.blocks
        self._evidence.count_request(request.now_s)
        if not chain:
            return
        known = self._note_returns(request)
        session, turn = self._session(request, known)
        own = class_of_request(request.hint, turn, len(chain) * request.block_tokens)
        self._place(request, own, session, turn)
        self._blocks.ended[chain[-1]] = session

    def advise(self, request: Request) -> None:
        """What is said now counts from now on, for the blocks that only one session uses."""
        blocks = self._blocks
        if not request.blocks:
            return
        turn = blocks.turn[request.blocks[-1]]
        own = class_of_request(request.hint, turn, len(request.blocks) * request.block_tokens)
        for block in reversed(request.blocks):
            if blocks.uses[block] and blocks.sessions[block] < SHARED_SESSIONS:
                held = blocks.flags[block] & self.flag
                if held:
                    self._unlink(block)
                blocks.classes[block], blocks.used_s[block] = own, request.now_s
                if held:
                    self._append(block, own, request.now_s)

    def trim(self, now_s: float) -> list[int]:
        evicted: list[int] = []
        if self._bytes <= self.capacity_bytes:
            return evicted
        flags, sizes, used_s = self._blocks.flags, self._blocks.sizes, self._blocks.used_s
        goal_bytes = self.capacity_bytes - self.capacity_bytes // _SLACK
        candidates = self._candidates(now_s)
        while self._bytes > goal_bytes:
            _, at_s, kind, youngest = candidates[0]
            block = self._first(kind, youngest)
            if block is not None and used_s[block] == at_s:
                self._unlink(block)
                flags[block] ^= self.flag
                self._bytes -= sizes[block]
                evicted.append(block)
            elif block is None:
                heappop(candidates)
                self._filled.discard(kind)
            else:
                heapreplace(candidates, self._candidate(block, kind, youngest, now_s))
        return evicted

    def _note_returns(self, request: Request) -> int:
        """Records which blocks came back, and how many of the chain had ever been seen."""
        blocks, events = self._blocks, self._evidence.events
        uses, used_s, classes = blocks.uses, blocks.used_s, blocks.classes
        if isinstance(request.blocks, Chain) and request.blocks.tail_first is not None:
            return self._note_returns_of(request.blocks.tail_first[::-1], request.now_s)
        at_s, kind, index = -1.0, _UNSET, 0
        for known, block in enumerate(request.blocks):
            if not uses[block]:
                return known
            if used_s[block] != at_s or classes[block] != kind:
                at_s, kind = used_s[block], classes[block]
                index = kind * BINS + age_bin(request.now_s - at_s)
            events[index] += 1
        return len(request.blocks)

    def _note_returns_of(self, chain: Ints, now_s: float) -> int:
        """As `_note_returns`, all at once."""
        blocks = self._blocks
        new = np.flatnonzero(view(blocks.uses)[chain] == 0)
        known = chain[: int(new[0])] if len(new) else chain
        bins = age_bins(now_s - view(blocks.used_s)[known])
        cells = view(blocks.classes)[known].astype(np.int64) * BINS + bins
        np.add.at(view(self._evidence.events), cells, 1)
        return len(known)

    def _session(self, request: Request, known: int) -> tuple[int, int]:
        """Whose request it is, and the how many-th of it.

        Where nobody says, a request that goes on where another ended continues that one's session.
        """
        blocks = self._blocks
        deepest = request.blocks[known - 1] if known else 0
        if request.session:
            goes_on = bool(known) and blocks.session[deepest] == request.session
            session = request.session
        else:
            session = blocks.ended[deepest] if known else 0
            goes_on = session != 0
            if goes_on:
                blocks.ended[deepest] = 0
            else:
                self._sessions = self._sessions % _MOST_SESSION_NUMBER + 1
                session = self._sessions
        return session, min(blocks.turn[deepest] + 1, _MOST_TURNS) if goes_on else 1

    def _place(self, request: Request, own: int, session: int, turn: int) -> None:
        """Notes the use with each block and moves it to the end of its class."""
        one_by_one, together = split(request.blocks, self._blocks.flags, self.flag)
        self._place_each(one_by_one, request.now_s, own, session, turn)
        if len(together):
            self._place_all(together, request.now_s, own, session, turn)

    def _place_each(
        self, chain: Sequence[int], now_s: float, own: int, session: int, turn: int
    ) -> None:
        """All in one loop: this runs for every block that was not here."""
        blocks, flag = self._blocks, self.flag
        flags, uses, sessions, owners = blocks.flags, blocks.uses, blocks.sessions, blocks.session
        classes, turns, used_s = blocks.classes, blocks.turn, blocks.used_s
        following, previous, youngest = self._next, self._previous, self._youngest
        for block in reversed(chain):
            count = uses[block]
            if not count:
                sessions[block] = 1
                owners[block] = session
            elif owners[block] != session:
                owners[block] = session
                if sessions[block] < _MOST_SESSIONS:
                    sessions[block] += 1
            if count < _MOST_USES:
                uses[block] = count = count + 1
            kind = own
            if sessions[block] >= SHARED_SESSIONS:
                kind = class_of_shared(count, sessions[block])
            node = CLASSES + block
            if flags[block] & flag:
                before, after = previous[node], following[node]
                following[before], previous[after] = after, before
                former = classes[block]
                if youngest[former] == block:
                    youngest[former] = after - CLASSES if after != former else _UNSET
            else:
                flags[block] |= flag
                self._bytes += blocks.sizes[block]
            classes[block] = kind
            turns[block] = turn
            used_s[block] = now_s
            last = previous[kind]
            if last == kind:
                self._filled.add(kind)
                youngest[kind] = block
            elif used_s[last - CLASSES] != now_s:
                youngest[kind] = block
            following[last] = previous[kind] = node
            following[node], previous[node] = kind, last

    def _place_all(self, chain: Ints, now_s: float, own: int, session: int, turn: int) -> None:
        """The same for blocks that it holds, tail first."""
        blocks, youngest, used_s = self._blocks, self._youngest, self._blocks.used_s
        counts, sessions, kinds = _count(blocks, chain, own, session)
        classes = view(blocks.classes)
        for former in np.unique(classes[chain]).tolist():
            if youngest[former] != _UNSET and np.any(chain == youngest[former]):
                youngest[former] = _UNSET
        cut = pieces(self._next, chain + CLASSES, kinds)
        unlink(self._next, self._previous, cut)
        classes[chain], view(blocks.uses)[chain] = kinds, counts
        view(blocks.sessions)[chain], view(blocks.session)[chain] = sessions, session
        view(blocks.turn)[chain], view(used_s)[chain] = turn, now_s
        for first, last, at in cut:
            kind = int(kinds[at])
            before = self._previous[kind]
            if before == kind:
                self._filled.add(kind)
                youngest[kind] = first - CLASSES
            elif used_s[before - CLASSES] != now_s:
                youngest[kind] = first - CLASSES
            append(self._next, self._previous, first, last, kind)

    def _append(self, block: int, kind: int, now_s: float) -> None:
        node = CLASSES + block
        last = self._previous[kind]
        if last == kind:
            self._filled.add(kind)
            self._youngest[kind] = block
        elif self._blocks.used_s[last - CLASSES] != now_s:
            self._youngest[kind] = block
        self._next[last] = self._previous[kind] = node
        self._next[node], self._previous[node] = kind, last

    def _unlink(self, block: int) -> None:
        node = CLASSES + block
        before, after = self._previous[node], self._next[node]
        self._next[before], self._previous[after] = after, before
        kind = self._blocks.classes[block]
        if self._youngest[kind] == block:
            # Those behind it were used in the same moment.
            self._youngest[kind] = after - CLASSES if after != kind else _UNSET

    def _first(self, kind: int, youngest: bool) -> int | None:
        """The block of a class that would go first, at its old or its young end."""
        if not youngest:
            node = self._next[kind]
            return node - CLASSES if node != kind else None
        if self._youngest[kind] == _UNSET:
            node = self._previous[kind]
            if node == kind:
                return None
            used_s = self._blocks.used_s
            at_s = used_s[node - CLASSES]
            before = self._previous[node]
            while before != kind and used_s[before - CLASSES] == at_s:
                node, before = before, self._previous[before]
            self._youngest[kind] = node - CLASSES
        return self._youngest[kind]

    def _candidates(self, now_s: float) -> list[Candidate]:
        """The ends of all classes, the one that is worth least first."""
        found = []
        for kind in self._filled:
            for youngest in (False, True):
                block = self._first(kind, youngest)
                if block is not None:
                    found.append(self._candidate(block, kind, youngest, now_s))
        heapify(found)
        return found

    def _candidate(self, block: int, kind: int, youngest: bool, now_s: float) -> Candidate:
        at_s = self._blocks.used_s[block]
        return values_at(self._evidence.values, kind, now_s - at_s), at_s, kind, youngest


def _count(
    blocks: Blocks[Any], chain: Ints, own: int, session: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Uses, sessions and class of known blocks after one more use."""
    counts = np.minimum(view(blocks.uses)[chain].astype(np.int64) + 1, _MOST_USES)
    sessions = view(blocks.sessions)[chain].astype(np.int64)
    sessions[view(blocks.session)[chain] != session] += 1
    sessions = np.minimum(sessions, _MOST_SESSIONS)
    shared = sessions >= SHARED_SESSIONS
    kinds = np.where(shared, classes_of_shared(counts, sessions), own)
    return counts, sessions, kinds

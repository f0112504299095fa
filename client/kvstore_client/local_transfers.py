"""The two calls that move blocks, through memory that node and client share.

Copies run in slices between which others get their turn; nothing is touched once `done` was said.
"""

import asyncio
from collections import deque
from collections.abc import Sequence

from kvstore.api.digest import DIGEST_BYTES
from kvstore.api.errors import KvstoreError
from kvstore.api.tier import Loaded
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore_client.arrivals import Arrivals
from kvstore_client.attached import Answer, Attached
from kvstore_client.budgets import Deadline
from kvstore_client.pieces import check_indexes

SLICE_BYTES = 16 << 20
"""So much is copied before others get their turn: a millisecond and a half."""
PART_BYTES = 16 << 20
"""So much at least is committed at a time: a message costs as much as copying 2 MiB."""


class Turns:
    """Lets others have theirs after each slice, and ends with the deadline."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._copied_bytes = 0

    async def copied(self, size: int) -> None:
        """Says that so much was copied. Raises TimeoutError."""
        self._copied_bytes += size
        if self._copied_bytes >= SLICE_BYTES:
            self._copied_bytes = 0
            self._deadline.left_s()
            await asyncio.sleep(0)


async def place(
    attached: Attached,
    begin: pb.WriteBegin,
    blocks: Sequence[memoryview],
    held: list[bool],
    deadline: Deadline,
) -> bool:
    """Writes what the node wants of a run; False if it had no room for all of that.

    `held` is brought up to date with each answer, so that it is right also when this raises.
    """
    held[:] = [False] * len(held)
    filling = _Filling(attached, blocks, held, deadline)
    try:
        return await filling.run(begin)
    finally:
        filling.close()


class _Filling:
    """A write under way. Half of the slots are committed while the other half is filled.

    Invariant: what lies in `empty` may be written to until `close`, and nothing else.
    """

    def __init__(
        self,
        attached: Attached,
        blocks: Sequence[memoryview],
        held: list[bool],
        deadline: Deadline,
    ) -> None:
        self._attached = attached
        self._blocks = blocks
        self._held = held
        self._deadline = deadline
        self._turns = Turns(deadline)
        self._number = attached.number()
        self._empty: deque[tuple[int, int]] = deque()
        """The slots to fill next: which block of the run, and where in the arena."""
        self._asked: deque[Answer] = deque()
        """Commits that the node has not answered yet."""
        self._full = False
        self._over = False

    async def run(self, begin: pb.WriteBegin) -> bool:
        """As `place`."""
        request = pb.LocalRequest(number=self._number, reserve=begin)
        slots = self._take(await self._attached.call(request, self._deadline))
        # A node that takes all slots at a time must not be told before all are filled.
        count = len(slots.indexes)
        part = part_of(count, len(self._blocks[0])) if slots.in_parts else len(self._blocks)
        while self._empty or self._asked:
            await self._fill(part)
            if self._asked:
                self._take(await self._attached.reply(self._asked.popleft(), self._deadline))
        self._over = True
        return not self._full

    def close(self) -> None:
        """Gives back the slots that are not committed."""
        if not self._over:
            self._attached.done(self._number)

    async def _fill(self, part: int) -> None:
        filled = 0
        while self._empty:
            index, offset = self._empty.popleft()
            self._attached.check()
            self._attached.arena.write(offset, self._blocks[index])
            filled += 1
            if filled == part or not self._empty:
                commit = pb.LocalRequest(number=self._number, commit=pb.LocalCommit(blocks=filled))
                self._asked.append(self._attached.ask(commit, self._deadline))
                filled = 0
            await self._turns.copied(len(self._blocks[index]))
            while self._asked and self._asked[0].done():
                self._take(await self._attached.reply(self._asked.popleft(), self._deadline))

    def _take(self, reply: pb.LocalReply) -> pb.LocalSlots:
        slots = reply.slots
        check_slots(slots, len(self._blocks), self._held)
        self._empty.extend(zip(slots.indexes, slots.offsets, strict=True))
        self._full = slots.full
        return slots


def part_of(slots: int, block_bytes: int) -> int:
    """How many blocks are committed at a time, where there are so many slots."""
    return max(slots // 2, PART_BYTES // block_bytes, 1)


async def fetch(
    attached: Attached,
    request: pb.ReadRequest,
    arrivals: Arrivals,
    deadline: Deadline,
    *,
    prefix_only: bool,
) -> None:
    """Copies what lies in the arena of the blocks of a read, or of them what precedes a gap."""
    arrivals.restart()
    number, turns = attached.number(), Turns(deadline)
    following: Answer | None = None
    try:
        reply = await attached.call(pb.LocalRequest(number=number, acquire=request), deadline)
        index = 0
        while True:
            window = reply.blocks
            if not window.last:
                # It comes while this one is copied, which stays until the one after it is asked.
                asking = pb.LocalRequest(number=number, next=pb.LocalNext())
                following = attached.ask(asking, deadline)
            for block in window.blocks:
                if block.here:
                    _copy(attached, block, index, arrivals)
                    await turns.copied(len(arrivals.buffers[index]))
                elif prefix_only:
                    return
                index += 1
            if following is None:
                return
            reply, following = await attached.reply(following, deadline), None
    finally:
        attached.done(number)


def _copy(attached: Attached, block: pb.LocalBlock, index: int, arrivals: Arrivals) -> None:
    if index >= len(arrivals.buffers) or len(block.digest) != DIGEST_BYTES:
        raise KvstoreError("the node says where a block lies that was not asked for")
    if arrivals.loaded[index] is None:
        attached.check()
        attached.arena.read(block.offset, arrivals.buffers[index])
        arrivals.here(index, Loaded(block.tier, block.digest))


def check_slots(slots: pb.LocalSlots, blocks: int, held: list[bool]) -> None:
    """Takes what the node says it holds. Raises KvstoreError for what no honest node says."""
    check_indexes(slots.indexes, blocks, "slots.indexes")
    check_indexes(slots.held, blocks, "slots.held")
    if len(slots.indexes) != len(slots.offsets):
        raise KvstoreError("slots: indexes and offsets are not of one number")
    held[:] = [False] * blocks
    for index in slots.held:
        held[index] = True

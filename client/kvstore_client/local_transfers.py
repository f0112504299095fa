"""The two calls that move blocks, through memory that node and client share.

Copies run in slices between which others get their turn; nothing is touched once `done` was said.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from kvstore.api.digest import DIGEST_BYTES
from kvstore.api.errors import KvstoreError
from kvstore.api.tier import Loaded
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore_client.arrivals import Arrivals
from kvstore_client.attached import Attached
from kvstore_client.budgets import Deadline
from kvstore_client.pieces import check_indexes

SLICE_BYTES = 8 << 20
"""So much is copied before others get their turn."""


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
    number, turns = attached.number(), Turns(deadline)
    over = False
    try:
        reply = await attached.call(pb.LocalRequest(number=number, reserve=begin), deadline)
        while True:
            slots = reply.slots
            check_slots(slots, len(blocks), held)
            if not slots.indexes:
                over = True
                return not slots.full
            for index, offset in zip(slots.indexes, slots.offsets, strict=True):
                attached.check()
                attached.arena.write(offset, blocks[index])
                await turns.copied(len(blocks[index]))
            commit = pb.LocalRequest(number=number, commit=pb.LocalCommit())
            reply = await attached.call(commit, deadline)
    finally:
        if not over:
            attached.done(number)


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
    following: asyncio.Task[pb.LocalReply] | None = None
    try:
        reply = await attached.call(pb.LocalRequest(number=number, acquire=request), deadline)
        index = 0
        while True:
            window = reply.blocks
            if not window.last:
                # It comes while this one is copied, which stays until the one after it is asked.
                asking = pb.LocalRequest(number=number, next=pb.LocalNext())
                following = asyncio.create_task(attached.call(asking, deadline))
                await asyncio.sleep(0)
            for block in window.blocks:
                if block.here:
                    _copy(attached, block, index, arrivals)
                    await turns.copied(len(arrivals.buffers[index]))
                elif prefix_only:
                    return
                index += 1
            if following is None:
                return
            reply, following = await following, None
    finally:
        if following is not None:
            following.cancel()
            with suppress(asyncio.CancelledError, KvstoreError, TimeoutError):
                await following
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

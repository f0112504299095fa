"""Blocks that the caller himself copies from and to the node's arena, on a GPU's streams, say.

    write   slots = step() → fill them → step() commits them and gives the next → … → []
    read    blocks = step() → copy them → step() lets go of them and gives the next → … → []

What a step gives may be touched until the next step, or until `end`, and never after it; and the
client stays open until then, for its connection says to the node who holds what. Nothing here
raises: what goes wrong is counted as ever, and ends the write or the read.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from kvstore.api.digest import DIGEST_BYTES
from kvstore.api.errors import KvstoreError
from kvstore.api.tier import Loaded
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore_client.attached import Answer, Attached
from kvstore_client.budgets import Deadline
from kvstore_client.caller import Caller
from kvstore_client.local_transfers import check_slots, part_of
from kvstore_client.space import Space


class EmptySlot(NamedTuple):
    """Where a block shall be written: `place` is its own in the run, `view` as long as it is."""

    place: int
    view: memoryview


class GivenBlock(NamedTuple):
    """A block of a read. `view` is read-only, and the bytes are the node's."""

    view: memoryview
    loaded: Loaded


class WriteInPlace:
    """One run of a chain. `held` says at each step what the node is known to hold of it.

    Half of the slots are given at a time: the node commits them while the other half is filled.
    Where it has no more room the write ends early: what is not held then may go by `store`.
    """

    def __init__(
        self,
        attached: Attached,
        caller: Caller,
        begin: pb.WriteBegin,
        space: Space,
        held: list[bool],
        deadline: Deadline,
    ) -> None:
        self._attached = attached
        self._caller = caller
        self._begin = begin
        self._space = space
        self._held = held
        self._deadline = deadline
        self._number = 0
        """Of what is under way; 0: nothing is."""
        self._empty: deque[EmptySlot] = deque()
        """Reserved, and not given yet."""
        self._given = 0
        """Slots of the last step: so many are committed by the next."""
        self._asked: deque[Answer] = deque()
        """Commits that the node has not answered yet."""
        self._part = 0
        """So many slots are given at a time; 0: none is reserved yet."""
        self._over = False

    async def step(self) -> list[EmptySlot]:
        """Commits the slots of the last step; the next ones, none at the end.

        A step that is cancelled ends the write: nobody has heard which slots were to be filled.
        """
        slots: list[EmptySlot] | None = None
        try:
            if not self._over:
                slots = await self._caller.quietly(
                    "store", self._next, self._deadline, [self._space]
                )
        finally:
            if not slots:
                await self.end()
        self._given = len(slots or [])
        return slots or []

    async def end(self) -> None:
        """Gives back what was not committed. Idempotent."""
        self._over = True
        if self._number:
            self._attached.done(self._number)
            self._number = 0

    async def _next(self) -> list[EmptySlot]:
        if not self._part:
            await self._reserve()
        else:
            commit = pb.LocalCommit(blocks=self._given)
            asking = pb.LocalRequest(number=self._number, commit=commit)
            self._asked.append(self._attached.ask(asking, self._deadline))
        while self._asked and (not self._empty or self._asked[0].done()):
            self._take(await self._attached.reply(self._asked.popleft(), self._deadline))
        return [self._empty.popleft() for _ in range(min(self._part, len(self._empty)))]

    async def _reserve(self) -> None:
        self._held[:] = [False] * len(self._held)
        self._number = self._attached.number()
        request = pb.LocalRequest(number=self._number, reserve=self._begin)
        reply = await self._attached.call(request, self._deadline)
        self._take(reply)
        count = len(self._empty)
        # A node that takes all slots at a time must not be told before all are filled.
        self._part = part_of(count, self._space.block_bytes) if reply.slots.in_parts else count

    def _take(self, reply: pb.LocalReply) -> None:
        slots = reply.slots
        check_slots(slots, len(self._held), self._held)
        size = self._space.block_bytes
        self._empty += [
            EmptySlot(place, self._attached.arena.view(offset, size))
            for place, offset in zip(slots.indexes, slots.offsets, strict=True)
        ]


class ReadInPlace:
    """The leading blocks of a chain that lie in memory, or come to lie there in time."""

    def __init__(
        self,
        attached: Attached,
        caller: Caller,
        request: pb.ReadRequest,
        space: Space,
        blocks: int,
        deadline: Deadline,
    ) -> None:
        self._attached = attached
        self._caller = caller
        self._request = request
        self._space = space
        self._left = blocks
        self._deadline = deadline
        self._number = 0
        self._following: Answer | None = None
        """The window after the last one: it comes while that one is copied."""
        self._over = False

    async def step(self) -> list[GivenBlock]:
        """Lets go of the blocks of the last step; the next ones, none at the end.

        A step that is cancelled ends the read: nobody has seen the blocks that it brought.
        """
        given: list[GivenBlock] | None = None
        try:
            if not self._over:
                given = await self._caller.quietly(
                    "load", self._next, self._deadline, [self._space]
                )
        finally:
            if not given:
                await self.end()
        return given or []

    async def end(self) -> None:
        """Gives everything back. Idempotent."""
        self._over = True
        self._following = None
        if self._number:
            self._attached.done(self._number)
            self._number = 0

    async def _next(self) -> list[GivenBlock]:
        given: list[GivenBlock] = []
        while not given and self._left:
            reply = await self._window()
            if not reply.blocks.last:
                asking = pb.LocalRequest(number=self._number, next=pb.LocalNext())
                self._following = self._attached.ask(asking, self._deadline)
            given = self._leading(reply.blocks.blocks)
            self._left -= len(given)
            if reply.blocks.last or len(given) < len(reply.blocks.blocks):
                self._left = 0
        return given

    async def _window(self) -> pb.LocalReply:
        following, self._following = self._following, None
        if following is not None:
            return await self._attached.reply(following, self._deadline)
        self._number = self._attached.number()
        request = pb.LocalRequest(number=self._number, acquire=self._request)
        return await self._attached.call(request, self._deadline)

    def _leading(self, blocks: Sequence[pb.LocalBlock]) -> list[GivenBlock]:
        if len(blocks) > self._left:
            raise KvstoreError("the node says where blocks lie that were not asked for")
        given = []
        for block in blocks:
            if not block.here:
                break
            if len(block.digest) != DIGEST_BYTES:
                raise KvstoreError("the node gives a block without its digest")
            view = self._attached.arena.view(block.offset, self._space.block_bytes)
            given.append(GivenBlock(view.toreadonly(), Loaded(block.tier, block.digest)))
        return given

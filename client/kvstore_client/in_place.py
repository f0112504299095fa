"""Blocks that the caller himself copies from and to the node's arena, on a GPU's streams, say.

    write   slots = step() → fill them → step() commits them and gives the next → … → None
    read    blocks = step() → copy them → step() lets go of them and gives the next → … → None

What a step gives may be touched until the next step, or until `end`, and never after it; and the
client stays open until then, for its connection says to the node who holds what. Nothing here
raises: what goes wrong is counted as ever, and ends the write or the read.

`trailing` is for copies that run by themselves: what a step gives may be touched until the step
after the next one, so that the next is asked for while they run. A step may give nothing then,
before the end always: go on when all that was given is copied.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

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


Given = TypeVar("Given", EmptySlot, GivenBlock)


class _InPlace(ABC, Generic[Given]):
    """What a write and a read have in common: steps, and an end at which nothing is touched."""

    operation: str
    """As the client counts it."""

    def __init__(
        self,
        attached: Attached,
        caller: Caller,
        space: Space,
        deadline: Deadline,
        *,
        trailing: bool,
    ) -> None:
        self._attached = attached
        self._caller = caller
        self._space = space
        self._deadline = deadline
        self._trailing = trailing
        self._number = 0
        """Of what is under way; 0: nothing is."""
        self.copying = False
        """Whether what the last step gave may be touched beyond the next step."""
        self._over = False

    @property
    def ended(self) -> bool:
        """Whether everything was given back."""
        return self._over and not self._number

    @property
    def complete(self) -> bool:
        """Whether all was given, so that nobody is asked any more, but told that it is over."""
        return False

    def pause(self) -> bool:
        """Takes the next step, in any thread, if that would give nothing and ask for nothing."""
        if not (self.copying and self._pause()):
            return False
        self.copying = False
        return True

    async def step(self) -> list[Given] | None:
        """Is done with what the last step gave, or `trailing` the one before; the next.

        None at the end. A step that is cancelled is the last one: nobody has seen what it brought.
        """
        given: list[Given] | None = None
        try:
            if not self._over:
                given = await self._caller.quietly(
                    self.operation, self._next, self._deadline, [self._space]
                )
        finally:
            self._over = given is None
            if self._over and not self.copying:
                await self.end()
        if self._over and self.copying:
            given = []
        self.copying = self._trailing and bool(given)
        return given

    async def end(self) -> None:
        """Gives back what is held, and was not committed. Idempotent."""
        self._over = True
        if self._number:
            self._attached.done(self._number)
            self._number = 0

    @abstractmethod
    def _pause(self) -> bool:
        """As `pause`, of what the last step gave."""

    @abstractmethod
    async def _next(self) -> list[Given] | None:
        """As `step`, while it is not over. May raise."""


class WriteInPlace(_InPlace[EmptySlot]):
    """One run of a chain. `held` says at each step what the node is known to hold of it.

    Half of the slots are given at a time: the node commits them while the other half is filled.
    Where it has no more room the write ends early: what is not held then may go by `store`.
    """

    operation = "store"

    def __init__(
        self,
        attached: Attached,
        caller: Caller,
        begin: pb.WriteBegin,
        space: Space,
        held: list[bool],
        deadline: Deadline,
        *,
        trailing: bool = False,
    ) -> None:
        super().__init__(attached, caller, space, deadline, trailing=trailing)
        self._begin = begin
        self._held = held
        self._empty: deque[EmptySlot] = deque()
        """Reserved, and not given yet."""
        self._filling: deque[int] = deque()
        """How many slots each step gave that is not committed yet."""
        self._asked: deque[Answer] = deque()
        """Commits that the node has not answered yet."""
        self._part = 0
        """So many slots are given at a time; 0: none is reserved yet."""

    def _pause(self) -> bool:
        if self._empty or self._asked or any(list(self._filling)[:-1]):
            return False
        self._filling.append(0)
        return True

    async def _next(self) -> list[EmptySlot] | None:
        if not self._part:
            await self._reserve()
        while len(self._filling) > self._trailing:
            self._commit(self._filling.popleft())
        while self._asked and (not self._empty or self._asked[0].done()):
            self._take(await self._attached.reply(self._asked.popleft(), self._deadline))
        if not self._empty and not any(self._filling):
            return None
        slots = [self._empty.popleft() for _ in range(min(self._part, len(self._empty)))]
        self._filling.append(len(slots))
        return slots

    async def _reserve(self) -> None:
        self._held[:] = [False] * len(self._held)
        self._number = self._attached.number()
        request = pb.LocalRequest(number=self._number, reserve=self._begin)
        reply = await self._attached.call(request, self._deadline)
        self._take(reply)
        # A node that takes all slots at a time must not be told before all are filled.
        in_parts = part_of(len(self._empty), self._space.block_bytes)
        self._part = in_parts if reply.slots.in_parts else len(self._held)

    def _commit(self, slots: int) -> None:
        if slots:  # None would mean all of them.
            commit = pb.LocalCommit(blocks=slots)
            asking = pb.LocalRequest(number=self._number, commit=commit)
            self._asked.append(self._attached.ask(asking, self._deadline))

    def _take(self, reply: pb.LocalReply) -> None:
        slots = reply.slots
        check_slots(slots, len(self._held), self._held)
        size = self._space.block_bytes
        self._empty += [
            EmptySlot(place, self._attached.arena.view(offset, size))
            for place, offset in zip(slots.indexes, slots.offsets, strict=True)
        ]


class ReadInPlace(_InPlace[GivenBlock]):
    """The leading blocks of a chain that lie in memory, or come to lie there in time."""

    operation = "load"

    def __init__(
        self,
        attached: Attached,
        caller: Caller,
        request: pb.ReadRequest,
        space: Space,
        blocks: int,
        deadline: Deadline,
        *,
        trailing: bool = False,
    ) -> None:
        super().__init__(attached, caller, space, deadline, trailing=trailing)
        self._request = request
        self._left = blocks
        """So many may still be given."""
        self._following: Answer | None = None
        """The window after the last one, asked for ahead: not `trailing`, for the node lets go of
        all but the last that it gave, and two are being copied."""
        self._begun = False

    @property
    def complete(self) -> bool:
        return not self._left

    def _pause(self) -> bool:
        return self.complete

    async def _next(self) -> list[GivenBlock] | None:
        while self._left:
            reply = await self._window()
            if not (reply.blocks.last or self._trailing):
                self._following = self._ask()
            given = self._leading(reply.blocks.blocks)
            self._left -= len(given)
            if reply.blocks.last or len(given) < len(reply.blocks.blocks):
                self._left = 0
            # Nothing, and not the end: what is being copied has the room.
            if given or (self._trailing and self._left):
                return given
        return None

    async def _window(self) -> pb.LocalReply:
        if not self._begun:
            self._number = self._attached.number()
            request = pb.LocalRequest(number=self._number, acquire=self._request)
            reply = await self._attached.call(request, self._deadline)
            self._begun = True
            return reply
        following, self._following = self._following or self._ask(), None
        return await self._attached.reply(following, self._deadline)

    def _ask(self) -> Answer:
        asking = pb.LocalRequest(number=self._number, next=pb.LocalNext())
        return self._attached.ask(asking, self._deadline)

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

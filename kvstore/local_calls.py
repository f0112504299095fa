"""The calls of one attached client: decode, call the node, encode; as the gRPC shell does.

They have the same limits, deadlines, errors and metrics as calls over gRPC.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

import grpc

from kvstore.api.errors import InvalidArgument
from kvstore.api.keys import KEY_BYTES
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.wire import check_space_id, unpack_keys
from kvstore.attachment import Attachment, Slots
from kvstore.calls import Call, Calls
from kvstore.node import Node
from kvstore.placing import Placing
from kvstore.requests import KEY_COST_BYTES, MAX_SCOPES, begin_offer, check_count
from kvstore.tiers.tiered import Acquired

Answer = Callable[[pb.LocalReply], Awaitable[None]]
MAX_CALLS = 256
"""So many of one client may be under way; its next message waits unread."""


class Refused(Exception):
    """How a call ends that is refused; `Calls` says why."""

    def __init__(self, status: int, details: str) -> None:
        super().__init__(details)
        self.status = status
        self.details = details


class LocalContext:
    """What `Calls` needs to know of a call, and how it refuses one."""

    def __init__(self, authorization: str | None, peer: str, budget_ms: int) -> None:
        self._metadata = () if authorization is None else (("authorization", authorization),)
        self._peer = peer
        self._budget_s = budget_ms / 1000 if budget_ms else None

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        """What was shown when the client attached."""
        return self._metadata

    def peer(self) -> str:
        """The connection."""
        return self._peer

    def time_remaining(self) -> float | None:
        """How long the caller waits."""
        return self._budget_s

    async def abort(self, code: grpc.StatusCode, details: str = "", _: object = ()) -> NoReturn:
        """Ends the call with this status."""
        number: int = code.value[0]
        raise Refused(number, details)


class LocalCalls:
    """Runs the calls of one client side by side, those of one read or write one at a time."""

    def __init__(
        self, node: Node, calls: Calls, attachment: Attachment, authorization: str | None
    ) -> None:
        self._node = node
        self._calls = calls
        self._attachment = attachment
        self._authorization = authorization
        self._peer = f"attached {id(attachment):x}"
        self._running: dict[int, asyncio.Task[None]] = {}
        self._room = asyncio.Semaphore(MAX_CALLS)

    async def take(self, request: pb.LocalRequest, answer: Answer) -> None:
        """Begins one call; waits while there are too many. Raises InvalidArgument for nonsense."""
        number = request.number
        before = self._running.get(number)
        if request.WhichOneof("call") == "done":
            if before is not None:
                before.cancel()
                await asyncio.wait([before])
            self._attachment.done(number)
            return
        if before is not None:  # Its answer is on its way, or the client is in a hurry.
            await asyncio.wait([before])
        await self._room.acquire()
        task = asyncio.create_task(self._answered(request, answer))
        self._running[number] = task
        task.add_done_callback(partial(self._over, number))

    async def end(self) -> None:
        """Ends what runs."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _over(self, number: int, task: asyncio.Task[None]) -> None:
        if self._running.get(number) is task:
            del self._running[number]
        self._room.release()

    async def _answered(self, request: pb.LocalRequest, answer: Answer) -> None:
        reply = pb.LocalReply(number=request.number)
        try:
            await self._fill(request, reply)
        except Refused as refused:
            self._give_up(request)
            reply = pb.LocalReply(
                number=request.number, status=refused.status, details=refused.details
            )
        except Exception:  # noqa: BLE001
            self._give_up(request)  # Logged where it was met.
            reply = pb.LocalReply(
                number=request.number, status=grpc.StatusCode.UNKNOWN.value[0], details="failed"
            )
        with suppress(OSError):  # Who has hung up hears of nothing.
            await answer(reply)

    def _give_up(self, request: pb.LocalRequest) -> None:
        """Takes back what the call concerns, unless its client may still be copying from it.

        Who asks for the next window copies the last one meanwhile; he says himself when he is done.
        """
        if request.WhichOneof("call") != "next":
            self._attachment.done(request.number)

    async def _fill(self, request: pb.LocalRequest, reply: pb.LocalReply) -> None:
        call_name = request.WhichOneof("call") or ""
        context: Any = LocalContext(self._authorization, self._peer, request.budget_ms)
        async with self._calls.call(f"local_{call_name}", context) as call:
            if call_name == "reserve":
                _put_slots(reply, await self._reserve(call, request))
            elif call_name == "commit":
                _put_slots(reply, await self._attachment.commit(request.number))
            elif call_name == "acquire":
                await self._acquire(call, request, reply)
            elif call_name == "next":
                given, last = await self._attachment.next_window(request.number, call.left_s)
                self._put_blocks(request.number, reply, given, last)
            else:
                raise InvalidArgument("call: this node does not know it; is the client newer?")

    async def _reserve(self, call: Call, request: pb.LocalRequest) -> Slots:
        begin = request.reserve
        cost_bytes = KEY_COST_BYTES * (len(begin.keys) // KEY_BYTES)
        async with self._calls.admitted(call, cost_bytes):
            offer = await begin_offer(self._node, call.tenant, begin)
            return await self._attachment.begin_write(request.number, Placing(offer))

    async def _acquire(self, call: Call, request: pb.LocalRequest, reply: pb.LocalReply) -> None:
        asked = request.acquire
        check_count("scopes", len(asked.scopes), 0, MAX_SCOPES)
        space_id, keys = check_space_id(asked.space_id), unpack_keys(asked.keys)
        async with self._calls.admitted(call, KEY_COST_BYTES * len(keys)):
            reading = await self._node.reading(
                call.tenant, asked.scopes, space_id, keys, asked.lease_id, left_s=call.left_s
            )
            block_bytes = self._node.space(space_id).block_bytes
            given, last = await self._attachment.begin_read(
                request.number, reading, block_bytes, call.left_s
            )
        self._put_blocks(request.number, reply, given, last)

    def _put_blocks(
        self, number: int, reply: pb.LocalReply, given: list[Acquired | None], last: bool
    ) -> None:
        reply.blocks.last = last
        for block in given:
            if block is None:
                reply.blocks.blocks.add()
                continue
            reply.blocks.blocks.add(
                here=True,
                offset=block.slot.offset,
                digest=block.slot.digest,
                tier=self._attachment.tier(number, block),
            )


def _put_slots(reply: pb.LocalReply, slots: Slots) -> None:
    reply.slots.held.extend(slots.held)
    reply.slots.full = slots.full
    for index, slot in slots.slots:
        reply.slots.indexes.append(index)
        reply.slots.offsets.append(slot.offset)

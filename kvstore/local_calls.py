"""The calls of one attached client: decode, call the node, encode; as the gRPC shell does.

They have the same limits, deadlines, errors and metrics as calls over gRPC.
"""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import grpc

from kvstore.api.errors import InvalidArgument
from kvstore.api.keys import KEY_BYTES
from kvstore.api.messages import Messages
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.wire import check_space_id, unpack_keys
from kvstore.attachment import Attachment, Slots
from kvstore.calls import Call, Calls
from kvstore.node import Node
from kvstore.placing import Placing
from kvstore.requests import KEY_COST_BYTES, MAX_SCOPES, begin_offer, check_count
from kvstore.tiers.tiered import Acquired

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
    """Runs the calls of one client side by side, those of one read or write one after the other."""

    def __init__(
        self,
        node: Node,
        calls: Calls,
        attachment: Attachment,
        authorization: str | None,
        messages: Messages,
    ) -> None:
        self._node = node
        self._calls = calls
        self._attachment = attachment
        self._authorization = authorization
        self._messages = messages
        self._peer = f"attached {id(attachment):x}"
        self._running: dict[int, list[asyncio.Task[None]]] = {}
        self._count = 0

    def take(self, message: bytes) -> None:
        """Begins one call; hears no more while there are too many. Raises DecodeError."""
        request = pb.LocalRequest.FromString(message)
        number = request.number
        before = list(self._running.get(number, ()))
        if request.WhichOneof("call") == "done":
            for task in before:  # Their answers are on their way, or the client is in a hurry.
                task.cancel()
            if not before:
                self._attachment.done(number)
                return
        task = asyncio.create_task(self._in_turn(request, before))
        self._running.setdefault(number, []).append(task)
        task.add_done_callback(partial(self._over, number))
        self._count += 1
        if self._count >= MAX_CALLS:
            self._messages.pause()

    async def end(self) -> None:
        """Ends what runs."""
        running = [task for tasks in self._running.values() for task in tasks]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _over(self, number: int, task: asyncio.Task[None]) -> None:
        self._running[number].remove(task)
        if not self._running[number]:
            del self._running[number]
        self._count -= 1
        if self._count == MAX_CALLS - 1:
            self._messages.resume()

    async def _in_turn(self, request: pb.LocalRequest, before: list[asyncio.Task[None]]) -> None:
        if before:
            await asyncio.wait(before)
        if request.WhichOneof("call") == "done":
            self._attachment.done(request.number)
        else:
            await self._answered(request)

    async def _answered(self, request: pb.LocalRequest) -> None:
        call_name = request.WhichOneof("call") or ""
        context: Any = LocalContext(self._authorization, self._peer, request.budget_ms)
        try:
            async with self._calls.call(f"local_{call_name}", context) as call:
                reply = pb.LocalReply(number=request.number)
                await self._fill(call, request, reply)
                # Within the call: what is still to be counted of it is counted behind the answer.
                self._messages.say(reply.SerializeToString())
            return
        except Refused as refused:
            status, details = refused.status, refused.details
        except Exception:  # noqa: BLE001
            status, details = grpc.StatusCode.UNKNOWN.value[0], "failed"  # Logged where it was met.
        self._give_up(request)
        refusal = pb.LocalReply(number=request.number, status=status, details=details)
        self._messages.say(refusal.SerializeToString())

    def _give_up(self, request: pb.LocalRequest) -> None:
        """Takes back what a read or write has that could not begin.

        Of one that had begun its client may still be copying; he says himself when he is done.
        """
        if request.WhichOneof("call") in ("reserve", "acquire"):
            self._attachment.done(request.number)

    async def _fill(self, call: Call, request: pb.LocalRequest, reply: pb.LocalReply) -> None:
        number, kind = request.number, request.WhichOneof("call")
        if kind == "reserve":
            _put_slots(reply, await self._reserve(call, request))
        elif kind == "commit":
            _put_slots(reply, await self._attachment.commit(number, request.commit.blocks))
        elif kind == "acquire":
            await self._acquire(call, request, reply)
        elif kind == "next":
            given, last = await self._attachment.next_window(number, call.left_s)
            self._put_blocks(number, reply, given, last)
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
    reply.slots.in_parts = True
    reply.slots.indexes.extend([index for index, _ in slots.slots])
    reply.slots.offsets.extend([slot.offset for _, slot in slots.slots])

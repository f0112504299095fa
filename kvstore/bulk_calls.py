"""The calls that come over one bulk connection: decode, call the node, encode, move the bytes.

They have the same limits, deadlines, errors and metrics as calls over gRPC.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import grpc

from kvstore.api.bulk import BulkSocket, Parcel
from kvstore.api.digest import DIGEST_BYTES
from kvstore.api.errors import InvalidArgument
from kvstore.api.keys import KEY_BYTES
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.wire import check_space_id, unpack_keys
from kvstore.bulk_line import Line
from kvstore.calls import Call, CallerGone, Calls
from kvstore.filling import WINDOW_BYTES, WINDOWS, Filling
from kvstore.local_calls import LocalContext, Refused
from kvstore.node import Node
from kvstore.reading import Delivered, Reading
from kvstore.requests import KEY_COST_BYTES, MAX_SCOPES, begin_offer, check_count
from kvstore.tickets import Ticket

LAST_WORDS_S = 1.0
"""Who does not take a refusal for so long hears of nothing more."""


class BulkCalls:
    """Runs the calls of one connection, one after the other."""

    def __init__(self, node: Node, calls: Calls, line: Line, ticket: Ticket) -> None:
        self._node = node
        self._calls = calls
        self._line = line
        self._ticket = ticket
        self._has_answered = False

    async def serve(self, request: pb.BulkRequest) -> None:
        """One call. Raises CallerGone when the connection is of no further use."""
        self._has_answered = False
        try:
            await self._run(request)
        except Refused as refused:
            refusal = pb.BulkReply(status=refused.status, details=refused.details)
        except CallerGone:
            raise
        except Exception:  # noqa: BLE001
            # Logged where it was met.
            refusal = pb.BulkReply(status=grpc.StatusCode.UNKNOWN.value[0], details="failed")
        else:
            return
        if self._has_answered:  # What comes next is taken for bytes of blocks.
            raise CallerGone(refusal.details)
        with suppress(TimeoutError):  # Who does not listen is cut off.
            async with asyncio.timeout(LAST_WORDS_S):
                await self._answer(refusal)

    async def _run(self, request: pb.BulkRequest) -> None:
        call_name = request.WhichOneof("call") or ""
        ticket = self._ticket
        context: Any = LocalContext(ticket.authorization, ticket.peer, request.budget_ms)
        async with self._calls.call(f"bulk_{call_name}", context) as call:
            if call_name == "write":
                await self._write(call, request.write)
            elif call_name == "read":
                await self._read(call, request.read.request, request.read.prefix_only)
            else:
                raise InvalidArgument("call: this node does not know it; is the client newer?")

    async def _write(self, call: Call, begin: pb.WriteBegin) -> None:
        keys = len(begin.keys) // KEY_BYTES
        async with self._calls.admitted(call, self._cost(check_space_id(begin.space_id), keys)):
            offer = await begin_offer(self._node, call.tenant, begin)
            filling = Filling(offer, self._line, self._node.metrics)
            try:
                self._begin_answer(pb.BulkReply(offer=pb.WriteOffer(wanted=offer.wanted)))
                await filling.receive()
            finally:
                filling.close()
            await self._answer(pb.BulkReply(done=pb.WriteDone(held=offer.held)))

    async def _read(self, call: Call, asked: pb.ReadRequest, prefix_only: bool) -> None:
        check_count("scopes", len(asked.scopes), 0, MAX_SCOPES)
        space_id, keys = check_space_id(asked.space_id), unpack_keys(asked.keys)
        async with self._calls.admitted(call, self._cost(space_id, len(keys))):
            reading = await self._node.reading(
                call.tenant, asked.scopes, space_id, keys, asked.lease_id, left_s=call.left_s
            )
            sending = Sending(self._line)
            try:
                await self._send_windows(reading, sending, prefix_only)
                await sending.settle(0)
            finally:
                await sending.close()

    async def _send_windows(self, reading: Reading, sending: "Sending", prefix_only: bool) -> None:
        windows = list(reading.windows(WINDOW_BYTES))
        for number, window in enumerate(windows, start=1):
            await sending.settle(WINDOWS - 1)
            gathered = await reading.gather(window)
            self._has_answered = True
            blocks = gathered.blocks
            if prefix_only:
                blocks = leading(blocks)
            is_last = number == len(windows) or len(blocks) < len(window)
            sending.send(gathered, blocks, is_last)
            if is_last:
                return
        await self._answer(pb.BulkReply(window=pb.BulkWindow(last=True)))

    def _cost(self, space_id: bytes, keys: int) -> int:
        """The windows of a call, and what its keys take."""
        block_bytes = self._node.space(space_id).block_bytes
        window_bytes = max(block_bytes, WINDOW_BYTES)
        return min(keys * block_bytes, WINDOWS * window_bytes) + KEY_COST_BYTES * keys

    async def _answer(self, reply: pb.BulkReply) -> None:
        await self._line.ended(self._begin_answer(reply))

    def _begin_answer(self, reply: pb.BulkReply) -> asyncio.Future[None]:
        self._has_answered = True
        packed = reply.SerializeToString()
        return self._line.begin(partial(self._line.wire.send_message, packed))


class Window(Protocol):
    """What a window of blocks is taken from. The views of its blocks are valid until `close`."""

    def close(self) -> None:
        """Lets the blocks go. Later calls change nothing."""


class Sending:
    """Windows on their way to the reader. Call `close` however it ends.

    Invariant: the blocks of a window stay pinned as long as a thread may send them.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        self._going: deque[tuple[Window, asyncio.Future[None]]] = deque()

    def send(self, gathered: Window, blocks: Sequence[Delivered], is_last: bool) -> None:
        """Sends a window behind those before it, and closes it then."""
        work = partial(_send_window, self._line.wire, blocks, is_last)
        self._going.append((gathered, self._line.begin(work)))

    async def settle(self, most: int) -> None:
        """Returns when at most so many windows are on their way. Raises CallerGone."""
        while len(self._going) > most:
            gathered, sent = self._going[0]
            try:
                await self._line.ended(sent)
            finally:
                self._going.popleft()
                gathered.close()

    async def close(self) -> None:
        """Ends what is on its way, and the connection with it."""
        if self._going:
            self._line.wire.shut()
        while self._going:
            # Who is cancelled once more leaves no sooner: threads still send the blocks.
            with suppress(CallerGone, asyncio.CancelledError):
                await self.settle(len(self._going) - 1)


def _send_window(wire: BulkSocket, blocks: Sequence[Delivered], is_last: bool) -> None:
    """In a thread."""
    window = pb.BulkWindow(last=is_last)
    parcels = []
    for block in blocks:
        if block.view is None or len(block.digest) != DIGEST_BYTES:
            window.blocks.add()
            continue
        window.blocks.add(here=True, tier=block.tier)
        parcels.append(Parcel(b"", b"", block.view, block.digest))
    wire.send_message(pb.BulkReply(window=window).SerializeToString())
    wire.send_blocks(parcels)


def leading(blocks: list[Delivered]) -> list[Delivered]:
    """Those before the first one that is missing."""
    for number, block in enumerate(blocks):
        if block.view is None:
            return blocks[:number]
    return blocks

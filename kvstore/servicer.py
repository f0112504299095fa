"""The gRPC shell of a node: decode, authenticate, call the node, encode."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, closing, suppress
from typing import TYPE_CHECKING, Any

import grpc

import kvstore
from kvstore.api.errors import InvalidArgument, KvstoreError, Unavailable
from kvstore.api.keys import KEY_BYTES
from kvstore.api.parts import Part, WriteParts, pack_reply, parse_request
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.v1 import kvstore_pb2_grpc
from kvstore.api.wire import (
    PIECE_BYTES,
    check_space_id,
    descriptor_from_wire,
    hint_from_wire,
    unpack_keys,
)
from kvstore.calls import Calls, Context, authorization
from kvstore.events import Draining, Event, SegmentSealed
from kvstore.node import Matched, Node
from kvstore.reading import Delivered, window_bytes
from kvstore.requests import KEY_COST_BYTES, MAX_SCOPES, begin_offer, check_count
from kvstore.writing import Incoming

if TYPE_CHECKING:
    from kvstore.directory import Directory

MAX_SPACES = 64
MAX_NAMES = 65_536
"""Names that one match may ask for: each key is one in each space and scope."""
MAX_ID_BYTES = 32
NAME_COST_BYTES = 512
"""What one name of a match costs, with what a lease keeps of it."""
HEAR_OUT_S = 1.0
BEGIN_S = 5.0


def serve(servicer: "Servicer", server: grpc.aio.Server) -> None:
    """Adds the service to a server; the calls that carry blocks with messages of our own making."""
    service = pb.DESCRIPTOR.services_by_name["KVStore"].full_name
    ours: dict[str, Any] = {
        "Read": grpc.unary_stream_rpc_method_handler(
            servicer.Read, pb.ReadRequest.FromString, pack_reply
        ),
        "Write": grpc.stream_stream_rpc_method_handler(
            servicer.Write, parse_request, pb.WriteReply.SerializeToString
        ),
    }
    # Of generic handlers the first counts; of registered ones, which go before them, the last.
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, ours),))
    kvstore_pb2_grpc.add_KVStoreServicer_to_server(servicer, server)
    server.add_registered_method_handlers(service, ours)


class Servicer(kvstore_pb2_grpc.KVStoreServicer):
    """Answers `kvstore.v1.KVStore` for one node."""

    def __init__(
        self,
        node: Node,
        calls: Calls,
        *,
        max_message_bytes: int,
        scrub_bytes_per_s: int,
        directory: "Directory | None" = None,
        attach: Callable[[str | None], pb.AttachReply] | None = None,
        connect: Callable[[str | None, str], pb.ConnectReply] | None = None,
    ) -> None:
        self._node = node
        self._calls = calls
        self._max_message_bytes = max_message_bytes
        self._scrub_bytes_per_s = scrub_bytes_per_s
        self._directory = directory
        self._attach = attach
        self._connect = connect
        self._started_s = node.clock.monotonic_s()

    async def OpenSpace(self, request: pb.OpenSpaceRequest, context: Context) -> pb.OpenSpaceReply:
        async with self._calls.call("open_space", context):
            space_id = self._node.open_space(descriptor_from_wire(request.descriptor))
            reply = pb.OpenSpaceReply(space_id=space_id, max_message_bytes=self._max_message_bytes)
        return reply

    async def Match(self, request: pb.MatchRequest, context: Context) -> pb.MatchReply:
        async with self._calls.call("match", context) as call:
            check_count("space_ids", len(request.space_ids), 1, MAX_SPACES)
            check_count("scopes", len(request.scopes), 0, MAX_SCOPES)
            check_count("request_id", len(request.request_id), 0, MAX_ID_BYTES)
            keys = unpack_keys(request.keys)
            check_count("held_blocks", request.held_blocks, 0, len(keys))
            names = len(keys) * len(request.space_ids) * max(len(request.scopes), 1)
            if names > MAX_NAMES:
                raise InvalidArgument(
                    f"keys × space_ids × scopes: at most {MAX_NAMES} in one match, got {names}; "
                    "send fewer keys, or the spaces in several matches"
                )
            async with self._calls.admitted(call, NAME_COST_BYTES * names):
                matched = await self._node.match(
                    call.tenant,
                    [check_space_id(space_id) for space_id in request.space_ids],
                    keys,
                    request.scopes,
                    lease_s=request.lease_ms / 1000,
                    request_id=request.request_id,
                    held_blocks=request.held_blocks,
                    hint=hint_from_wire(request.hint) if request.HasField("hint") else None,
                    left_s=call.left_s,
                )
                reply = self._match_reply(matched)
        return reply

    async def Locate(self, request: pb.LocateRequest, context: Context) -> pb.LocateReply:
        async with self._calls.call("locate", context) as call:
            space_id, keys = check_space_id(request.space_id), unpack_keys(request.keys)
            async with self._calls.admitted(call, KEY_COST_BYTES * len(keys)):
                refs = self._node.refs(call.tenant, request.scope, space_id, keys)
                tiers = await self._node.tiers.locate(refs)
                reply = pb.LocateReply(tiers=[tier or "" for tier in tiers])
        return reply

    # Read, Write and Watch write to their context instead of yielding, which gRPC takes as well:
    # when a call is cancelled, only a coroutine learns of it at once. A generator that nobody
    # reads any more would keep what it holds until it is collected.

    async def Read(  # type: ignore[override]
        self, request: pb.ReadRequest, context: Context
    ) -> None:
        async with self._calls.call("read", context) as call:
            check_count("scopes", len(request.scopes), 0, MAX_SCOPES)
            space_id, keys = check_space_id(request.space_id), unpack_keys(request.keys)
            async with self._calls.admitted(call, self._read_cost(space_id, len(keys))):
                blocks = self._node.read(
                    call.tenant,
                    request.scopes,
                    space_id,
                    keys,
                    request.lease_id,
                    left_s=call.left_s,
                )
                async with aclosing(blocks), aclosing(_read_replies(blocks)) as replies:
                    async for reply in replies:
                        await call.write(reply)

    async def Write(  # type: ignore[override]
        self, request_iterator: AsyncIterator[WriteParts], context: Context
    ) -> None:
        async with self._calls.call("write", context) as call:
            first = await _first(request_iterator, min(BEGIN_S, call.left_s() / 2))
            async with _heard_out(request_iterator):
                if first is None or first.begin is None:
                    raise InvalidArgument("begin: the first message of a write must carry it")
                cost = self._write_cost(check_space_id(first.begin.space_id), first.begin)
            async with self._calls.admitted(call, cost), _heard_out(request_iterator):
                offer = await begin_offer(self._node, call.tenant, first.begin)
                with closing(Incoming(offer, self._node.metrics)) as incoming:
                    await call.write(pb.WriteReply(offer=pb.WriteOffer(wanted=incoming.wanted)))
                    await _take(incoming, first.parts)
                    async for message in request_iterator:
                        if message.begin is not None:
                            raise InvalidArgument("begin: only the first message of a write has it")
                        await _take(incoming, message.parts)
                    incoming.finish()
                    await call.write(pb.WriteReply(done=pb.WriteDone(held=incoming.held)))

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseReply:
        async with self._calls.call("release", context) as call:
            self._node.release(call.tenant, request.lease_id)
            reply = pb.ReleaseReply()
        return reply

    async def Hint(self, request: pb.HintRequest, context: Context) -> pb.HintReply:
        async with self._calls.call("hint", context) as call:
            space_id, keys = check_space_id(request.space_id), unpack_keys(request.keys)
            hint = hint_from_wire(request.hint)
            async with self._calls.admitted(call, KEY_COST_BYTES * len(keys)):
                self._node.hint(call.tenant, request.scope, space_id, keys, hint)
                reply = pb.HintReply()
        return reply

    async def Discard(self, request: pb.DiscardRequest, context: Context) -> pb.DiscardReply:
        async with self._calls.call("discard", context) as call:
            space_id, keys = check_space_id(request.space_id), unpack_keys(request.keys)
            async with self._calls.admitted(call, KEY_COST_BYTES * len(keys)):
                refs = self._node.refs(call.tenant, request.scope, space_id, keys)
                discarded = await self._node.tiers.discard(refs)
                reply = pb.DiscardReply(discarded_blocks=discarded)
        return reply

    async def ClearSpace(
        self, request: pb.ClearSpaceRequest, context: Context
    ) -> pb.ClearSpaceReply:
        async with self._calls.call("clear_space", context) as call:
            space_id = check_space_id(request.space_id)
            async with self._calls.admitted(call, KEY_COST_BYTES):
                cleared = await self._node.clear_space(call.tenant, request.scope, space_id)
                reply = pb.ClearSpaceReply(cleared_blocks=cleared)
        return reply

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusReply:
        async with self._calls.call("status", context):
            nodes = await self._directory.nodes() if self._directory is not None else []
            reply = pb.StatusReply(
                version=kvstore.__version__,
                node_id=self._node.node_id,
                draining=self._node.draining,
                uptime_s=self._node.clock.monotonic_s() - self._started_s,
                tiers=[
                    pb.TierStatus(
                        name=usage.tier,
                        capacity_bytes=usage.capacity_bytes,
                        used_bytes=usage.used_bytes,
                        blocks=usage.blocks,
                        serving=usage.serving,
                    )
                    for usage in self._node.tiers.usage()
                ],
                leases=len(self._node.leases),
                leased_bytes=self._node.leases.leased_bytes,
                spaces=len(self._node.spaces),
                counters=self._node.metrics.samples(),
                nodes=[pb.NodeStatus(node_id=n.node_id, endpoint=n.endpoint) for n in nodes],
            )
        return reply

    async def Attach(self, request: pb.AttachRequest, context: Context) -> pb.AttachReply:
        async with self._calls.call("attach", context):
            if self._attach is None:
                return pb.AttachReply()
            reply = self._attach(authorization(context))
        return reply

    async def Connect(self, request: pb.ConnectRequest, context: Context) -> pb.ConnectReply:
        async with self._calls.call("connect", context):
            if self._connect is None:
                return pb.ConnectReply()
            reply = self._connect(authorization(context), context.peer())
        return reply

    async def Watch(  # type: ignore[override]
        self, request: pb.WatchRequest, context: Context
    ) -> None:
        async with self._calls.call("watch", context, endless=True) as call:
            with self._node.events.watch() as events:
                # Tells the caller that from now on nothing is missed.
                await context.send_initial_metadata(())
                event: Event | None = None
                while not isinstance(event, Draining):
                    event = await events.get()
                    await call.write(_event_reply(event))

    async def Scrub(  # type: ignore[override]
        self, request: pb.ScrubRequest, context: Context
    ) -> None:
        async with self._calls.call("scrub", context, endless=True) as call:
            rate = min(request.bytes_per_s or self._scrub_bytes_per_s, self._scrub_bytes_per_s)
            async with aclosing(self._node.scrub(rate)) as reports:
                async for report in reports:
                    if self._node.draining:
                        raise Unavailable("this node is draining")
                    reply = pb.ScrubReply(
                        checked_blocks=report.blocks,
                        checked_bytes=report.size_bytes,
                        damaged_blocks=report.damaged,
                        total_blocks=report.total,
                    )
                    await call.write(reply)

    def _read_cost(self, space_id: bytes, keys: int) -> int:
        """A window of blocks, and the messages into which they are copied."""
        block_bytes = self._node.space(space_id).block_bytes
        data_bytes = min(keys * block_bytes, window_bytes(block_bytes))
        return data_bytes + 2 * min(data_bytes, PIECE_BYTES) + KEY_COST_BYTES * keys

    def _write_cost(self, space_id: bytes, begin: pb.WriteBegin) -> int:
        """The block that is being filled, and the message that brings it."""
        keys = len(begin.keys) // KEY_BYTES
        block_bytes = self._node.space(space_id).block_bytes
        message_bytes = min(keys * block_bytes, self._max_message_bytes)
        return block_bytes + message_bytes + KEY_COST_BYTES * keys

    def _match_reply(self, matched: Matched) -> pb.MatchReply:
        reply = pb.MatchReply(matched_blocks=matched.blocks)
        for runs in matched.runs:
            reply.spaces.add(
                runs=[pb.Run(blocks=run.blocks, tier=run.tier, leased=run.leased) for run in runs]
            )
        if matched.lease is not None:
            left_s = matched.lease.expires_s - self._node.clock.monotonic_s()
            reply.lease_id = matched.lease.lease_id
            reply.lease_ms = max(0, round(left_s * 1000))
        return reply


async def _take(incoming: Incoming, parts: Sequence[Part]) -> None:
    for part in parts:
        if part.header is not None:
            await incoming.begin_block(part.block, part.header.bytes, part.header.digest)
        incoming.add(part.block, part.data)


async def _first(requests: AsyncIterator[WriteParts], patience_s: float) -> WriteParts | None:
    """How a write begins. Who opens one and says nothing has one of the places, free of charge."""
    try:
        async with asyncio.timeout(patience_s):
            return await anext(requests, None)
    except TimeoutError:
        raise InvalidArgument(f"begin: it did not come within {patience_s:.1f} s") from None


@asynccontextmanager
async def _heard_out(requests: AsyncIterator[WriteParts]) -> AsyncGenerator[None, None]:
    """Lets a caller who is refused finish what he is saying, so that he hears why.

    To who is in the middle of a message gRPC shows INTERNAL, and not the status.
    """
    try:
        yield
    except KvstoreError:
        with suppress(TimeoutError):
            async with asyncio.timeout(HEAR_OUT_S):
                async for _ in requests:
                    pass
        raise


async def _read_replies(blocks: AsyncIterator[Delivered]) -> AsyncGenerator[list[Part], None]:
    """Packs blocks into messages of about `PIECE_BYTES`: small ones together, large ones cut."""
    reply: list[Part] = []
    size = 0
    async for block in blocks:
        view = block.view if block.view is not None else memoryview(b"")
        header: pb.BlockHeader | None = pb.BlockHeader(
            bytes=len(view), digest=block.digest, tier=block.tier
        )
        start = 0
        while start < len(view) or header is not None:
            data = view[start : start + PIECE_BYTES - size]
            start += len(data)
            size += len(data)
            full = size >= PIECE_BYTES
            # What waits for more is copied: its slot may be another block's by then.
            reply.append(Part(block.index, header, data if full else bytes(data)))
            header = None
            if full:
                yield reply
                reply, size = [], 0
    if reply:
        yield reply


def _event_reply(event: Event) -> pb.WatchReply:
    if isinstance(event, SegmentSealed):
        sealed = pb.SegmentSealed(
            segment_id=event.segment_id, blocks=event.blocks, bytes=event.size_bytes
        )
        return pb.WatchReply(segment_sealed=sealed)
    return pb.WatchReply(draining=pb.Draining())

"""The gRPC shell of a node: decode, authenticate, call the node, encode."""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc

import kvstore
from kvstore.api.errors import STATUS, InvalidArgument, KvstoreError, TierError, Unavailable
from kvstore.api.keys import KEY_BYTES
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.v1 import kvstore_pb2_grpc
from kvstore.api.wire import (
    PIECE_BYTES,
    check_space_id,
    descriptor_from_wire,
    hint_from_wire,
    unpack_keys,
)
from kvstore.events import Draining, Event, SegmentSealed
from kvstore.node import Delivered, Matched, Node
from kvstore.tenants import Tenant, Tenants
from kvstore.writing import Incoming

if TYPE_CHECKING:
    from kvstore.directory import Directory

Context = grpc.aio.ServicerContext[Any, Any]

MAX_SPACES = 64
MAX_SCOPES = 16
MAX_ID_BYTES = 32


class Servicer(kvstore_pb2_grpc.KVStoreServicer):
    """Answers `kvstore.v1.KVStore` for one node."""

    def __init__(
        self,
        node: Node,
        tenants: Tenants,
        *,
        max_message_bytes: int,
        directory: "Directory | None" = None,
    ) -> None:
        self._node = node
        self._tenants = tenants
        self._max_message_bytes = max_message_bytes
        self._directory = directory
        self._started_s = node.clock.monotonic_s()

    async def OpenSpace(self, request: pb.OpenSpaceRequest, context: Context) -> pb.OpenSpaceReply:
        async with self._call("open_space", context):
            space_id = self._node.open_space(descriptor_from_wire(request.descriptor))
            reply = pb.OpenSpaceReply(space_id=space_id, max_message_bytes=self._max_message_bytes)
        return reply

    async def Match(self, request: pb.MatchRequest, context: Context) -> pb.MatchReply:
        async with self._call("match", context) as tenant:
            _check_count("space_ids", len(request.space_ids), 1, MAX_SPACES)
            _check_count("scopes", len(request.scopes), 0, MAX_SCOPES)
            _check_count("request_id", len(request.request_id), 0, MAX_ID_BYTES)
            keys = unpack_keys(request.keys)
            _check_count("held_blocks", request.held_blocks, 0, len(keys))
            matched = await self._node.match(
                tenant,
                [check_space_id(space_id) for space_id in request.space_ids],
                keys,
                request.scopes,
                lease_s=request.lease_ms / 1000,
                request_id=request.request_id,
                held_blocks=request.held_blocks,
                hint=hint_from_wire(request.hint) if request.HasField("hint") else None,
            )
            reply = self._match_reply(matched)
        return reply

    async def Locate(self, request: pb.LocateRequest, context: Context) -> pb.LocateReply:
        async with self._call("locate", context) as tenant:
            refs = self._node.refs(
                tenant, request.scope, check_space_id(request.space_id), unpack_keys(request.keys)
            )
            tiers = await self._node.tiers.locate(refs)
            reply = pb.LocateReply(tiers=[tier or "" for tier in tiers])
        return reply

    async def Read(self, request: pb.ReadRequest, context: Context) -> AsyncIterator[pb.ReadReply]:
        async with self._call("read", context) as tenant:
            _check_count("scopes", len(request.scopes), 0, MAX_SCOPES)
            blocks = self._node.read(
                tenant,
                request.scopes,
                check_space_id(request.space_id),
                unpack_keys(request.keys),
                request.lease_id,
            )
            async with aclosing(blocks):
                async for reply in _read_replies(blocks):
                    yield reply

    async def Write(
        self, request_iterator: AsyncIterator[pb.WriteRequest], context: Context
    ) -> AsyncIterator[pb.WriteReply]:
        async with self._call("write", context) as tenant:
            first = await anext(request_iterator, None)
            if first is None or not first.HasField("begin"):
                raise InvalidArgument("begin: the first message of a write must carry it")
            incoming = await self._begin_write(tenant, first.begin)
            try:
                yield pb.WriteReply(offer=pb.WriteOffer(wanted=incoming.wanted))
                await _take(incoming, first.pieces)
                async for message in request_iterator:
                    if message.HasField("begin"):
                        raise InvalidArgument("begin: only the first message of a write has it")
                    await _take(incoming, message.pieces)
                incoming.finish()
                yield pb.WriteReply(done=pb.WriteDone(held=incoming.held))
            finally:
                incoming.close()

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseReply:
        async with self._call("release", context) as tenant:
            self._node.release(tenant, request.lease_id)
            reply = pb.ReleaseReply()
        return reply

    async def Hint(self, request: pb.HintRequest, context: Context) -> pb.HintReply:
        async with self._call("hint", context) as tenant:
            space_id, keys = check_space_id(request.space_id), unpack_keys(request.keys)
            self._node.hint(tenant, request.scope, space_id, keys, hint_from_wire(request.hint))
            reply = pb.HintReply()
        return reply

    async def Discard(self, request: pb.DiscardRequest, context: Context) -> pb.DiscardReply:
        async with self._call("discard", context) as tenant:
            refs = self._node.refs(
                tenant, request.scope, check_space_id(request.space_id), unpack_keys(request.keys)
            )
            reply = pb.DiscardReply(discarded_blocks=await self._node.tiers.discard(refs))
        return reply

    async def ClearSpace(
        self, request: pb.ClearSpaceRequest, context: Context
    ) -> pb.ClearSpaceReply:
        async with self._call("clear_space", context) as tenant:
            space_id = check_space_id(request.space_id)
            cleared = await self._node.clear_space(tenant, request.scope, space_id)
            reply = pb.ClearSpaceReply(cleared_blocks=cleared)
        return reply

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusReply:
        async with self._call("status", context):
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
                nodes=[pb.NodeStatus(node_id=n, endpoint=e) for n, e in nodes],
            )
        return reply

    async def Watch(
        self, request: pb.WatchRequest, context: Context
    ) -> AsyncIterator[pb.WatchReply]:
        async with self._call("watch", context):
            with self._node.events.watch() as events:
                # Tells the caller that from now on nothing is missed.
                await context.send_initial_metadata(())
                event: Event | None = None
                while not isinstance(event, Draining):
                    event = await events.get()
                    yield _event_reply(event)

    @asynccontextmanager
    async def _call(self, op: str, context: Context) -> AsyncIterator[Tenant]:
        """Authenticates the caller, maps errors to statuses, counts and times."""
        started_s = self._node.clock.monotonic_s()
        status = grpc.StatusCode.CANCELLED
        try:
            if self._node.draining:
                raise Unavailable("this node is draining")
            metadata = {str(key): value for key, value in context.invocation_metadata() or ()}
            authorization = metadata.get("authorization")
            yield self._tenants.authenticate(None if authorization is None else str(authorization))
            status = grpc.StatusCode.OK
        except TierError as error:
            status = grpc.StatusCode.UNAVAILABLE
            await context.abort(status, str(error))
        except KvstoreError as error:
            status = STATUS[type(error)]
            await context.abort(status, str(error))
        finally:
            metrics = self._node.metrics
            metrics.requests.labels(op, status.name.lower()).inc()
            seconds = self._node.clock.monotonic_s() - started_s
            metrics.request_seconds.labels(op).observe(seconds)

    async def _begin_write(self, tenant: Tenant, begin: pb.WriteBegin) -> Incoming:
        if len(begin.parent_key) not in (0, KEY_BYTES):
            raise InvalidArgument(f"begin.parent_key: {KEY_BYTES} bytes are needed, or none")
        return await self._node.write(
            tenant,
            begin.scope,
            check_space_id(begin.space_id),
            unpack_keys(begin.keys, "begin.keys", least=1),
            parent_key=begin.parent_key,
            parent_scope=begin.parent_scope,
            hint=hint_from_wire(begin.hint) if begin.HasField("hint") else None,
        )

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


async def _take(incoming: Incoming, pieces: Sequence[pb.Piece]) -> None:
    for piece in pieces:
        if piece.HasField("header"):
            await incoming.begin_block(piece.block, piece.header.bytes, piece.header.digest)
        incoming.add(piece.block, piece.data)


async def _read_replies(blocks: AsyncIterator[Delivered]) -> AsyncIterator[pb.ReadReply]:
    """Packs blocks into messages of about `PIECE_BYTES`: small ones together, large ones cut."""
    reply, size = pb.ReadReply(), 0
    async for block in blocks:
        view = block.view if block.view is not None else memoryview(b"")
        header = pb.BlockHeader(bytes=len(view), digest=block.digest, tier=block.tier)
        reply.pieces.add(block=block.index, header=header)
        start = 0
        while start < len(view):
            data = view[start : start + PIECE_BYTES - size]
            if start:
                reply.pieces.add(block=block.index)
            reply.pieces[-1].data = bytes(data)
            start += len(data)
            size += len(data)
            if size >= PIECE_BYTES:
                yield reply
                reply, size = pb.ReadReply(), 0
    if reply.pieces:
        yield reply


def _event_reply(event: Event) -> pb.WatchReply:
    if isinstance(event, SegmentSealed):
        sealed = pb.SegmentSealed(
            segment_id=event.segment_id, blocks=event.blocks, bytes=event.size_bytes
        )
        return pb.WatchReply(segment_sealed=sealed)
    return pb.WatchReply(draining=pb.Draining())


def _check_count(field: str, count: int, least: int, most: int) -> None:
    if not least <= count <= most:
        raise InvalidArgument(f"{field}: {least} … {most} are allowed, got {count}")

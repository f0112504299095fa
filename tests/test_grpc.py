"""A node over real gRPC, with a real Redis and real files."""

import asyncio
import random
import socket
import threading
import tracemalloc
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import redis as sync_redis
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstore.api.errors import ConfigError, ResourceExhausted, Unauthenticated, Unavailable
from kvstore.api.keys import KEY_BYTES
from kvstore.api.tier import BlockRef
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.v1.kvstore_pb2_grpc import KVStoreStub
from kvstore.api.wire import MAX_KEYS, MESSAGE_BYTES, descriptor_to_wire, pack_keys
from kvstore.calls import WATCHERS_PER_CLIENT
from kvstore.files import PAGE_BYTES
from kvstore.names import block_name, namespace
from kvstore.server import REDIS_CONNECTIONS, SERVICE, NodeServer
from kvstore.tenants import LOCAL_TENANT, token_hash
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.guarded import OPEN_S
from kvstore.tiers.segment import file_name
from kvstore_client import AsyncClient, Space
from kvstore_workers.redis_server import RedisServer
from tests.sim.blocks import keys_of
from tests.sim.clock import ManualClock, settle
from tests.sim.nodes import (
    SECRET,
    Nodes,
    call_metadata,
    check_node,
    counter,
    descriptor_of,
    digest_of,
    expected,
    load,
    raw_channel,
    store,
)
from tests.sim.rig import assert_idle, leaf

if TYPE_CHECKING:
    from kvstore.api.v1.kvstore_pb2_grpc import KVStoreAsyncStub

SMALL_MEMORY = {"capacity_bytes": 2 << 16, "slab_bytes": 1 << 16}
"""Sixteen blocks."""
BLOCKS = 40
"""More than that."""


async def opened(nodes: Nodes, server: NodeServer, **descriptor: Any) -> tuple[AsyncClient, Space]:
    """A client of a node and a space that is open there."""
    client = nodes.connect(server)
    return client, await client.open_space(descriptor_of(**descriptor))


@pytest.fixture
async def server(nodes: Nodes) -> NodeServer:
    """A node with memory and disk."""
    return await nodes.start()


@pytest.fixture
async def stub(server: NodeServer) -> AsyncIterator["KVStoreAsyncStub"]:
    """The methods of the node without the client's care, with a space open."""
    async with raw_channel(server) as channel:
        stub = KVStoreStub(channel)
        await stub.OpenSpace(pb.OpenSpaceRequest(descriptor=descriptor_to_wire(descriptor_of())))
        yield stub


SPACE = Space.of(descriptor_of())


# Round trips.


async def test_a_round_trip_through_memory(nodes: Nodes, server: NodeServer) -> None:
    """What was stored is matched, leased and read, byte by byte."""
    client, space = await opened(nodes, server)
    keys = keys_of("chain", 8)
    assert await store(client, space, keys) == [True] * 8
    match = await client.match([space], [*keys, *keys_of("absent", 2)])
    assert match.blocks == 8
    assert [(run.blocks, run.tier, run.leased) for run in match.spaces[0]] == [(8, "memory", True)]
    assert await load(client, space, keys, lease=match) == ["memory"] * 8
    await client.release(match)
    assert (await client.status()).leases == 0


async def test_a_round_trip_through_the_disk(nodes: Nodes) -> None:
    """What memory had no room for comes back from disk, whole chains of it."""
    server = await nodes.start(memory=SMALL_MEMORY)
    client, space = await opened(nodes, server)
    keys = keys_of("chain", BLOCKS)
    assert await store(client, space, keys) == [True] * BLOCKS
    tiers = await load(client, space, keys)
    assert set(tiers) == {"memory", "disk"}
    match = await client.match([space], keys)
    assert match.blocks == BLOCKS
    assert set(await load(client, space, keys, lease=match)) <= {"memory", "disk"}


async def test_a_round_trip_through_redis(nodes: Nodes, redis_url: str) -> None:
    """The same without a disk; another node finds the blocks there too."""
    options: dict[str, Any] = {"redis": {"blocks_url": redis_url}, "disk": {"enabled": False}}
    server = await nodes.start(memory=SMALL_MEMORY, **options)
    client, space = await opened(nodes, server)
    keys = keys_of("chain", BLOCKS)
    assert await store(client, space, keys) == [True] * BLOCKS
    assert set(await load(client, space, keys)) == {"memory", "redis"}
    await nodes.stop(server)
    other = await nodes.start(memory=SMALL_MEMORY, **options)
    client, space = await opened(nodes, other)
    assert (await client.match([space], keys, lease_ms=0)).blocks == BLOCKS
    assert await load(client, space, keys) == ["redis"] * BLOCKS


async def test_a_restart_with_nothing_but_the_disk(nodes: Nodes, redis_url: str) -> None:
    """With memory and Redis empty a whole chain is matched from disk, and promoted."""
    server = await nodes.start(memory=SMALL_MEMORY, redis={"blocks_url": redis_url})
    client, space = await opened(nodes, server)
    keys = keys_of("chain", BLOCKS)
    await store(client, space, keys)
    await nodes.stop(server)
    server = await nodes.start()
    client, space = await opened(nodes, server)
    match = await client.match([space], keys, lease_ms=60_000)
    assert (match.blocks, {run.tier for run in match.spaces[0]}) == (BLOCKS, {"disk"})
    assert await load(client, space, keys, lease=match) == ["disk"] * BLOCKS
    await client.release(match)
    assert await load(client, space, keys) == ["memory"] * BLOCKS


@pytest.mark.parametrize("block_bytes", [1, 4096, (1 << 20) + 1, 5 << 20])
async def test_every_block_size_travels(nodes: Nodes, redis_url: str, block_bytes: int) -> None:
    """Blocks of a byte and of more than a message, through memory, Redis and disk."""
    memory = {"capacity_bytes": 12 << 20, "slab_bytes": 6 << 20}
    options: dict[str, Any] = {
        "memory": memory,
        "redis": {"blocks_url": redis_url, "part_bytes": 1 << 20},
        "disk": {"capacity_bytes": 64 << 20, "segment_bytes": 12 << 20},
    }
    server = await nodes.start(**options)
    client, space = await opened(nodes, server, block_bytes=block_bytes)
    keys = keys_of("chain", 4)
    assert await store(client, space, keys) == [True] * 4
    assert all(await load(client, space, keys))
    await nodes.stop(server)
    for withheld in ("redis", "disk"):
        rest = {name: value for name, value in options.items() if name != withheld}
        rest["disk"] = rest.get("disk", {"enabled": False})
        server = await nodes.start(**rest)
        client, space = await opened(nodes, server, block_bytes=block_bytes)
        assert set(await load(client, space, keys)) == {"redis", "disk"} - {withheld}
        await nodes.stop(server)


async def test_any_blocks_in_any_order(nodes: Nodes) -> None:
    """A read may name blocks of several chains, in any order, twice, and some that are nowhere."""
    server = await nodes.start(memory=SMALL_MEMORY)
    client, space = await opened(nodes, server)
    one, two, absent = keys_of("one", 20), keys_of("two", 20), keys_of("absent", 3)
    await store(client, space, one)
    await store(client, space, two)
    match = await client.match([space], one, lease_ms=60_000)
    question = [one[3], absent[0], two[7], one[3], one[0], two[19], absent[1], one[3], one[19]]
    for lease in (None, match):
        tiers = await load(client, space, question, lease=lease)
        assert [tier is not None for tier in tiers] == [key not in absent for key in question]
    await client.release(match)
    assert_idle(server.node.tiers.memory)


async def test_several_spaces_and_the_same_one_twice(nodes: Nodes) -> None:
    """A match over ranks, one of them named twice, is promoted and released without a trace."""
    server = await nodes.start(memory=SMALL_MEMORY)
    client, space = await opened(nodes, server)
    other = await client.open_space(descriptor_of(tp_rank=1, tp_size=2))
    keys = keys_of("chain", 6)
    for each in (space, other):
        await store(client, each, keys)
    await store(client, space, keys_of("filler", BLOCKS))
    match = await client.match([space, other, space], keys, lease_ms=60_000)
    assert match.blocks == 6
    for each in (space, other):
        assert all(await load(client, each, keys, lease=match))
    await client.release(match)
    assert_idle(server.node.tiers.memory)
    assert (await client.match([space, other], keys[:3], lease_ms=0)).blocks == 3


async def test_two_writers_of_one_run(nodes: Nodes, server: NodeServer) -> None:
    """Both are told that all is held; later ones are asked for nothing."""
    client, space = await opened(nodes, server)
    keys = keys_of("chain", 20)
    held = await asyncio.gather(*(store(client, space, keys) for _ in range(4)))
    assert held == [[True] * 20] * 4
    assert await load(client, space, keys) == ["memory"] * 20
    async with raw_channel(server) as channel:
        begin = pb.WriteBegin(space_id=space.space_id, keys=pack_keys(keys))
        replies = await writing(KVStoreStub(channel), [pb.WriteRequest(begin=begin)])
    assert list(replies[0].offer.wanted) == []
    assert list(replies[1].done.held) == list(range(20))


# Damage.


def flip_on_disk(server: NodeServer, home: Path, space: Space, key: bytes) -> None:
    """Damages the payload of one block in its segment's file."""
    owned = namespace(SECRET, LOCAL_TENANT, "", space.space_id)
    entry = leaf(server.node.tiers, DiskTier)._index.find(block_name(BlockRef(owned, key)))
    assert entry is not None
    path = home / "blocks" / file_name(entry.segment_id)
    with path.open("r+b") as file:
        file.seek(entry.offset + PAGE_BYTES + entry.stored_bytes // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 0x10]))


async def test_a_corrupt_disk_record_is_a_counted_miss_and_repaired(
    nodes: Nodes, tmp_path: Path
) -> None:
    """One block is missed, the chain before it is there; the next store writes it again."""
    server = await nodes.start(memory=SMALL_MEMORY)
    client, space = await opened(nodes, server)
    keys = keys_of("chain", 10)
    await store(client, space, keys)
    await store(client, space, keys_of("filler", BLOCKS))
    assert await client.locate(space, keys) == ["disk"] * 10
    flip_on_disk(server, tmp_path, space, keys[6])
    assert await load(client, space, keys[:7]) == ["disk"] * 6 + [None]
    assert counter(server, "corrupt", tier="disk") == 1
    assert (await client.match([space], keys, lease_ms=0)).blocks == 6
    assert await store(client, space, keys) == [True] * 10
    await store(client, space, keys_of("more filler", BLOCKS))
    assert await client.locate(space, keys) == ["disk"] * 10
    assert await load(client, space, keys) == ["disk"] * 10
    assert counter(server, "corrupt", tier="disk") == 1


async def test_a_corrupt_redis_value_is_a_counted_miss_and_repaired(
    nodes: Nodes, redis_url: str
) -> None:
    """The same for a flipped bit in Redis."""
    server = await nodes.start(
        memory=SMALL_MEMORY, redis={"blocks_url": redis_url}, disk={"enabled": False}
    )
    client, space = await opened(nodes, server)
    keys = keys_of("chain", 10)
    await store(client, space, keys)
    await store(client, space, keys_of("filler", BLOCKS))
    assert await client.locate(space, keys) == ["redis"] * 10
    owned = namespace(SECRET, LOCAL_TENANT, "", space.space_id)
    name = block_name(BlockRef(owned, keys[6])).hex()
    with sync_redis.from_url(redis_url) as redis:
        (key,) = redis.scan_iter(match=f"kvstore:b1:*:{name}:0")
        value = bytearray(redis.get(key) or b"")
        value[-5] ^= 1
        redis.set(key, bytes(value))
    assert await load(client, space, keys) == ["redis"] * 6 + [None] + ["redis"] * 3
    assert counter(server, "corrupt", tier="redis") == 1
    assert await store(client, space, keys) == [True] * 10
    await store(client, space, keys_of("more filler", BLOCKS))
    assert await load(client, space, keys) == ["redis"] * 10
    assert counter(server, "corrupt", tier="redis") == 1


async def test_what_redis_has_damaged_the_disk_delivers(nodes: Nodes, redis_url: str) -> None:
    """Two tiers side by side: the one makes good for the other."""
    server = await nodes.start(memory=SMALL_MEMORY, redis={"blocks_url": redis_url})
    client, space = await opened(nodes, server)
    keys = keys_of("chain", 10)
    await store(client, space, keys)
    await store(client, space, keys_of("filler", BLOCKS))
    assert await client.locate(space, keys) == ["redis"] * 10
    with sync_redis.from_url(redis_url) as redis:
        for key in redis.scan_iter(match="kvstore:b1:*"):
            redis.set(key, b"damaged")
    assert await load(client, space, keys) == ["disk"] * 10
    assert counter(server, "corrupt", tier="redis") == 10


async def test_a_block_that_arrives_damaged_is_not_stored(
    server: NodeServer, stub: "KVStoreAsyncStub"
) -> None:
    """Its digest is checked before it can be found; what stands before it is stored."""
    keys = keys_of("chain", 3)
    pieces = [piece_of(index, key) for index, key in enumerate(keys)]
    spoilt = bytearray(pieces[1].data)
    spoilt[100] ^= 1
    pieces[1].data = bytes(spoilt)
    replies = await writing(stub, requests_of(keys, pieces))
    assert list(replies[-1].done.held) == [0], "a block was kept without its parent"
    assert counter(server, "corrupt", tier="stream") == 1
    assert await locate(stub, keys) == ["memory", "", ""]
    assert_idle(server.node.tiers.memory)


@pytest.mark.parametrize("spoilt", [0, 1, 2])
async def test_damage_in_any_piece_of_a_block_is_caught(
    server: NodeServer, stub: "KVStoreAsyncStub", spoilt: int
) -> None:
    """The digest is taken piece by piece. The block after a damaged one is judged for itself."""
    keys = keys_of("chain", 1), keys_of("other", 1)
    for number, chain in enumerate(keys):
        [whole] = [piece_of(index, key) for index, key in enumerate(chain)]
        third = len(whole.data) // 3
        cuts = [whole.data[:third], whole.data[third:-third], whole.data[-third:]]
        if number == 0:
            cuts[spoilt] = bytes([cuts[spoilt][0] ^ 1]) + cuts[spoilt][1:]
        pieces = [pb.Piece(block=0, data=data) for data in cuts]
        pieces[0].header.CopyFrom(whole.header)
        replies = await writing(stub, requests_of(chain, pieces))
        assert list(replies[-1].done.held) == [0] * number
    assert counter(server, "corrupt", tier="stream") == 1
    assert await locate(stub, [*keys[0], *keys[1]]) == ["", "memory"]
    assert_idle(server.node.tiers.memory)


# A Redis that goes away.


async def test_redis_may_stop_in_the_middle_of_a_run(
    nodes: Nodes, private_redis: RedisServer
) -> None:
    """Every request goes on being answered; what the disk has is served; Redis is used again."""
    clock = ManualClock()
    server = await nodes.start(
        clock=clock, memory=SMALL_MEMORY, redis={"blocks_url": private_redis.url}
    )
    client, space = await opened(nodes, server)
    early, late = keys_of("early", BLOCKS), keys_of("late", BLOCKS)
    assert await store(client, space, early) == [True] * BLOCKS
    assert "redis" in await load(client, space, early)
    private_redis.kill()
    assert await store(client, space, late) == [True] * BLOCKS
    for keys in (early, late):
        assert (await client.match([space], keys, lease_ms=0)).blocks == BLOCKS
        tiers = await load(client, space, keys)
        assert set(tiers) <= {"memory", "disk", "redis"}, "what Redis had lent is still lent"
        assert tiers.count("redis") <= SMALL_MEMORY["capacity_bytes"] // 16 // space.block_bytes
    assert counter(server, "tier_errors", tier="redis", cause="error") >= 3
    serving = {tier.name: tier.serving for tier in (await client.status()).tiers}
    assert serving == {"memory": True, "redis": False, "disk": True}
    private_redis.start()
    await clock.advance(OPEN_S)
    assert (await client.match([space], early, lease_ms=0)).blocks == BLOCKS
    assert {tier.name: tier.serving for tier in (await client.status()).tiers}["redis"]
    assert dict(client.counters) == {}


async def test_a_busy_redis_is_not_a_broken_one(nodes: Nodes, private_redis: RedisServer) -> None:
    """More callers at once than there are connections: all of them are served, none is an error."""
    options: dict[str, Any] = {
        "memory": SMALL_MEMORY,
        "redis": {"blocks_url": private_redis.url},
        "disk": {"enabled": False},
    }
    server = await nodes.start(**options)
    client, space = await opened(nodes, server)
    keys = keys_of("chain", 4 * REDIS_CONNECTIONS)
    await store(client, space, keys)
    await nodes.stop(server)
    server = await nodes.start(**options)
    client, space = await opened(nodes, server)
    private_redis.freeze()
    callers = [asyncio.create_task(load(client, space, [key])) for key in keys]
    async with asyncio.timeout(60):
        while server.calls.admission.calls < len(keys):
            await settle()
    private_redis.thaw()
    assert await asyncio.gather(*callers) == [["redis"]] * len(keys)
    private_redis.kill()
    private_redis.start()
    absent = [asyncio.create_task(load(client, space, [key])) for key in keys_of("absent", 32)]
    assert await asyncio.gather(*absent) == [[None]] * 32
    for cause in ("error", "late", "open", "full"):
        assert counter(server, "tier_errors", tier="redis", cause=cause) == 0


async def test_oblivion_that_could_not_be_had_is_an_error(
    nodes: Nodes, private_redis: RedisServer
) -> None:
    """Who clears or discards while a tier is away is told so, and may repeat it."""
    server = await nodes.start(memory=SMALL_MEMORY, redis={"blocks_url": private_redis.url})
    client, space = await opened(nodes, server)
    keys = keys_of("chain", BLOCKS)
    await store(client, space, keys)
    private_redis.kill()
    with pytest.raises(Unavailable, match="redis"):
        await client.clear_space(space)
    with pytest.raises(Unavailable, match="redis"):
        await client.discard(space, keys)
    private_redis.start()
    await client.clear_space(space)
    assert await client.locate(space, keys) == [None] * BLOCKS
    assert await load(client, space, keys) == [None] * BLOCKS


async def test_a_node_starts_without_its_redis(nodes: Nodes) -> None:
    """A server that is not there is a tier that does not serve, not a reason to fail."""
    server = await nodes.start(
        memory=SMALL_MEMORY, redis={"blocks_url": "redis://127.0.0.1:1", "timeout_s": 30}
    )
    client, space = await opened(nodes, server)
    keys = keys_of("chain", BLOCKS)
    assert await store(client, space, keys) == [True] * BLOCKS
    assert set(await load(client, space, keys)) == {"memory", "disk"}


# Calls that no client would make.


def piece_of(index: int, key: bytes, **changes: Any) -> pb.Piece:
    """A whole block as one piece."""
    data = expected(SPACE, key)
    header = pb.BlockHeader(bytes=len(data), digest=digest_of(SPACE, key, data))
    fields: dict[str, Any] = {"block": index, "header": header, "data": data}
    return pb.Piece(**(fields | changes))


def requests_of(
    keys: Sequence[bytes], pieces: Iterable[pb.Piece], **begin: Any
) -> list[pb.WriteRequest]:
    """A write of one run: what begins it, then each piece in a message of its own."""
    first: dict[str, Any] = {"space_id": SPACE.space_id, "keys": pack_keys(keys)} | begin
    messages = [pb.WriteRequest(begin=pb.WriteBegin(**first))]
    return messages + [pb.WriteRequest(pieces=[piece]) for piece in pieces]


async def writing(
    stub: "KVStoreAsyncStub", requests: Iterable[pb.WriteRequest]
) -> list[pb.WriteReply]:
    """All replies to a write."""
    return [reply async for reply in stub.Write(iter(requests))]


async def locate(stub: "KVStoreAsyncStub", keys: Sequence[bytes]) -> list[str]:
    """Where the blocks of the space lie."""
    request = pb.LocateRequest(space_id=SPACE.space_id, keys=pack_keys(keys))
    return list((await stub.Locate(request)).tiers)


async def refused(call: Awaitable[object], code: grpc.StatusCode, word: str = "") -> None:
    """The call ends with this status, and its message names what is wrong."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    assert error.value.code() is code, error.value.details()
    assert word in (error.value.details() or "")


INVALID = grpc.StatusCode.INVALID_ARGUMENT
TWO = keys_of("two", 2)
HEADER = pb.BlockHeader(bytes=6000, digest=bytes(16))

BAD_WRITES: dict[str, tuple[list[pb.WriteRequest], str]] = {
    "nothing": ([], "begin"),
    "no begin": ([pb.WriteRequest(pieces=[piece_of(0, TWO[0])])], "begin"),
    "two begins": (requests_of(TWO, []) * 2, "begin"),
    "no keys": (requests_of([], []), "begin.keys"),
    "half a key": (requests_of([TWO[0][:31]], []), "begin.keys"),
    "half a parent": (requests_of(TWO, [], parent_key=b"p" * 31), "begin.parent_key"),
    "two parents": (requests_of(TWO, [], parent_key=b"p" * 64), "begin.parent_key"),
    "a short space": (requests_of(TWO, [], space_id=b"s" * 31), "space_id"),
    "a strange scope": (requests_of(TWO, [], scope="a b"), "scope"),
    "a strange parent scope": (
        requests_of(TWO, [], parent_key=b"p" * 32, parent_scope="../x"), "scope",
    ),
    "a long session": (
        requests_of(TWO, [], hint=pb.ReuseHint(session_id=b"s" * 33)), "hint.session_id",
    ),
    "data without a header": (requests_of(TWO, [pb.Piece(block=0, data=b"data")]), "pieces"),
    "a block too short": (
        requests_of(TWO, [piece_of(0, TWO[0], header=pb.BlockHeader(bytes=5999))]),
        "pieces.header.bytes",
    ),
    "a block too long": (
        requests_of(TWO, [piece_of(0, TWO[0], header=pb.BlockHeader(bytes=2**62))]),
        "pieces.header.bytes",
    ),
    "an empty block": (
        requests_of(TWO, [piece_of(0, TWO[0], header=pb.BlockHeader())]), "pieces.header.bytes",
    ),
    "a short digest": (
        requests_of(TWO, [piece_of(0, TWO[0], header=pb.BlockHeader(bytes=6000, digest=b"d"))]),
        "digest",
    ),
    "an index beyond the run": (requests_of(TWO, [piece_of(2, TWO[0])]), "pieces.block"),
    "an index far beyond": (requests_of(TWO, [piece_of(2**31, TWO[0])]), "pieces.block"),
    "the order reversed": (
        requests_of(TWO, [piece_of(1, TWO[1]), piece_of(0, TWO[0])]), "pieces.block",
    ),
    "a block twice": (requests_of(TWO, [piece_of(0, TWO[0])] * 2), "pieces.block"),
    "too much data": (requests_of(TWO, [piece_of(0, TWO[0], data=bytes(6001))]), "pieces.data"),
    "more data afterwards": (
        requests_of(TWO, [piece_of(0, TWO[0]), pb.Piece(block=0, data=b"more")]), "pieces",
    ),
    "another block in between": (
        requests_of(
            TWO,
            [pb.Piece(block=0, header=HEADER, data=bytes(100)), piece_of(1, TWO[1])],
        ),
        "pieces.data",
    ),
    "an early end": (
        requests_of(TWO, [pb.Piece(block=0, header=HEADER, data=bytes(5999))]), "pieces.data",
    ),
    "a header alone": (requests_of(TWO, [pb.Piece(block=0, header=HEADER)]), "pieces.data"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_WRITES)
async def test_a_bad_write_is_refused_and_leaves_nothing(
    server: NodeServer, stub: "KVStoreAsyncStub", name: str
) -> None:
    """The status names the field; no slot stays taken, and no half block can be found."""
    requests, word = BAD_WRITES[name]
    await refused(writing(stub, requests), INVALID, word)
    check_node(server)
    keys = keys_of("afterwards", 4)
    replies = await writing(stub, requests_of(keys, [piece_of(i, k) for i, k in enumerate(keys)]))
    assert list(replies[-1].done.held) == [0, 1, 2, 3]
    stored = {key for key, tier in zip(TWO, await locate(stub, TWO), strict=True) if tier}
    whole = {
        TWO[piece.block]
        for request in requests
        for piece in request.pieces
        if piece.block < 2 and piece.data == expected(SPACE, TWO[piece.block])
    }
    assert stored <= whole


async def ended(server: NodeServer, op: str) -> None:
    """Returns when the node has let go of the one call of a kind whose caller vanished."""
    await server._grpc.stop(None)
    counted = f'kvstore_requests_total{{op="{op}",'
    # gRPC leaves a stream that nobody reads to Python, which closes it a little later.
    async with asyncio.timeout(30):
        while not any(name.startswith(counted) for name in server.node.metrics.samples()):
            await settle()


async def test_a_writer_that_vanishes_leaves_no_slot(server: NodeServer, nodes: Nodes) -> None:
    """A stream that breaks off inside a block gives its slot back."""
    channel = raw_channel(server)
    stub = KVStoreStub(channel)
    await stub.OpenSpace(pb.OpenSpaceRequest(descriptor=descriptor_to_wire(descriptor_of())))
    call = stub.Write()
    for request in requests_of(TWO, [pb.Piece(block=0, header=HEADER, data=bytes(100))]):
        await call.write(request)
    assert isinstance(await call.read(), pb.WriteReply)
    await channel.close()
    await ended(server, "write")
    check_node(server)
    assert server.node.tiers.usage()[0].used_bytes == 0


async def test_a_reader_that_vanishes_leaves_no_pin(server: NodeServer, nodes: Nodes) -> None:
    """A read of much that nobody takes ends with its connection."""
    client, space = await opened(nodes, server)
    keys = keys_of("chain", 100)
    await store(client, space, keys)
    channel = raw_channel(server)
    call = KVStoreStub(channel).Read(
        pb.ReadRequest(space_id=space.space_id, keys=pack_keys(keys * 100))
    )
    assert isinstance(await call.read(), pb.ReadReply)
    await channel.close()
    await ended(server, "read")
    check_node(server)


async def test_a_message_that_is_too_large_is_refused(
    server: NodeServer, stub: "KVStoreAsyncStub", nodes: Nodes
) -> None:
    """gRPC ends the call before it is read; the node and the connection go on."""
    piece = pb.Piece(block=0, header=HEADER, data=bytes(MESSAGE_BYTES + 1))
    exhausted = grpc.StatusCode.RESOURCE_EXHAUSTED
    await refused(writing(stub, requests_of(TWO, [piece])), exhausted)
    request = pb.LocateRequest(space_id=SPACE.space_id, keys=bytes(MESSAGE_BYTES))
    await refused(stub.Locate(request), exhausted)
    check_node(server)
    client, space = await opened(nodes, server)
    assert await store(client, space, TWO) == [True] * 2


async def test_noise_is_refused(server: NodeServer, rng: random.Random, nodes: Nodes) -> None:
    """Random bytes, and valid messages with flipped bits, on every method: the node goes on."""
    client, space = await opened(nodes, server)
    keys = keys_of("chain", 8)
    await store(client, space, keys)
    good = requests_of(keys_of("noise", 1), [piece_of(0, keys_of("noise", 1)[0])])
    seeds = [
        good[0].SerializeToString() + good[1].SerializeToString(),
        pb.ReadRequest(space_id=space.space_id, keys=pack_keys(keys)).SerializeToString(),
        pb.MatchRequest(space_ids=[space.space_id], keys=pack_keys(keys)).SerializeToString(),
        pb.OpenSpaceRequest(descriptor=descriptor_to_wire(descriptor_of())).SerializeToString(),
    ]
    methods = ["OpenSpace", "Match", "Locate", "Read", "Write", "Release", "Hint", "Status"]
    failures = 0
    async with raw_channel(server) as channel:
        for _ in range(300):
            message = bytearray(rng.choice([*seeds, rng.randbytes(rng.randrange(200))]))
            for _ in range(rng.randrange(4)):
                if message:
                    message[rng.randrange(len(message))] ^= 1 << rng.randrange(8)
            call: Any = channel.stream_stream(f"/{SERVICE}/{rng.choice(methods)}")
            try:
                async for _ in call(iter([bytes(message)])):
                    pass
            except grpc.aio.AioRpcError:
                failures += 1
    assert failures > 50
    check_node(server)
    assert await load(client, space, keys) == ["memory"] * 8


async def test_an_unknown_space_must_be_opened_first(
    server: NodeServer, stub: "KVStoreAsyncStub"
) -> None:
    """Every call that names one says so, with the status that a client repeats on."""
    space_id, keys = bytes(32), pack_keys(TWO)
    unknown = grpc.StatusCode.FAILED_PRECONDITION
    await refused(stub.Match(pb.MatchRequest(space_ids=[space_id], keys=keys)), unknown, "space_id")
    await refused(stub.Locate(pb.LocateRequest(space_id=space_id, keys=keys)), unknown)
    await refused(stub.Read(pb.ReadRequest(space_id=space_id, keys=keys)).read(), unknown)
    await refused(writing(stub, requests_of(TWO, [], space_id=space_id)), unknown)
    await refused(stub.Hint(pb.HintRequest(space_id=space_id, keys=keys)), unknown)
    await refused(stub.Discard(pb.DiscardRequest(space_id=space_id, keys=keys)), unknown)


async def test_who_says_everything_at_once_hears_why_his_write_is_refused(
    server: NodeServer, stub: "KVStoreAsyncStub"
) -> None:
    """And not that the stream broke, because he was in the middle of a message."""
    pieces = [piece_of(index % 2, TWO[index % 2]) for index in range(8)]
    refusals = [
        (requests_of(TWO, pieces, space_id=bytes(32)), grpc.StatusCode.FAILED_PRECONDITION),
        (requests_of(TWO, pieces, space_id=bytes(31)), INVALID),
        (requests_of([bytes(33)], pieces), INVALID),
    ]
    for requests, code in refusals:
        for _ in range(10):
            await asyncio.gather(*(refused(writing(stub, requests), code) for _ in range(24)))


async def test_too_many_keys_are_refused(server: NodeServer, stub: "KVStoreAsyncStub") -> None:
    """65,536 are answered; one more is a mistake of the caller."""
    most, many = bytes(KEY_BYTES * MAX_KEYS), bytes(KEY_BYTES * (MAX_KEYS + 1))
    space = SPACE.space_id
    assert len((await stub.Locate(pb.LocateRequest(space_id=space, keys=most))).tiers) == MAX_KEYS
    assert (await stub.Match(pb.MatchRequest(space_ids=[space], keys=most))).matched_blocks == 0
    await refused(stub.Match(pb.MatchRequest(space_ids=[space], keys=many)), INVALID, "keys")
    await refused(stub.Locate(pb.LocateRequest(space_id=space, keys=many)), INVALID, "keys")
    await refused(stub.Read(pb.ReadRequest(space_id=space, keys=many)).read(), INVALID, "keys")
    await refused(stub.Hint(pb.HintRequest(space_id=space, keys=many)), INVALID, "keys")
    await refused(stub.Discard(pb.DiscardRequest(space_id=space, keys=many)), INVALID, "keys")
    begin = pb.WriteBegin(space_id=space, keys=many)
    await refused(writing(stub, [pb.WriteRequest(begin=begin)]), INVALID, "begin.keys")


async def test_to_ask_for_much_that_is_nowhere_costs_little(nodes: Nodes) -> None:
    """No buffer is made for a block that is not there: all misses come in one message."""
    server = await nodes.start(memory={"capacity_bytes": 4 << 20, "slab_bytes": 2 << 20})
    _, space = await opened(nodes, server, block_bytes=2 << 20)
    absent = keys_of("absent", 1000)
    tracemalloc.start()
    try:
        async with raw_channel(server) as channel:
            read = KVStoreStub(channel).Read(
                pb.ReadRequest(space_id=space.space_id, keys=pack_keys(absent))
            )
            replies = [[piece.header.bytes for piece in reply.pieces] async for reply in read]
        assert replies == [[0] * 1000]
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


async def test_other_limits_of_requests(server: NodeServer, stub: "KVStoreAsyncStub") -> None:
    """Each is named by its field."""
    space, keys = SPACE.space_id, pack_keys(TWO)
    bad = [
        (pb.MatchRequest(keys=keys), "space_ids"),
        (pb.MatchRequest(space_ids=[space] * 65, keys=keys), "space_ids"),
        (pb.MatchRequest(space_ids=[space[:31]], keys=keys), "space_id"),
        (pb.MatchRequest(space_ids=[space], keys=keys[:-1]), "keys"),
        (pb.MatchRequest(space_ids=[space], keys=keys, scopes=["s"] * 17), "scopes"),
        (pb.MatchRequest(space_ids=[space], keys=keys, scopes=["s" * 64]), "scope"),
        (pb.MatchRequest(space_ids=[space], keys=keys, scopes=["a/b"]), "scope"),
        (pb.MatchRequest(space_ids=[space], keys=keys, request_id=b"r" * 33), "request_id"),
        (pb.MatchRequest(space_ids=[space], keys=keys, held_blocks=3), "held_blocks"),
        (
            pb.MatchRequest(space_ids=[space] * 64, keys=bytes(KEY_BYTES * 1000), scopes=["s"] * 2),
            "keys × space_ids × scopes: at most 65536 in one match, got 128000",
        ),
    ]
    for request, word in bad:
        await refused(stub.Match(request), INVALID, word)
    wide = descriptor_of(block_bytes=(1 << 16) + 1)
    opening = pb.OpenSpaceRequest(descriptor=descriptor_to_wire(wide))
    await refused(stub.OpenSpace(opening), INVALID, "descriptor.block_bytes")
    await refused(stub.OpenSpace(pb.OpenSpaceRequest()), INVALID, "descriptor.")


async def test_calls_beyond_the_limit_are_shed(nodes: Nodes) -> None:
    """A node that is busy says so at once, and serves again when a call has ended."""
    limits = {"max_concurrent_calls": 3, "max_data_calls": 1, "max_watchers": 1}
    server = await nodes.start(server=limits)
    watcher = await nodes.connect(server).watch()
    async with raw_channel(server) as channel:
        stub, health = KVStoreStub(channel), health_pb2_grpc.HealthStub(channel)
        listening = health.Watch(health_pb2.HealthCheckRequest())
        await listening.read()
        silent = await last_place(stub)
        silent.cancel()
        await served_again(stub)
        listening.cancel()
    await watcher.aclose()


async def last_place(stub: "KVStoreAsyncStub") -> Any:
    """A call that takes the last place of a node, which has shed another one by then.

    It may itself be shed, by a place that an ended call has not left yet, and is made again.
    """
    silent = stub.Write()
    while True:
        try:
            await stub.Status(pb.StatusRequest())
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            return silent
        if silent.done():
            silent = stub.Write()


async def served_again(stub: "KVStoreAsyncStub") -> None:
    """Returns once the node has a place for one more call."""
    while True:
        try:
            await stub.Status(pb.StatusRequest())
        except grpc.aio.AioRpcError:
            continue
        return


async def test_watchers_leave_room_for_everybody_else(nodes: Nodes) -> None:
    """Of calls that never end there are few; one too many is told which limit it met."""
    limits = {"max_concurrent_calls": 8, "max_data_calls": 1, "max_watchers": 3}
    server = await nodes.start(server=limits)
    watchers = [await nodes.connect(server).watch() for _ in range(3)]
    async with raw_channel(server) as channel:
        stub, health = KVStoreStub(channel), health_pb2_grpc.HealthStub(channel)
        exhausted = grpc.StatusCode.RESOURCE_EXHAUSTED
        await refused(stub.Watch(pb.WatchRequest()).read(), exhausted, "server.max_watchers")
        ask = health_pb2.HealthCheckRequest()
        listening = [health.Watch(ask) for _ in range(3)]
        for call in listening:
            assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING
        await refused(health.Watch(ask).read(), exhausted, "server.max_watchers")
        assert (await stub.Status(pb.StatusRequest())).node_id == server.node.node_id
        for call in listening:
            call.cancel()
    for watcher in watchers:
        await watcher.aclose()


async def test_one_connection_has_few_watchers(nodes: Nodes) -> None:
    """What one engine may watch is bounded for itself."""
    server = await nodes.start()
    client = nodes.connect(server)
    watchers = [await client.watch() for _ in range(WATCHERS_PER_CLIENT)]
    with pytest.raises(ResourceExhausted, match="of this connection"):
        await anext(await client.watch())
    async with raw_channel(server) as channel:
        another = KVStoreStub(channel).Watch(pb.WatchRequest())
        assert await another.initial_metadata() is not None
        another.cancel()
    for watcher in watchers:
        await watcher.aclose()


async def test_a_write_that_says_nothing_loses_its_place(stub: "KVStoreAsyncStub") -> None:
    """Nobody holds one of the places for calls by opening a stream and keeping silent."""
    await refused(stub.Write(timeout=0.4).read(), INVALID, "begin: it did not come within 0.2 s")


async def test_more_segments_than_files_may_be_open_are_refused(nodes: Nodes) -> None:
    """At the start, with the fix: later on every store would fail, and every connection."""
    with pytest.raises(ConfigError, match=r"disk\.segment_bytes: .* open files.*ulimit -n"):
        await nodes.start(disk={"capacity_bytes": 1 << 50, "segment_bytes": 1 << 18})


# Tenants.


def tokens_file(home: Path, *tenants: str) -> Path:
    """A tokens file in which each tenant's token is his name."""
    path = home / "tokens.toml"
    entries = [f'[tenants.{name}]\ntoken_sha256 = ["{token_hash(name)}"]\n' for name in tenants]
    path.write_text("\n".join(entries))
    return path


async def test_who_brings_no_token_gets_nothing(nodes: Nodes, tmp_path: Path) -> None:
    """Every method asks for one; a wrong one, or another scheme, is none."""
    server = await nodes.start(auth={"tokens_file": tokens_file(tmp_path, "acme")})
    space, keys = SPACE.space_id, pack_keys(TWO)
    refusals = (
        (), call_metadata("wrong"), call_metadata("acme "), (("authorization", "Basic acme"),),
        (("authorization", "acme"),), (("authorization", "Bearer"),), (("authorization", ""),),
    )  # fmt: skip
    async with raw_channel(server) as channel:
        stub = KVStoreStub(channel)
        descriptor = descriptor_to_wire(descriptor_of())
        calls: list[Callable[[Any], Awaitable[object]]] = [
            lambda who: stub.OpenSpace(pb.OpenSpaceRequest(descriptor=descriptor), metadata=who),
            lambda who: stub.Match(pb.MatchRequest(space_ids=[space], keys=keys), metadata=who),
            lambda who: stub.Locate(pb.LocateRequest(space_id=space, keys=keys), metadata=who),
            lambda who: stub.Read(pb.ReadRequest(space_id=space, keys=keys), metadata=who).read(),
            lambda who: stub.Write(iter(requests_of(TWO, [])), metadata=who).read(),
            lambda who: stub.Release(pb.ReleaseRequest(), metadata=who),
            lambda who: stub.Hint(pb.HintRequest(space_id=space, keys=keys), metadata=who),
            lambda who: stub.Discard(pb.DiscardRequest(space_id=space, keys=keys), metadata=who),
            lambda who: stub.ClearSpace(pb.ClearSpaceRequest(space_id=space), metadata=who),
            lambda who: stub.Status(pb.StatusRequest(), metadata=who),
            lambda who: stub.Watch(pb.WatchRequest(), metadata=who).read(),
            lambda who: stub.Scrub(pb.ScrubRequest(), metadata=who).read(),
            lambda who: stub.Attach(pb.AttachRequest(), metadata=who),
            lambda who: stub.Connect(pb.ConnectRequest(), metadata=who),
        ]
        assert len(calls) == len(pb.DESCRIPTOR.services_by_name["KVStore"].methods)
        for call in calls:
            for who in refusals if call is calls[0] else refusals[:2]:
                await refused(call(who), grpc.StatusCode.UNAUTHENTICATED, "authorization")
        await calls[0](call_metadata("acme"))
    with pytest.raises(Unauthenticated):
        await nodes.connect(server, token="wrong").status()


async def test_tenants_never_meet(nodes: Nodes, tmp_path: Path, redis_url: str) -> None:
    """Equal keys of two tenants are two blocks, in memory, Redis and disk, under names apart."""
    server = await nodes.start(
        memory=SMALL_MEMORY,
        redis={"blocks_url": redis_url},
        auth={"tokens_file": tokens_file(tmp_path, "acme", "rival")},
    )
    acme, rival = nodes.connect(server, token="acme"), nodes.connect(server, token="rival")
    space = await acme.open_space(descriptor_of())
    keys = keys_of("chain", BLOCKS)
    assert await store(acme, space, keys) == [True] * BLOCKS
    assert await rival.locate(space, keys) == [None] * BLOCKS
    assert (await rival.match([space], keys)).blocks == 0
    assert await load(rival, space, keys) == [None] * BLOCKS
    assert await rival.discard(space, keys) == 0
    assert await rival.clear_space(space) == 0
    match = await acme.match([space], keys, lease_ms=60_000)
    await rival.release(match)
    assert (await acme.status()).leases == 1
    assert await load(rival, space, keys, lease=match) == [None] * BLOCKS
    assert await store(rival, space, keys[:20]) == [True] * 20
    await store(rival, space, keys_of("filler", BLOCKS))
    await store(acme, space, keys_of("filler", BLOCKS))
    tags = {key.split(b":")[2] for key in redis_keys(redis_url)}
    assert len(tags) == 2
    index = leaf(server.node.tiers, DiskTier)._index
    assert {entry.tag.hex().encode() for entry in index._entries.values()} == tags
    assert await rival.clear_space(space) > 0
    assert (await rival.match([space], keys)).blocks == 0
    assert all(await load(acme, space, keys))
    await acme.release(match)


def redis_keys(url: str) -> list[bytes]:
    """All keys of blocks in Redis."""
    with sync_redis.from_url(url) as redis:
        return list(redis.scan_iter(match="kvstore:b1:*", count=1000))


async def test_a_tenant_keeps_his_blocks_over_restarts_and_no_other_gets_them(
    nodes: Nodes, tmp_path: Path
) -> None:
    """Names derive from tenant and secret: another secret, or another tenant, finds nothing."""
    path = tokens_file(tmp_path, "acme", "rival")
    keys = keys_of("chain", 10)
    server = await nodes.start(auth={"tokens_file": path})
    client = nodes.connect(server, token="acme")
    await store(client, await client.open_space(descriptor_of()), keys)
    await nodes.stop(server)
    server = await nodes.start(auth={"tokens_file": path})
    for tenant, blocks in (("acme", 10), ("rival", 0)):
        client = nodes.connect(server, token=tenant)
        space = await client.open_space(descriptor_of())
        assert (await client.match([space], keys, lease_ms=0)).blocks == blocks
    await nodes.stop(server)
    other = tmp_path / "other secret"
    other.write_bytes(bytes(32))
    server = await nodes.start(auth={"tokens_file": path}, cluster={"secret_file": other})
    client = nodes.connect(server, token="acme")
    space = await client.open_space(descriptor_of())
    assert (await client.match([space], keys, lease_ms=0)).blocks == 0


async def test_scopes_are_apart_and_searched_in_order(nodes: Nodes, server: NodeServer) -> None:
    """A block is found in the scopes that the call names, the first of them first."""
    client, space = await opened(nodes, server)
    keys = keys_of("chain", 6)
    await store(client, space, keys[:4], scope="team")
    await store(client, space, keys[4:], parent_key=keys[3], parent_scope="team")
    for scopes, blocks in ([], 0), (["team"], 4), (["", "team"], 6), (["other"], 0):
        match = await client.match([space], keys, scopes=scopes, lease_ms=0)
        assert match.blocks == blocks, scopes
    assert await load(client, space, keys, scopes=["team", ""]) == ["memory"] * 6
    assert await client.clear_space(space, "team") == 6, "descendants are of no use and go along"
    assert (await client.match([space], keys, scopes=["team", ""], lease_ms=0)).blocks == 0
    assert await load(client, space, keys, scopes=["team", ""]) == [None] * 6


async def test_a_device_that_hangs_does_not_hold_up_the_end(nodes: Nodes) -> None:
    """Its threads cannot be ended: they are left behind, and who started the node hears of it."""
    server = await nodes.start(server={"drain_timeout_s": 0.1, "metrics_listen": "127.0.0.1:0"})
    answer = threading.Event()
    hanging = asyncio.create_task(server._runner.run(answer.wait))
    await settle()
    async with asyncio.timeout(30):
        await nodes.stop(server)
    assert server.hangs
    with pytest.raises(OSError, match="refused"):
        await asyncio.to_thread(scrape, server.metrics_endpoint)
    answer.set()
    assert await hanging


async def test_what_fails_in_a_drain_keeps_nothing_open(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is flushed; directory, threads and ports are let go of all the same."""
    server = await nodes.start(server={"metrics_listen": "127.0.0.1:0"})
    client, space = await opened(nodes, server)
    keys = keys_of("chain", 6)
    await store(client, space, keys)

    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(server.calls, "drain", fail)
    with pytest.raises(ZeroDivisionError):
        await nodes.stop(server)
    assert not server.hangs
    with pytest.raises(Unavailable):
        await client.status()
    with pytest.raises(OSError, match="refused"):
        await asyncio.to_thread(scrape, server.metrics_endpoint)
    server = await nodes.start()
    client, space = await opened(nodes, server)
    assert await load(client, space, keys) == ["disk"] * 6


# Forgetting.


async def test_a_cleared_space_is_gone_everywhere_and_for_good(
    nodes: Nodes, redis_url: str
) -> None:
    """In memory, Redis and disk, also after a restart; other spaces stay."""
    options: dict[str, Any] = {"memory": SMALL_MEMORY, "redis": {"blocks_url": redis_url}}
    server = await nodes.start(**options)
    client, space = await opened(nodes, server)
    other = await client.open_space(descriptor_of(numerics="other"))
    keys = keys_of("chain", BLOCKS)
    for each in (space, other):
        await store(client, each, keys)
    assert await client.clear_space(space) >= BLOCKS
    for _ in range(2):
        assert await client.locate(space, keys) == [None] * BLOCKS
        assert await load(client, space, keys) == [None] * BLOCKS
        assert (await client.match([other], keys, lease_ms=0)).blocks == BLOCKS
        await nodes.stop(server)
        server = await nodes.start(**options)
        client = nodes.connect(server)
    assert await store(client, space, keys) == [True] * BLOCKS
    await nodes.stop(server)
    server = await nodes.start(**options)
    async with raw_channel(server) as channel:
        request = pb.ClearSpaceRequest(space_id=space.space_id)
        reply = await KVStoreStub(channel).ClearSpace(request)
    assert reply.cleared_blocks >= BLOCKS, "a space need not be open to be cleared"


async def test_discarded_blocks_are_gone_everywhere(nodes: Nodes, redis_url: str) -> None:
    """Single blocks leave every tier; their ancestors stay."""
    server = await nodes.start(memory=SMALL_MEMORY, redis={"blocks_url": redis_url})
    client, space = await opened(nodes, server)
    keys = keys_of("chain", BLOCKS)
    await store(client, space, keys)
    assert await client.discard(space, keys[30:]) >= 10
    assert (await client.match([space], keys, lease_ms=0)).blocks == 30
    assert await load(client, space, keys[30:]) == [None] * 10
    assert await client.discard(space, keys[30:]) == 0


# What a node says of itself.


async def test_health_says_serving_until_the_node_drains(nodes: Nodes) -> None:
    """A watcher of the standard health service hears of both, for the node and its service."""
    server = await nodes.start(server={"drain_timeout_s": 0.5})
    client = nodes.connect(server)
    assert await client.health()
    async with raw_channel(server) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        calls = [stub.Watch(health_pb2.HealthCheckRequest(service=name)) for name in ("", SERVICE)]
        for call in calls:
            assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING
        events = await client.watch()
        stopping = asyncio.create_task(nodes.stop(server))
        for call in calls:
            assert (await call.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert isinstance(await anext(events), pb.Draining)
        await stopping
    assert not await client.health()
    with pytest.raises(Unavailable):
        await client.status()


async def test_a_watcher_hears_of_sealed_segments(nodes: Nodes) -> None:
    """What is on the device is announced, with its blocks and bytes."""
    server = await nodes.start(memory=SMALL_MEMORY, disk={"sync_after_s": 0.05})
    client, space = await opened(nodes, server)
    watchers = [await client.watch() for _ in range(2)]
    await store(client, space, keys_of("chain", BLOCKS))
    for watcher in watchers:
        event = await anext(watcher)
        assert isinstance(event, pb.SegmentSealed)
        assert event.segment_id == 1
        assert 0 < event.blocks <= BLOCKS
        assert event.bytes == event.blocks * space.block_bytes
        await watcher.aclose()


async def test_status_adds_up(nodes: Nodes, redis_url: str) -> None:
    """Tiers, spaces, leases and counters are those of the node."""
    server = await nodes.start(memory=SMALL_MEMORY, redis={"blocks_url": redis_url})
    client, space = await opened(nodes, server)
    keys = keys_of("chain", BLOCKS)
    await store(client, space, keys)
    match = await client.match([space], keys[:4], lease_ms=60_000)
    status = await client.status()
    assert (status.node_id, status.draining, status.spaces, status.leases) == ("node", False, 1, 1)
    assert status.leased_bytes == 4 * server.node.tiers.memory.share_bytes(space.block_bytes)
    tiers = {tier.name: tier for tier in status.tiers}
    assert set(tiers) == {"memory", "redis", "disk"}
    assert tiers["memory"].capacity_bytes == SMALL_MEMORY["capacity_bytes"]
    assert tiers["memory"].blocks + tiers["disk"].blocks >= BLOCKS
    for tier in tiers.values():
        assert not tier.capacity_bytes or tier.used_bytes <= tier.capacity_bytes
    assert status.counters['kvstore_tier_blocks{tier="memory"}'] == tiers["memory"].blocks
    assert status.counters["kvstore_asked_blocks_total"] == 4
    await client.release(match)


async def test_metrics_are_served_and_add_up(nodes: Nodes) -> None:
    """Every declared metric is exposed over HTTP; hits and misses are what was asked."""
    server = await nodes.start(
        memory=SMALL_MEMORY, server={"metrics_listen": "127.0.0.1:0"}, bulk={"enabled": False}
    )
    client, space = await opened(nodes, server)
    keys, absent = keys_of("chain", BLOCKS), keys_of("absent", 7)
    await store(client, space, keys)
    tiers = await load(client, space, [*keys, *absent])
    await client.match([space], [*keys, *absent], lease_ms=0)
    samples = await asyncio.to_thread(scrape, server.metrics_endpoint)
    declared = {family.name for family in server.node.metrics.registry.collect()}
    exposed = {name.partition("{")[0] for name in samples}
    assert len(declared) > 15
    for name in declared:
        assert any(sample.startswith(name) for sample in exposed | _headers(server)), name

    def operations(op: str, result: str) -> float:
        name = f'kvstore_tier_operations_total{{op="{op}",result="{result}",tier="disk"}}'
        return samples.get(name, 0.0)

    assert operations("load", "hit") == tiers.count("disk") > 0
    assert operations("load", "miss") == 0, "what is nowhere is asked of no tier"
    assert tiers.count(None) == 7
    demoted = samples['kvstore_evicted_blocks_total{fate="demoted"}']
    assert operations("store", "held") >= demoted > 0
    assert operations("store", "refused") == 0
    loaded = samples['kvstore_tier_bytes_total{op="load",tier="disk"}']
    assert loaded == tiers.count("disk") * space.block_bytes
    assert samples["kvstore_asked_blocks_total"] == BLOCKS + 7
    assert samples["kvstore_matched_blocks_total"] == BLOCKS
    assert samples['kvstore_requests_total{op="read",status="ok"}'] == 1
    assert samples['kvstore_tier_used_bytes{tier="memory"}'] <= SMALL_MEMORY["capacity_bytes"]


def _headers(server: NodeServer) -> set[str]:
    with urllib.request.urlopen(f"http://{server.metrics_endpoint}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    return {line.split()[2] for line in lines if line.startswith("# TYPE")}


def scrape(endpoint: str) -> dict[str, float]:
    """The samples that Prometheus would read, by name and labels."""
    with urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


async def test_reflection_is_off_unless_asked_for(nodes: Nodes) -> None:
    """Nobody is told the methods of a node by the node itself, by default."""
    method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    for reflection in (False, True):
        server = await nodes.start(server={"reflection": reflection})
        async with raw_channel(server) as channel:
            reflect: Any = channel.stream_stream(method)
            call = reflect(iter([b"\x3a\x00"]))
            if reflection:
                assert SERVICE.encode() in await call.read()
            else:
                await refused(call.read(), grpc.StatusCode.UNIMPLEMENTED)
        await nodes.stop(server)


async def test_nodes_find_each_other_in_the_directory(nodes: Nodes, redis_url: str) -> None:
    """Both are listed with their endpoints; who stops is no longer."""
    options = {"directory_url": redis_url}
    disks = [{"path": nodes.settings().disk.path / name} for name in ("one", "two")]
    one = await nodes.start(redis=options, disk=disks[0], cluster={"node_id": "one"})
    client = nodes.connect(one)
    two = await nodes.start(redis=options, disk=disks[1], cluster={"node_id": "two"})
    listed: dict[str, str] = {}
    async with asyncio.timeout(60):
        while len(listed) < 2:  # Each announces itself on its own.
            listed = {node.node_id: node.endpoint for node in (await client.status()).nodes}
    assert listed == {"one": one.endpoint, "two": two.endpoint}
    await nodes.stop(two)
    assert [node.node_id for node in (await client.status()).nodes] == ["one"]


# Starts that fail.


@pytest.mark.parametrize("setting", ["listen", "metrics_listen"])
async def test_a_port_that_is_taken_is_named(nodes: Nodes, setting: str) -> None:
    """The message names the setting; afterwards the same directory serves a better start."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"server\.{setting}: {address}"):
            await nodes.start(server={setting: address})
    server = await nodes.start()
    client, space = await opened(nodes, server)
    assert await store(client, space, TWO) == [True] * 2

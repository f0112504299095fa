"""Clients that move blocks over connections of their own, and what may become of those."""

import asyncio
import random
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstore.api.asking import host_of
from kvstore.api.bulk import CHUNK_BYTES, GREETING, WELCOME, BulkSocket, Hangup, Parcel
from kvstore.api.digest import DIGEST_BYTES
from kvstore.api.errors import ConfigError, KvstoreError, ResourceExhausted
from kvstore.api.local import LENGTH, TICKET_BYTES
from kvstore.api.tier import Loaded
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.wire import pack_keys
from kvstore.bulk_listener import MAX_OF_ONE, BulkListener
from kvstore.server import NodeServer
from kvstore.tenants import token_hash
from kvstore_client import AsyncClient, Client, Space
from kvstore_client.budgets import Deadline
from tests.sim.blocks import keys_of
from tests.sim.nodes import (
    PATIENT,
    Nodes,
    check_node,
    counter,
    descriptor_of,
    digest_of,
    expected,
    load,
    store,
)
from tests.sim.proxy import Proxy
from tests.sim.rig import quiet

BLOCKS = 40
LARGE = 2 * CHUNK_BYTES + 12345
LARGE_NODE: dict[str, Any] = {"memory": {"capacity_bytes": 96 << 20, "slab_bytes": 8 << 20}}
"""Room for a few large blocks; more of them than any buffer of a socket holds."""


def bulk(server: NodeServer) -> BulkListener:
    assert server._bulk is not None
    return server._bulk


async def connect(nodes: Nodes, server: NodeServer, token: str | None = None) -> AsyncClient:
    """A client of the bulk path."""
    client = AsyncClient(server.endpoint, token=token, budgets=PATIENT, shared_memory=False)
    nodes._clients.append(client)
    await client.open_space(descriptor_of())
    assert client._bulk.connections == 1
    return client


async def served(server: NodeServer, op: str, status: str = "ok") -> float:
    """How many calls of a kind ended so; those that have their answer are over by then."""
    assert await server.calls.finished(60.0)
    return counter(server, "requests", op=op, status=status)


async def idle(server: NodeServer) -> None:
    """Checks every invariant, and that nothing is held."""
    assert await server.calls.finished(60.0)
    await quiet(server.node.tiers)
    check_node(server)
    assert server.calls.admission.inflight_bytes == 0
    server.calls.admission.check()


async def hung_up(server: NodeServer) -> None:
    """Returns when the node has noticed that all clients have hung up."""
    while serving := set(bulk(server)._serving):
        await asyncio.wait(serving)


class Talk:
    """A conversation with a node, without any of a client's care."""

    def __init__(self, wire: BulkSocket) -> None:
        self.wire = wire

    async def say(self, request: pb.BulkRequest) -> None:
        await asyncio.to_thread(self.wire.send_message, request.SerializeToString())

    async def hear(self) -> pb.BulkReply:
        packed = await asyncio.to_thread(self.wire.receive_message)
        return pb.BulkReply.FromString(packed)

    async def ask(self, request: pb.BulkRequest) -> pb.BulkReply:
        await self.say(request)
        return await self.hear()

    async def send(self, space: Space, keys: list[bytes], data: list[bytes]) -> None:
        parcels = [
            Parcel(space.space_id, key, memoryview(block))
            for key, block in zip(keys, data, strict=True)
        ]
        await asyncio.to_thread(self.wire.send_blocks, parcels)

    async def send_bytes(self, data: bytes) -> None:
        await asyncio.to_thread(self.wire.send_bytes, data)

    async def receive(self, space: Space, keys: list[bytes]) -> list[bytes]:
        """The digests of blocks, and their bytes are looked at."""
        buffers = [bytearray(space.block_bytes) for _ in keys]
        parcels = [
            Parcel(space.space_id, key, memoryview(buffer))
            for key, buffer in zip(keys, buffers, strict=True)
        ]
        digests = await asyncio.to_thread(lambda: list(self.wire.receive_blocks(parcels)))
        for key, buffer in zip(keys, buffers, strict=True):
            assert buffer == expected(space, key)
        return digests

    async def is_over(self) -> bool:
        """Whether the node has hung up; what it still had to say is heard out."""
        with suppress(Hangup):
            await asyncio.to_thread(self.wire.skip_block, 1 << 40)
        return True


def dial(server: NodeServer, shown: bytes) -> tuple[socket.socket, bytes]:
    """A connection on which something was shown, and the first byte of the answer."""
    connection = socket.create_connection(("127.0.0.1", bulk(server).port), timeout=30)
    try:
        connection.sendall(shown)
        return connection, connection.recv(1)
    except OSError:
        return connection, b""


@asynccontextmanager
async def talk(
    server: NodeServer, authorization: str | None = None, peer: str = "test", ticket: bytes = b""
) -> AsyncIterator[Talk]:
    """A connection that the node has let in."""
    ticket = ticket or bulk(server).invite(authorization, peer).ticket
    connection, answer = await asyncio.to_thread(dial, server, GREETING + ticket)
    assert answer == WELCOME
    wire = BulkSocket(connection)
    try:
        yield Talk(wire)
    finally:
        wire.close()


def write_of(space: Space, keys: list[bytes], budget_ms: int = 0) -> pb.BulkRequest:
    begin = pb.WriteBegin(space_id=space.space_id, keys=pack_keys(keys))
    return pb.BulkRequest(budget_ms=budget_ms, write=begin)


def read_of(space: Space, keys: list[bytes], budget_ms: int = 0) -> pb.BulkRequest:
    request = pb.ReadRequest(space_id=space.space_id, keys=pack_keys(keys))
    return pb.BulkRequest(budget_ms=budget_ms, read=pb.BulkRead(request=request))


# Round trips.


@pytest.mark.parametrize(
    ("block_bytes", "count"),
    [(1, 700), (6000, BLOCKS), (CHUNK_BYTES, 5), (CHUNK_BYTES + 1, 5), (LARGE, 9)],
)
async def test_blocks_move_without_the_stream(nodes: Nodes, block_bytes: int, count: int) -> None:
    """Tiny ones in groups, large ones in chunks, each of them with its digest."""
    server = await nodes.start(**LARGE_NODE)
    writer, reader = await connect(nodes, server), await connect(nodes, server)
    space = await writer.open_space(descriptor_of(block_bytes))
    keys = keys_of("chat", count)
    assert await store(writer, space, keys) == [True] * count
    match = await reader.match([space], keys)
    assert match.blocks == count
    assert await load(reader, space, keys, lease=match) == ["memory"] * count
    await reader.release(match)
    assert await served(server, "bulk_write") == 1
    assert await served(server, "bulk_read") == 1
    for method in ("read", "write", "local_acquire", "local_reserve"):
        assert await served(server, method) == 0
    assert not writer.counters
    assert not reader.counters
    assert bulk(server)._connections.total() == 2
    await idle(server)


async def test_the_other_paths_read_what_came_this_way(nodes: Nodes) -> None:
    """And the other way round: there is one memory."""
    server = await nodes.start()
    far = await connect(nodes, server)
    near = nodes.connect(server)
    stream = AsyncClient(server.endpoint, budgets=PATIENT, shared_memory=False, bulk=False)
    nodes._clients.append(stream)
    space = await far.open_space(descriptor_of())
    for number, writer in enumerate((far, near, stream)):
        await writer.open_space(descriptor_of())
        keys = keys_of(f"chat {number}", 8)
        assert await store(writer, space, keys) == [True] * 8
        for reader in (far, near, stream):
            assert await load(reader, space, keys) == ["memory"] * 8
    assert stream._bulk.connections == 0
    assert await served(server, "bulk_write") == 1
    assert await served(server, "bulk_read") == 3


async def test_what_memory_cannot_keep_comes_this_way_too(nodes: Nodes) -> None:
    """Without a lease the chain is not known: cold blocks are lent, and nothing is streamed."""
    server = await nodes.start()
    client = await connect(nodes, server)
    space = await client.open_space(descriptor_of())
    chains = [keys_of(f"chat {number}", BLOCKS) for number in range(8)]
    for keys in chains:
        assert await store(client, space, keys) == [True] * BLOCKS
    came = [tier for keys in chains for tier in await load(client, space, keys)]
    assert None not in came
    assert "disk" in came
    assert await load(client, space, keys_of("nowhere", 3)) == [None] * 3
    assert await served(server, "read") == 0
    assert not client.counters


async def test_a_prefix_ends_at_the_first_gap(nodes: Nodes) -> None:
    """Nothing is sent of what lies behind it, and none of it counts."""
    server = await nodes.start()
    client = await connect(nodes, server)
    space = await client.open_space(descriptor_of())
    keys = keys_of("chat", 12)
    await store(client, space, keys)
    gap = [*keys[:5], *keys_of("nowhere", 1), *keys[5:]]
    buffers = [bytearray(space.block_bytes) for _ in gap]
    assert len(await client.load(space, gap, buffers)) == 5
    assert not any(any(buffer) for buffer in buffers[5:])
    assert [tier is None for tier in await load(client, space, gap)] == [False] * 5 + [True] + (
        [False] * 7
    )
    assert not client.counters


async def test_calls_beside_each_other_have_connections_of_their_own(nodes: Nodes) -> None:
    """Until there are enough of them the stream helps out, so nobody waits."""
    server = await nodes.start()
    client = await connect(nodes, server)
    space = await client.open_space(descriptor_of())
    chains = [keys_of(f"chat {number}", 20) for number in range(6)]
    while client._bulk.connections < 4:
        stored = await asyncio.gather(*(store(client, space, keys) for keys in chains))
        assert stored == [[True] * 20] * 6
    loads = await asyncio.gather(*(load(client, space, keys) for keys in chains))
    assert None not in [tier for tiers in loads for tier in tiers]
    assert client._bulk.connections == 4
    assert not client.counters
    await idle(server)


def test_a_client_for_threads_goes_this_way(tmp_path: Path) -> None:
    """As far as it may; whoever may not gets his blocks by the stream."""

    async def serve() -> float:
        nodes = Nodes(tmp_path)
        server = await nodes.start()

        def work(bulk: bool) -> None:
            with Client(server.endpoint, budgets=PATIENT, shared_memory=False, bulk=bulk) as client:
                space = client.open_space(descriptor_of())
                keys = keys_of(f"chat {bulk}", 3)
                blocks = [expected(space, key) for key in keys]
                assert client.store(space, keys, blocks) == [True] * 3
                buffers = [bytearray(space.block_bytes) for _ in keys]
                assert len(client.load(space, keys, buffers)) == 3
                assert buffers == blocks

        try:
            for allowed in (True, False):
                await asyncio.to_thread(work, allowed)
            return await served(server, "bulk_read")
        finally:
            await nodes.finish()

    assert asyncio.run(serve()) == 1.0


# Who writes first, and damage.


async def test_a_later_writer_is_told_present_before_bytes_move(nodes: Nodes) -> None:
    """And of two that began together the first whole copy stays."""
    server = await nodes.start()
    client = await connect(nodes, server)
    space = await client.open_space(descriptor_of())
    keys = keys_of("chat", 4)
    others = [bytes([number]) * space.block_bytes for number in range(4)]
    async with talk(server) as first, talk(server) as second:
        for each in (first, second):
            assert list((await each.ask(write_of(space, keys))).offer.wanted) == [0, 1, 2, 3]
        await first.send(space, keys, [expected(space, key) for key in keys])
        assert list((await first.hear()).done.held) == [0, 1, 2, 3]
        await second.send(space, keys, others)
        assert list((await second.hear()).done.held) == [0, 1, 2, 3]
        reply = await second.ask(write_of(space, keys))
        assert list(reply.offer.wanted) == []
        assert list((await second.hear()).done.held) == [0, 1, 2, 3]
    assert await load(client, space, keys) == ["memory"] * 4
    await hung_up_but(server, 1)
    await idle(server)


async def hung_up_but(server: NodeServer, left: int) -> None:
    """Returns when only so many connections are left."""
    while len(serving := set(bulk(server)._serving)) > left:
        await asyncio.wait(serving, return_when=asyncio.FIRST_COMPLETED)


@pytest.mark.parametrize("block_bytes", [6000, CHUNK_BYTES + 5])
async def test_what_arrives_damaged_is_not_stored(nodes: Nodes, block_bytes: int) -> None:
    """Nor what descends from it; the connection goes on."""
    server = await nodes.start(**LARGE_NODE)
    client = await connect(nodes, server)
    space = await client.open_space(descriptor_of(block_bytes))
    keys = keys_of("chat", 4)
    data = [expected(space, key) for key in keys]
    async with talk(server) as one:
        await one.ask(write_of(space, keys))
        for number, (key, block) in enumerate(zip(keys, data, strict=True)):
            sent = bytearray(block)
            sent[-1] ^= number == 2
            await one.send_bytes(bytes(sent) + digest_of(space, key, block))
        assert list((await one.hear()).done.held) == [0, 1]
        assert counter(server, "corrupt", tier="bulk") == 1
        assert list((await one.ask(write_of(space, keys))).offer.wanted) == [2, 3]
        await one.send(space, keys[2:], data[2:])
        assert list((await one.hear()).done.held) == [0, 1, 2, 3]
    assert await load(client, space, keys) == ["memory"] * 4
    await idle(server)


async def test_what_comes_back_damaged_is_a_miss(nodes: Nodes) -> None:
    """A bit that flipped in the node's memory: the client sees it, and counts it."""
    server = await nodes.start()
    client = await connect(nodes, server)
    space = await client.open_space(descriptor_of())
    keys = keys_of("chat", 5)
    await store(client, space, keys)
    [slot] = [slot for slot in server.node.tiers.memory.slots() if slot.ref.key == keys[3]]
    slot.view[17] ^= 1
    assert await load(client, space, keys) == ["memory"] * 3 + [None, "memory"]
    assert client.counters == {"load_corrupt": 1}


async def test_a_full_memory_lets_blocks_pass_by(nodes: Nodes) -> None:
    """All is leased: the writer learns that nothing was taken, and the connection lives on."""
    server = await nodes.start(disk={"enabled": False}, leases={"memory_fraction": 0.9})
    client = await connect(nodes, server)
    space = await client.open_space(descriptor_of(1 << 16))
    keys = keys_of("all", 16)
    assert await store(client, space, keys[:14]) == [True] * 14
    match = await client.match([space], keys[:14], lease_ms=60_000)
    assert match.blocks == 14
    assert await store(client, space, keys_of("more", 4)) == [True, True, False, False]
    assert await load(client, space, keys[:14]) == ["memory"] * 14
    assert await served(server, "write") == 0
    assert not client.counters
    await client.release(match)
    await idle(server)


async def test_readers_and_eviction_race_without_a_wrong_byte(
    nodes: Nodes, rng: random.Random
) -> None:
    """Six clients write and read four times as much as fits, and every byte is looked at."""
    server = await nodes.start()
    clients = [await connect(nodes, server) for _ in range(6)]
    space = await clients[0].open_space(descriptor_of())
    chains = [keys_of(f"chat {number}", 24) for number in range(30)]

    async def work(client: AsyncClient, source: random.Random) -> int:
        came = 0
        for _ in range(25):
            keys = source.choice(chains)[: source.randrange(1, 25)]
            match = await client.match([space], keys)
            found = await load(client, space, keys, lease=match)
            came += sum(tier is not None for tier in found)
            if source.random() < 0.7:
                await store(client, space, keys)
            await client.release(match)
        return came

    came = await asyncio.gather(*(work(each, random.Random(rng.random())) for each in clients))
    assert all(came)
    assert all(not client.counters["load_corrupt"] for client in clients)
    assert counter(server, "evicted_blocks", fate="demoted") > 0
    assert await served(server, "bulk_read") > 100
    await idle(server)


# Ends.


@pytest.mark.parametrize("block_bytes", [6000, CHUNK_BYTES + 5])
@pytest.mark.parametrize("sent_blocks", [0, 0.5, 3, 3.999])
async def test_a_writer_who_vanishes_leaves_whole_blocks_and_nothing_else(
    nodes: Nodes, sent_blocks: float, block_bytes: int
) -> None:
    """Wherever he was; the slots that he was filling come back. Small blocks go in groups."""
    server = await nodes.start(**LARGE_NODE)
    client = await connect(nodes, server)
    space = await client.open_space(descriptor_of(block_bytes))
    keys = keys_of("chat", 8)
    stream = b"".join(
        expected(space, key) + digest_of(space, key, expected(space, key)) for key in keys
    )
    async with talk(server) as one:
        assert len((await one.ask(write_of(space, keys))).offer.wanted) == 8
        await one.send_bytes(stream[: int(sent_blocks * (space.block_bytes + DIGEST_BYTES))])
    await hung_up_but(server, 1)
    kept = int(sent_blocks) if block_bytes > CHUNK_BYTES else 0
    assert await client.locate(space, keys) == ["memory"] * kept + [None] * (8 - kept)
    assert await load(client, space, keys) == ["memory"] * kept + [None] * (8 - kept)
    assert await served(server, "bulk_write", "cancelled") == 1
    await idle(server)


async def test_a_reader_who_vanishes_gives_his_pins_back(nodes: Nodes) -> None:
    """In the middle of more than the sockets hold."""
    server = await nodes.start(**LARGE_NODE)
    client = await connect(nodes, server)
    space = await client.open_space(descriptor_of(LARGE))
    keys = keys_of("chat", 12)
    await store(client, space, keys)
    async with talk(server) as one:
        reply = await one.ask(read_of(space, keys))
        assert all(block.here for block in reply.window.blocks)
        await one.receive(space, keys[:1])
        assert any(slot.pins for slot in server.node.tiers.memory.slots())
    await hung_up_but(server, 1)
    assert await served(server, "bulk_read", "cancelled") == 1
    await idle(server)


@pytest.mark.parametrize("op", ["read", "write"])
async def test_who_stands_still_is_cut_off_at_his_deadline(nodes: Nodes, op: str) -> None:
    """He sends no more, or takes no more; what he held comes back without his help."""
    server = await nodes.start(**LARGE_NODE)
    client = await connect(nodes, server)
    space = await client.open_space(descriptor_of(LARGE))
    keys = keys_of("chat", 12)
    if op == "read":
        await store(client, space, keys)
    async with talk(server) as one:
        request = read_of if op == "read" else write_of
        await one.ask(request(space, keys, budget_ms=300))
        if op == "write":
            await one.send_bytes(bytes(1000))
        await hung_up_but(server, 1)
        assert await served(server, f"bulk_{op}", "deadline_exceeded") == 1
        assert await one.is_over()
    await idle(server)


async def cancelled_store(client: AsyncClient, space: Space, turns: int) -> None:
    task = asyncio.create_task(store(client, space, keys_of(f"cancelled {turns}", 30)))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def cancelled_load(client: AsyncClient, space: Space, turns: int) -> None:
    keys = keys_of("cancelled load", 30)
    await store(client, space, keys)
    task = asyncio.create_task(load(client, space, keys))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("call", [cancelled_store, cancelled_load])
async def test_a_call_that_is_cancelled_gives_everything_back(
    nodes: Nodes, call: Callable[[AsyncClient, Space, int], Awaitable[None]]
) -> None:
    """Wherever it is; its connection goes, and another one comes."""
    server = await nodes.start()
    client = await connect(nodes, server)
    space = await client.open_space(descriptor_of())
    for turns in range(0, 40, 2):
        await call(client, space, turns)
        await client.open_space(descriptor_of())
        assert client._bulk.connections >= 1
    assert not client._bulk._in_use
    keys = keys_of("chat", 3)
    assert await store(client, space, keys) == [True] * 3
    assert await load(client, space, keys) == ["memory"] * 3
    await idle(server)


@asynccontextmanager
async def proxied(nodes: Nodes, server: NodeServer) -> AsyncIterator[tuple[AsyncClient, Proxy]]:
    """A client whose bulk path leads through a proxy."""
    proxy = Proxy()
    await proxy.start(bulk(server).port)
    bulk(server).port = proxy.port
    try:
        yield await connect(nodes, server), proxy
    finally:
        await proxy.close()


@pytest.mark.parametrize("how", ["cancelled", "late"])
async def test_nothing_writes_to_a_buffer_after_its_load_returned(nodes: Nodes, how: str) -> None:
    """Half of a block was there; the rest comes when nobody waits for it any more."""
    server = await nodes.start(**LARGE_NODE)
    async with proxied(nodes, server) as (client, proxy):
        space = await client.open_space(descriptor_of(LARGE))
        keys = keys_of("chat", 3)
        await store(client, space, keys)
        proxy.limit_bytes = LARGE + LARGE // 2
        buffers = [bytearray(b"\xee" * LARGE) for _ in keys]
        budget_s = 60.0 if how == "cancelled" else 0.5
        loading = asyncio.create_task(client.load_any(space, keys, buffers, budget_s=budget_s))
        if how == "cancelled":
            await proxy.stalled.wait()
            loading.cancel()
            await asyncio.wait([loading])
            assert loading.cancelled()
        else:
            answers = await loading
            assert answers[1:] == [None, None]
            assert client.counters["load_late"] == 1
        assert not client._bulk._in_use
        for buffer in buffers:
            buffer[:] = b"\xdd" * LARGE
        proxy.release()
        await hung_up(server)
        assert all(buffer == b"\xdd" * LARGE for buffer in buffers)
        assert await load(client, space, keys) == ["memory"] * 3
    await idle(server)


async def test_blocks_are_told_of_in_order_and_in_the_event_loop(nodes: Nodes) -> None:
    """While later ones are on their way."""
    server = await nodes.start()
    client = await connect(nodes, server)
    space = await client.open_space(descriptor_of())
    keys = keys_of("chat", BLOCKS)
    await store(client, space, keys)
    buffers = [memoryview(bytearray(space.block_bytes)) for _ in keys]
    told: list[Loaded] = []

    def hear(block: Loaded) -> None:
        assert asyncio.get_running_loop()
        assert bytes(buffers[len(told)]) == expected(space, keys[len(told)])
        told.append(block)

    assert await client.load(space, keys, buffers, on_loaded=hear) == told
    assert len(told) == BLOCKS
    assert await served(server, "bulk_read") == 1
    await idle(server)


async def test_a_call_leaves_only_after_its_thread(nodes: Nodes) -> None:
    """However often it is cancelled, and however long that thread takes to notice."""
    server = await nodes.start()
    client = await connect(nodes, server)
    begun, go_on = threading.Event(), threading.Event()

    def work(wire: BulkSocket) -> int:
        begun.set()
        assert go_on.wait(60)
        return 0

    call = asyncio.create_task(
        client._bulk._call(pb.BulkRequest(), Deadline(client.clock, 60), work)
    )
    await asyncio.to_thread(begun.wait, 60)
    for _ in range(3):
        call.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not call.done()
    go_on.set()
    await asyncio.wait([call])
    assert call.cancelled()
    assert client._bulk.connections == 0


@pytest.mark.parametrize("op", ["load", "store"])
async def test_a_connection_that_breaks_is_made_good_by_the_stream(nodes: Nodes, op: str) -> None:
    """Within the same call; and soon there is another one."""
    server = await nodes.start(**LARGE_NODE)
    async with proxied(nodes, server) as (client, proxy):
        space = await client.open_space(descriptor_of(LARGE))
        keys = keys_of("chat", 4)
        if op == "load":
            await store(client, space, keys)
        proxy.limit_bytes = proxy.up_limit_bytes = 2 * LARGE + 100
        proxy.then = proxy.cut
        if op == "load":
            assert await load(client, space, keys) == ["memory"] * 4
            assert await served(server, "read") == 1
        else:
            assert await store(client, space, keys) == [True] * 4
            assert await served(server, "write") == 1
        assert client._bulk.connections == 0
        assert not client.counters
        proxy.release()
        client._bulk._next_try_s = 0.0
        await client.open_space(descriptor_of())
        assert client._bulk.connections == 1
        assert await load(client, space, keys) == ["memory"] * 4
        assert await served(server, "read") == (op == "load")
    await idle(server)


async def test_a_port_that_cannot_be_reached_is_left_alone(nodes: Nodes) -> None:
    """A firewall: the stream serves, and nobody knocks again at every call."""
    server = await nodes.start()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        bulk(server).port = closed.getsockname()[1]
    client = AsyncClient(server.endpoint, budgets=PATIENT, shared_memory=False)
    nodes._clients.append(client)
    space = await client.open_space(descriptor_of())
    keys = keys_of("chat", BLOCKS)
    for _ in range(3):
        assert await store(client, space, keys) == [True] * BLOCKS
        assert await load(client, space, keys) == ["memory"] * BLOCKS
    assert client._bulk.connections == 0
    assert await served(server, "connect") == 1
    assert not client.counters


async def test_a_restarted_node_is_connected_to_again(nodes: Nodes) -> None:
    """Connections of its old life are noticed before a call is sent over them."""
    server = await nodes.start()
    settings = nodes.settings(server={"listen": server.endpoint})
    client = await connect(nodes, server)
    space = await client.open_space(descriptor_of())
    await nodes.stop(server)
    again = await nodes.start(settings)
    keys = keys_of("chat", BLOCKS)
    while await store(client, space, keys) != [True] * BLOCKS:  # noqa: ASYNC110
        await asyncio.sleep(0)
    client._bulk._next_try_s = 0.0
    await client.open_space(space.descriptor)
    assert await load(client, space, keys) == ["memory"] * BLOCKS
    assert await served(again, "bulk_read") == 1


@pytest.mark.parametrize("is_calling", [False, True])
async def test_a_node_that_stops_hangs_up(nodes: Nodes, is_calling: bool) -> None:
    """Also on who is in the middle of a call and says nothing."""
    server = await nodes.start(server={"drain_timeout_s": 0.5})
    client = await connect(nodes, server)
    space = await client.open_space(descriptor_of())
    async with talk(server) as one:
        if is_calling:
            await one.ask(write_of(space, keys_of("chat", 3)))
        nodes._servers.remove(server)
        await server.stop()
        assert await one.is_over()
    assert not bulk(server)._serving
    assert await store(client, space, keys_of("chat", 3)) == [False] * 3


async def test_a_draining_node_refuses_new_calls(nodes: Nodes) -> None:
    """With the status that it has over gRPC."""
    server = await nodes.start()
    client = await connect(nodes, server)
    space = await client.open_space(descriptor_of())
    async with talk(server) as one:
        server.calls.drain()
        reply = await one.ask(write_of(space, keys_of("chat", 3)))
        assert reply.status == grpc.StatusCode.UNAVAILABLE.value[0]


# Who is let in.


async def test_a_ticket_is_good_once_and_for_a_while(nodes: Nodes) -> None:
    """Guessed, used and old ones open nothing."""
    server = await nodes.start()

    async def knock(shown: bytes) -> bytes:
        connection, answer = await asyncio.to_thread(dial, server, GREETING + shown)
        connection.close()
        return answer

    assert await knock(bytes(TICKET_BYTES)) != WELCOME
    ticket = bulk(server).invite(None, "test").ticket
    assert await knock(ticket) == WELCOME
    assert await knock(ticket) != WELCOME
    late = bulk(server).invite(None, "test").ticket
    given = bulk(server)._tickets._given
    given[late] = given[late]._replace(expires_s=0.0)
    assert await knock(late) != WELCOME
    await hung_up(server)


@pytest.mark.parametrize(
    "greeting", [b"GET / HTTP/1.1\r\n\r\n", b"", GREETING, GREETING + b"short", bytes(100)]
)
async def test_who_does_not_greet_is_not_let_in(nodes: Nodes, greeting: bytes) -> None:
    """And takes neither a thread nor anybody's place."""
    server = await nodes.start()

    def knock() -> bytes:
        with socket.create_connection(("127.0.0.1", bulk(server).port), timeout=30) as connection:
            connection.sendall(greeting)
            connection.shutdown(socket.SHUT_WR)
            with suppress(OSError):
                return connection.recv(1)
            return b""

    assert await asyncio.to_thread(knock) != WELCOME
    await hung_up(server)
    assert not bulk(server)._connections
    await connect(nodes, server)


def tokens_of(file: Path, tenants: int) -> Path:
    file.write_text(
        "".join(
            f'[tenants.t{n}]\ntoken_sha256 = ["{token_hash(f"token-{n}")}"]\n'
            for n in range(tenants)
        )
    )
    return file


async def test_tenants_never_meet_on_the_bulk_path(nodes: Nodes, tmp_path: Path) -> None:
    """A ticket is its tenant's; where there are several the arena is not shared, but this is."""
    server = await nodes.start(auth={"tokens_file": tokens_of(tmp_path / "tokens.toml", 2)})
    one, two = [nodes.connect(server, f"token-{n}") for n in range(2)]
    space = await one.open_space(descriptor_of())
    await two.open_space(descriptor_of())
    keys = keys_of("chat", BLOCKS)
    assert await store(one, space, keys) == [True] * BLOCKS
    assert await load(two, space, keys) == [None] * BLOCKS
    assert await store(two, space, keys[:3]) == [True] * 3
    assert await load(two, space, keys) == ["memory"] * 3 + [None] * (BLOCKS - 3)
    assert await load(one, space, keys) == ["memory"] * BLOCKS
    assert await served(server, "bulk_write") == 2
    assert await served(server, "bulk_read") == 3
    stranger = nodes.connect(server, "wrong")
    with pytest.raises(KvstoreError):
        await stranger.open_space(descriptor_of())
    assert stranger._bulk.connections == 0
    async with talk(server, "Bearer wrong") as liar:
        reply = await liar.ask(read_of(space, keys))
        assert reply.status == grpc.StatusCode.UNAUTHENTICATED.value[0]


async def test_there_are_only_so_many_connections(nodes: Nodes) -> None:
    """Of all, and of one; who gets none is served by the stream."""
    server = await nodes.start(bulk={"max_connections": 2})
    await connect(nodes, server)
    await connect(nodes, server)
    with pytest.raises(ResourceExhausted, match=r"bulk\.max_connections"):
        bulk(server).invite(None, "test")
    third = AsyncClient(server.endpoint, budgets=PATIENT, shared_memory=False)
    nodes._clients.append(third)
    space = await third.open_space(descriptor_of())
    assert await store(third, space, keys_of("chat", 3)) == [True] * 3
    assert await served(server, "write") == 1


async def test_one_client_does_not_take_all_connections(nodes: Nodes) -> None:
    """Others are invited when he has as many as one may have."""
    server = await nodes.start()
    bulk(server)._connections["greedy"] = MAX_OF_ONE
    with pytest.raises(ResourceExhausted):
        bulk(server).invite(None, "greedy")
    bulk(server).invite(None, "modest")


async def test_one_who_was_invited_too_often_is_not_let_in(nodes: Nodes) -> None:
    """Tickets can be saved up; what counts is who is there."""
    server = await nodes.start(bulk={"max_connections": 1})
    tickets = [bulk(server).invite(None, "test").ticket for _ in range(2)]
    first, answer = await asyncio.to_thread(dial, server, GREETING + tickets[0])
    assert answer == WELCOME
    second, answer = await asyncio.to_thread(dial, server, GREETING + tickets[1])
    assert answer != WELCOME
    for connection in (first, second):
        connection.close()
    await hung_up(server)
    bulk(server).invite(None, "test")


# Nonsense.


@pytest.mark.parametrize(
    "nonsense",
    [
        LENGTH.pack(1 << 31),
        LENGTH.pack(5) + b"\xff" * 5,
        LENGTH.pack(100) + b"half",
    ],
)
async def test_nonsense_ends_the_connection_and_nothing_else(nodes: Nodes, nonsense: bytes) -> None:
    """Others are served."""
    server = await nodes.start()
    other = await connect(nodes, server)
    async with talk(server) as one:
        await one.send_bytes(nonsense)
        if nonsense.endswith(b"half"):
            one.wire.shut()
        assert await one.is_over()
    await hung_up_but(server, 1)
    space = await other.open_space(descriptor_of())
    assert await store(other, space, keys_of("chat", BLOCKS)) == [True] * BLOCKS


@pytest.mark.parametrize(
    "request_of",
    [
        lambda: pb.BulkRequest(),
        lambda: pb.BulkRequest(write=pb.WriteBegin(space_id=bytes(32), keys=bytes(31))),
        lambda: pb.BulkRequest(write=pb.WriteBegin(space_id=bytes(31), keys=bytes(32))),
        lambda: pb.BulkRequest(read=pb.BulkRead(request=pb.ReadRequest(space_id=bytes(31)))),
        lambda: pb.BulkRequest(
            read=pb.BulkRead(
                request=pb.ReadRequest(space_id=bytes(32), keys=bytes(32), scopes=["s"] * 17)
            )
        ),
        lambda: pb.BulkRequest(
            read=pb.BulkRead(request=pb.ReadRequest(space_id=bytes(32), keys=bytes(33)))
        ),
        lambda: pb.BulkRequest(write=pb.WriteBegin(space_id=bytes(32), keys=bytes(32))),
    ],
    ids=["empty", "keys", "space", "read space", "scopes", "read keys", "unknown space"],
)
async def test_a_bad_call_is_refused_and_the_next_one_served(
    nodes: Nodes, request_of: Callable[[], pb.BulkRequest]
) -> None:
    """With the words of the same mistake over gRPC, on the same connection."""
    server = await nodes.start()
    client = await connect(nodes, server)
    space = await client.open_space(descriptor_of())
    async with talk(server) as one:
        reply = await one.ask(request_of())
        assert reply.status in (
            grpc.StatusCode.INVALID_ARGUMENT.value[0],
            grpc.StatusCode.FAILED_PRECONDITION.value[0],
        )
        assert ": " in reply.details
        reply = await one.ask(read_of(space, keys_of("nowhere", 3)))
        assert [block.here for block in reply.window.blocks] == [False] * 3
        assert reply.window.last
        reply = await one.ask(read_of(space, []))
        assert reply.window.last
    await idle(server)


async def test_what_is_sent_at_random_never_hurts_the_node(
    nodes: Nodes, rng: random.Random
) -> None:
    """Frames are cut, flipped and mixed; afterwards nothing is held and others are served."""
    server = await nodes.start(server={"max_deadline_s": 2.0})
    client = await connect(nodes, server)
    space = await client.open_space(descriptor_of())
    keys = keys_of("chat", 6)
    await store(client, space, keys)

    def frame() -> bytes:
        fresh = keys_of(f"fuzz {rng.random()}", rng.randrange(1, 9))
        packed = rng.choice([write_of(space, fresh), read_of(space, keys)]).SerializeToString()
        data = bytearray(LENGTH.pack(len(packed)) + packed)
        data += rng.randbytes(rng.randrange(0, 3 * space.block_bytes))
        for _ in range(rng.choice([0, 1, 1, 20])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data[: rng.randrange(1, len(data) + 1)])

    def torment() -> None:
        ticket = bulk(server).invite(None, "fuzz").ticket
        connection, _ = dial(server, GREETING + ticket)
        with connection, suppress(OSError):
            for _ in range(rng.randrange(1, 4)):
                connection.sendall(frame())
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass

    for _ in range(150):
        await asyncio.to_thread(torment)
    await hung_up_but(server, 1)
    assert await load(client, space, keys) == ["memory"] * 6
    assert counter(server, "requests", op="bulk_write", status="unknown") == 0
    assert counter(server, "requests", op="bulk_read", status="unknown") == 0
    await idle(server)


# Negotiation and settings.


async def test_a_node_without_the_bulk_path_says_so(nodes: Nodes) -> None:
    """The stream serves; the client asks again half a minute later, not at every call."""
    server = await nodes.start(bulk={"enabled": False})
    client = AsyncClient(server.endpoint, budgets=PATIENT, shared_memory=False)
    nodes._clients.append(client)
    space = await client.open_space(descriptor_of())
    for number in range(3):
        keys = keys_of(f"chat {number}", 3)
        assert await store(client, space, keys) == [True] * 3
        assert await load(client, space, keys) == ["memory"] * 3
    assert server._bulk is None
    assert await served(server, "write") == 3
    assert await served(server, "connect") == 1


async def test_a_port_that_is_taken_is_named(nodes: Nodes) -> None:
    """Where the setting names one; any free one is found."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"bulk\.listen: {listen}: "):
            await nodes.start(bulk={"listen": listen})


async def test_a_host_of_its_own_is_told_to_clients(nodes: Nodes) -> None:
    """As far as it is another one than gRPC's, and one that can be dialled."""
    server = await nodes.start(bulk={"listen": "127.0.0.2:0"})
    assert bulk(server).invite(None, "test").host == "127.0.0.2"
    client = await connect(nodes, server)
    space = await client.open_space(descriptor_of())
    assert await store(client, space, keys_of("chat", 3)) == [True] * 3
    assert await served(server, "bulk_write") == 1
    plain = await nodes.start(disk={"enabled": False})
    assert bulk(plain).invite(None, "test").host == ""


@pytest.mark.parametrize(
    ("endpoint", "host"),
    [
        ("127.0.0.1:7070", "127.0.0.1"),
        ("store.example:7070", "store.example"),
        ("[::1]:7070", "::1"),
        ("dns:///store.example:7070", "store.example"),
        ("dns:store.example:7070", "store.example"),
        ("unix:/run/kvstore.sock", ""),
        ("unix:///run/kvstore.sock", ""),
        ("xds:///store:7070", ""),
        ("store.example", ""),
    ],
)
def test_the_host_that_is_dialled_is_the_endpoints(endpoint: str, host: str) -> None:
    """Where it names one; otherwise the stream is what there is."""
    assert host_of(endpoint) == host

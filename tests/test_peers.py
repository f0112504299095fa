"""Nodes that read from each other: found in the directory, moved over the bulk path, checked."""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis

from kvstore.api.asking import Received, receive_windows
from kvstore.api.bulk import CHUNK_BYTES, Parcel
from kvstore.api.errors import ConfigError, Unavailable
from kvstore.api.tier import BlockRef, Load
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.v1 import kvstore_pb2_grpc as pb_grpc
from kvstore.names import block_name
from kvstore.peers.credentials import PEERS, Credentials
from kvstore.peers.peers import WIRES, Peers
from kvstore.server import NodeServer
from kvstore.tenants import LOCAL_TENANT, Tenant
from kvstore_client import AsyncClient, Client, Space
from kvstore_workers.redis_server import RedisServer
from tests.node_process import NodeProcess
from tests.sim.blocks import keys_of
from tests.sim.certificates import make_certificate
from tests.sim.nodes import (
    BLOCK_BYTES,
    PATIENT,
    Nodes,
    counter,
    descriptor_of,
    expected,
    load,
    raw_channel,
    store,
)
from tests.sim.proxy import Proxy
from tests.sim.rig import quiet
from tests.test_bulk import LARGE, LARGE_NODE, bulk, read_of, talk
from tests.test_grpc import refused, tokens_file

BLOCKS = 12
LOCAL = Tenant(LOCAL_TENANT)
NO_DISK: dict[str, Any] = {"disk": {"enabled": False}}
FEW: dict[str, Any] = {"memory": {"capacity_bytes": 1 << 16, "slab_bytes": 1 << 16}}
"""Room for eight blocks in memory."""
LIST = b"kvstore:d1:blocks:"


class Cluster:
    """Nodes over one directory, each with files of its own, which may trust each other."""

    def __init__(self, nodes: Nodes, home: Path, redis_url: str) -> None:
        self.nodes = nodes
        self.redis_url = redis_url
        self._home = home

    async def node(self, name: str, **sections: dict[str, Any]) -> NodeServer:
        """A node of this name."""
        values: dict[str, dict[str, Any]] = {
            "peers": {"enabled": True, "timeout_s": 30, "lookup_timeout_s": 30},
            "redis": {"directory_url": self.redis_url},
            "cluster": {"node_id": name},
            "disk": {"path": self._home / name},
        }
        for section, changes in sections.items():
            values[section] = values.get(section, {}) | changes
        return await self.nodes.start(self.nodes.settings(**values))

    async def pair(self, **sections: dict[str, Any]) -> tuple[NodeServer, NodeServer]:
        """Two nodes."""
        return await self.node("one", **sections), await self.node("two", **sections)

    async def client(self, server: NodeServer, token: str | None = None) -> AsyncClient:
        """A client for which the space of these tests is open."""
        client = self.nodes.connect(server, token=token)
        await client.open_space(descriptor_of())
        return client

    def entries(self) -> dict[str, set[bytes]]:
        """The names in the directory, by node."""
        with redis.from_url(self.redis_url) as client:
            return {
                key.split(b":")[3].decode(): client.smembers(key) - {b"all"}
                for key in client.scan_iter(match=LIST + b"*")
            }

    def ttls_s(self) -> list[int]:
        """How long the lists of names live on."""
        with redis.from_url(self.redis_url) as client:
            return [client.ttl(key) for key in client.scan_iter(match=LIST + b"*")]

    def plant(self, server: NodeServer, names: list[bytes]) -> None:
        """Entries of which a node knows nothing."""
        own = directory_of(server).own
        with redis.from_url(self.redis_url) as client:
            client.sadd(LIST + f"{own.node_id}:{own.life}".encode(), *names)

    def strike(self, server: NodeServer, names: list[bytes]) -> None:
        """Nobody finds these at a node that has them."""
        own = directory_of(server).own
        with redis.from_url(self.redis_url) as client:
            client.srem(LIST + f"{own.node_id}:{own.life}".encode(), *names)


@pytest.fixture
async def cluster(nodes: Nodes, tmp_path: Path, redis_url: str) -> AsyncIterator[Cluster]:
    """Nothing of it runs yet; at the end what each node knows of its own blocks is checked."""
    yield Cluster(nodes, tmp_path, redis_url)
    for server in nodes._servers:
        # Who reads has its answer a moment before who lends has ended the call.
        assert await server.calls.finished(60.0)
        if server.peers is not None:
            server.peers.holdings.check()


def peers_of(server: NodeServer) -> Peers:
    assert server.peers is not None
    return server.peers


def directory_of(server: NodeServer) -> Any:
    assert server._directory is not None
    return server._directory


async def met(*servers: NodeServer) -> None:
    """Returns when all of them know each other, and what each holds."""
    for server in servers:
        await directory_of(server).beat()
        await peers_of(server).announcer.settle()
    for server in servers:
        assert len(await directory_of(server).refresh()) >= len(servers) - 1


def names_of(server: NodeServer, space: Space, keys: list[bytes], tenant: str = "local") -> Any:
    """What others call blocks."""
    namespace = server.node._namespace(tenant, "", space.space_id)
    return [block_name(BlockRef(namespace, key)) for key in keys]


def came(server: NodeServer, cause: str) -> float:
    """How many blocks have not come from a peer for this reason."""
    return counter(server, "peer_misses", cause=cause)


async def filled(
    cluster: Cluster, one: NodeServer, two: NodeServer, word: str = "chat"
) -> tuple[AsyncClient, Space, list[bytes]]:
    """Blocks at `one`, and a client of `two`."""
    writer, reader = await cluster.client(one), await cluster.client(two)
    space = await writer.open_space(descriptor_of())
    keys = keys_of(word, BLOCKS)
    assert await store(writer, space, keys) == [True] * BLOCKS
    await one.node.tiers.digests.catch_up()
    await met(one, two)
    return reader, space, keys


# What is at another node is found, comes, and stays.


async def test_a_match_brings_what_another_node_has(cluster: Cluster) -> None:
    """It is likely at first; then it is in memory, and the other node is not asked again."""
    one, two = await cluster.pair()
    reader, space, keys = await filled(cluster, one, two)
    assert await reader.locate(space, keys) == ["peers"] * BLOCKS
    match = await reader.match([space], keys)
    assert match.blocks == BLOCKS
    assert {run.tier for run in match.spaces[0]} == {"peers"}
    assert await load(reader, space, keys, lease=match) == ["peers"] * BLOCKS
    assert await load(reader, space, keys) == ["memory"] * BLOCKS
    assert counter(one, "peer_lent_blocks") == BLOCKS
    assert counter(two, "promoted_blocks", tier="peers") == BLOCKS
    assert counter(two, "tier_bytes", tier="peers", op="load") == BLOCKS * BLOCK_BYTES
    # And so does whatever descends from it.
    more = keys_of("chat", BLOCKS + 3)
    assert await store(reader, space, more[BLOCKS:], parent_key=keys[-1]) == [True] * 3
    assert not reader.counters
    tiers = {tier.name: tier.serving for tier in (await reader.status()).tiers}
    assert tiers == {"memory": True, "disk": True, "peers": True}


@pytest.mark.parametrize(("block_bytes", "count"), [(1, 4200), (CHUNK_BYTES, 5), (LARGE, 5)])
async def test_blocks_of_every_size_come(cluster: Cluster, block_bytes: int, count: int) -> None:
    """Tiny ones in several questions, large ones in several windows, without a lease as well."""
    memory = LARGE_NODE["memory"]
    one, two = await cluster.pair(memory=memory | {"capacity_bytes": 40 << 20}, **NO_DISK)
    writer, reader = cluster.nodes.connect(one), cluster.nodes.connect(two)
    for client in (writer, reader):
        space = await client.open_space(descriptor_of(block_bytes))
    keys = keys_of("chat", count)
    assert await store(writer, space, keys) == [True] * count
    await met(one, two)
    assert await load(reader, space, keys) == ["peers"] * count
    assert counter(one, "peer_lent_blocks") == count


async def test_a_node_lends_from_its_disk(cluster: Cluster) -> None:
    """Also what only its earlier life has stored."""
    one = await cluster.node("one")
    client = await cluster.client(one)
    space = await client.open_space(descriptor_of())
    keys = keys_of("chat", BLOCKS)
    await store(client, space, keys)
    await peers_of(one).leave()
    assert cluster.entries() == {}
    await store(client, space, keys_of("late", 2))
    assert await peers_of(one).forget([bytes(32)], b"") == 0
    assert cluster.entries() == {}
    await cluster.nodes.stop(one)
    one, two = await cluster.pair()
    await met(one, two)
    assert len(cluster.entries()["one"]) == BLOCKS + 2
    reader = await cluster.client(two)
    assert await load(reader, space, keys) == ["peers"] * BLOCKS
    assert one.node.tiers.memory.refs() == []


async def test_what_leaves_a_node_leaves_the_directory(cluster: Cluster) -> None:
    """Without a disk, at eviction; where it was demoted it is still there, and comes."""
    one, two = await cluster.node("one", **FEW, **NO_DISK), await cluster.node("two", **FEW)
    clients = [await cluster.client(server) for server in (one, two)]
    space = await clients[0].open_space(descriptor_of())
    for word in ("first", "second"):
        for client in clients:
            await store(client, space, keys_of(word, 6))
    await met(one, two)
    here = one.node.tiers.memory.refs()
    assert cluster.entries()["one"] == {block_name(ref) for ref in here}
    assert len(cluster.entries()["two"]) == 12
    assert len(here) < 12
    assert None not in await load(clients[0], space, keys_of("first", 6))


async def test_blocks_of_several_nodes_make_one_match(cluster: Cluster) -> None:
    """The head of a chain lies at one, its tail at another."""
    one, two, three = [await cluster.node(name) for name in ("one", "two", "three")]
    head, tail, reader = [await cluster.client(server) for server in (one, two, three)]
    space = await head.open_space(descriptor_of())
    keys = keys_of("chat", BLOCKS)
    await store(head, space, keys[:5])
    await store(tail, space, keys)
    await met(one, two, three)
    cluster.strike(two, names_of(two, space, keys[:5]))
    match = await reader.match([space], keys)
    assert match.blocks == BLOCKS
    assert await load(reader, space, keys, lease=match) == ["peers"] * BLOCKS
    assert counter(one, "peer_lent_blocks") == 5
    assert counter(two, "peer_lent_blocks") == BLOCKS - 5


# Nothing is built on it.


async def test_what_only_a_peer_has_is_no_parent_and_no_copy(cluster: Cluster) -> None:
    """It is wanted here all the same, and nothing that descends from it is taken without it."""
    one, two = await cluster.pair()
    reader, space, keys = await filled(cluster, one, two)
    more = keys_of("chat", BLOCKS + 2)
    # A child whose parent only the other node has.
    assert await store(reader, space, more[BLOCKS:], parent_key=keys[-1]) == [False] * 2
    # The chain itself, which a writer has at hand.
    assert await store(reader, space, keys) == [True] * BLOCKS
    assert counter(two, "promoted_blocks", tier="peers") == 0
    await cluster.nodes.stop(one)
    assert await load(reader, space, keys) == ["memory"] * BLOCKS


async def test_a_parent_that_leaves_during_a_write_is_gone_though_a_peer_has_it(
    cluster: Cluster,
) -> None:
    """What a peer has it may forget; then the child would be of no use."""
    one, two = await cluster.pair()
    reader, space, keys = await filled(cluster, one, two)
    assert await store(reader, space, keys[:2]) == [True] * 2
    tiers = two.node.tiers
    offer = await two.node.offer(LOCAL, "", space.space_id, keys[2:4], parent_key=keys[1])
    assert offer.wanted == [0, 1]
    tiers.memory.forget([tiers.memory.slots()[0]])
    assert await reader.locate(space, keys[:4]) == ["memory"] + ["peers"] * 3
    assert not await offer.hold_parent(0)
    offer.close()


async def test_a_block_may_come_without_its_parent_which_only_a_peer_has(cluster: Cluster) -> None:
    """The engine has the head itself: the rest is read once, kept in memory, and not on disk."""
    one, two = await cluster.pair()
    reader, space, keys = await filled(cluster, one, two)
    match = await reader.match([space], keys, held_blocks=5)
    assert match.blocks == BLOCKS
    assert await load(reader, space, keys[5:], lease=match) == ["peers"] * (BLOCKS - 5)
    assert counter(one, "peer_lent_blocks") == BLOCKS - 5
    assert await reader.locate(space, keys) == ["peers"] * 5 + ["memory"] * (BLOCKS - 5)
    await reader.release(match)
    await two.node.tiers.flush()
    assert counter(two, "disk_orphans") == BLOCKS - 5
    # Once its head is forgotten everywhere, nobody waits for it.
    await reader.discard(space, keys[4:5])
    assert two.node.tiers.memory.refs() == []


async def test_a_victim_is_not_safe_because_a_peer_has_it(cluster: Cluster) -> None:
    """With a disk it goes there; without one it is dropped, as without peers."""
    one = await cluster.node("one")
    for name, place, fate in (("two", {}, "demoted"), ("three", NO_DISK, "dropped")):
        two = await cluster.node(name, **FEW, **place)
        reader, space, keys = await filled(cluster, one, two, name)
        assert await store(reader, space, keys[:6]) == [True] * 6
        assert await store(reader, space, keys_of("others", 8)) == [True] * 8
        assert counter(two, "evicted_blocks", fate=fate) == 6
        disk = two.node.disk
        assert disk is None or all(disk.has(n, BLOCK_BYTES) for n in names_of(two, space, keys[:6]))
        await cluster.nodes.stop(two)


# What goes wrong is a miss.


async def test_a_stale_entry_costs_one_failed_read(cluster: Cluster) -> None:
    """It disappears, and the blocks beside it come; the node that was asked is not avoided."""
    one, two = await cluster.pair()
    reader, space, keys = await filled(cluster, one, two)
    stale = keys_of("gone", 3)
    cluster.plant(one, names_of(one, space, stale))
    assert await reader.locate(space, stale) == ["peers"] * 3
    assert await load(reader, space, [*keys, *stale]) == ["peers"] * BLOCKS + [None] * 3
    assert came(two, "gone") == 3
    await quiet_peers(one, two)
    assert await reader.locate(space, stale) == [None] * 3
    assert await load(reader, space, stale) == [None] * 3
    assert came(two, "gone") == 3
    assert len(cluster.entries()["one"]) == BLOCKS
    # What is struck though it is there comes back by itself.
    cluster.strike(one, names_of(one, space, keys))
    peers_of(one).holdings.look_again(names_of(one, space, keys[:1])[0])
    await met(one, two)
    assert await reader.locate(space, keys[:2]) == ["peers", None]


async def quiet_peers(*servers: NodeServer) -> None:
    """Returns when nothing is on its way to the directory."""
    for server in servers:
        await peers_of(server).tier.settle()
        await peers_of(server).announcer.settle()


async def test_a_peer_asks_nobody_else(cluster: Cluster) -> None:
    """Two nodes that are each said to have what the other is asked for do not go in circles."""
    one, two = await cluster.pair()
    three = await cluster.node("three")
    client = await cluster.client(three)
    for server in (one, two):
        await cluster.client(server)
    space = await client.open_space(descriptor_of())
    keys = keys_of("chat", 3)
    await store(await cluster.client(two), space, keys)
    await met(one, two, three)
    cluster.strike(two, names_of(two, space, keys))
    cluster.plant(one, names_of(one, space, keys))
    cluster.plant(three, names_of(one, space, keys))
    assert await load(client, space, keys) == [None] * 3
    assert counter(one, "peer_lent_blocks") == counter(two, "peer_lent_blocks") == 0
    assert came(one, "gone") == 0


@pytest.mark.parametrize("place", ["memory", "wire"])
async def test_a_damaged_block_is_noticed(cluster: Cluster, place: str) -> None:
    """One bit is another in the other node's memory; or its digest is. The rest comes."""
    one, two = await cluster.pair()
    reader, space, keys = await filled(cluster, one, two)
    memory = one.node.tiers.memory
    ref = BlockRef(one.node._namespace("local", "", space.space_id), keys[4])
    slot = memory.find(ref)
    assert slot is not None
    if place == "memory":
        slot.view[1000] ^= 4
    else:
        slot.digest = bytes([slot.digest[0] ^ 1]) + slot.digest[1:]
    expectation = ["peers"] * 4 + [None] + ["peers"] * (BLOCKS - 5)
    assert await load(reader, space, keys) == expectation
    assert came(two, "damaged") == counter(two, "corrupt", tier="peers") == 1
    await quiet_peers(two)
    assert await reader.locate(space, keys[4:5]) == [None]
    # It is written anew where it was missed.
    assert await store(reader, space, keys) == [True] * BLOCKS
    assert await load(reader, space, keys) == ["memory"] * BLOCKS


async def test_a_peer_that_stands_still_is_left_at_the_deadline(cluster: Cluster) -> None:
    """With what has come by then; nothing writes to the buffers later, and it is asked no more."""
    peers = {"peers": {"timeout_s": 0.3, "lookup_timeout_s": 30}}
    one, two = (
        await cluster.node("one", **LARGE_NODE),
        await cluster.node("two", **LARGE_NODE, **peers),
    )
    writer, reader = cluster.nodes.connect(one), cluster.nodes.connect(two)
    for client in (writer, reader):
        space = await client.open_space(descriptor_of(LARGE))
    keys = keys_of("chat", 4)
    await store(writer, space, keys)
    await met(one, two)
    proxy = Proxy()
    await proxy.start(bulk(one).port)
    bulk(one).port = proxy.port
    proxy.limit_bytes = 100 + LARGE // 2
    assert await load(reader, space, keys) == [None] * 4
    assert came(two, "late") == 1  # The others were not even asked for.
    assert await reader.locate(space, keys) == [None] * 4
    assert two.node.tiers.memory.refs() == []
    await quiet(two.node.tiers)
    # It may be asked again a little later, and then it has recovered.
    proxy.release()
    for peer in peers_of(two).tier._circle._peers.values():
        peer._rests_until_s = 0.0
    assert await load(reader, space, keys) == ["peers"] * 4
    await proxy.close()
    assert not reader.counters


async def test_who_is_cancelled_leaves_his_buffers_alone(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is shut down first, and its thread waited for; the other node is not."""
    lingers, ended = threading.Event(), threading.Event()

    def receive(*arguments: Any) -> Received:
        try:
            return receive_windows(*arguments)
        finally:
            lingers.wait()
            ended.set()

    monkeypatch.setattr("kvstore.peers.peer.receive_windows", receive)
    one, two = await cluster.pair(**LARGE_NODE)
    writer, reader = cluster.nodes.connect(one), cluster.nodes.connect(two)
    for client in (writer, reader):
        space = await client.open_space(descriptor_of(LARGE))
    [key] = keys_of("chat", 1)
    await store(writer, space, [key])
    await met(one, two)
    proxy = Proxy()
    await proxy.start(bulk(one).port)
    bulk(one).port = proxy.port
    proxy.limit_bytes = 100 + LARGE // 2
    buffer = bytearray(LARGE)
    ref = BlockRef(two.node._namespace("local", "", space.space_id), key)
    two.node._names(LOCAL, [], space.space_id)
    loading = asyncio.create_task(peers_of(two).tier.load([Load(ref, memoryview(buffer))]))
    await proxy.stalled.wait()
    loading.cancel()
    asyncio.get_running_loop().call_later(0.05, lingers.set)
    await asyncio.wait([loading])
    assert loading.cancelled()
    assert ended.is_set()
    buffer[:] = b"\xdd" * LARGE
    proxy.release()
    await proxy.close()
    assert buffer == b"\xdd" * LARGE


async def test_a_connection_that_broke_is_another_ones_beginning(cluster: Cluster) -> None:
    """Idle ones are looked at before they are used; one that breaks in use is a miss."""
    one, two = await cluster.pair()
    reader, space, keys = await filled(cluster, one, two)
    proxy = Proxy()
    await proxy.start(bulk(one).port)
    bulk(one).port = proxy.port
    assert await load(reader, space, keys[:4]) == ["peers"] * 4
    proxy.cut()
    await one.node.clock.sleep(0.05)
    assert await load(reader, space, keys[4:8]) == ["peers"] * 4
    proxy.limit_bytes, proxy.then = 1000 + 2 * BLOCK_BYTES, proxy.cut
    for peer in peers_of(two).tier._circle._peers.values():
        peer._idle.pop().close()
    assert await load(reader, space, keys[8:]) == [None] * 4
    assert came(two, "unreachable") == 4
    await proxy.close()


@pytest.mark.parametrize("moment", ["calling", "reading"])
async def test_a_node_that_leaves_the_directory_is_not_waited_for(
    cluster: Cluster, moment: str
) -> None:
    """In the middle of a read, or while it is called: that is a miss at once, and nobody's end."""
    one, two = await cluster.pair(**LARGE_NODE)
    writer, reader = cluster.nodes.connect(one), cluster.nodes.connect(two)
    for client in (writer, reader):
        space = await client.open_space(descriptor_of(LARGE))
    keys = keys_of("chat", 1)
    await store(writer, space, keys)
    await met(one, two)
    proxy, reached = Proxy(), asyncio.Event()
    if moment == "reading":
        await proxy.start(bulk(one).port)
        bulk(one).port = proxy.port
        proxy.limit_bytes, proxy.then = LARGE // 2, reached.set
    else:  # A host that takes connections and says nothing.
        silent = await asyncio.start_server(lambda *_: reached.set(), "127.0.0.1", 0)
        port = silent.sockets[0].getsockname()[1]
        own = directory_of(one).own
        directory_of(two).others = [own._replace(endpoint=f"127.0.0.1:{port}")]
    loading = asyncio.create_task(load(reader, space, keys))
    await reached.wait()
    directory_of(two).others = []
    assert await reader.locate(space, keys) == [None]
    assert await loading == [None]
    assert came(two, "unreachable") == 1
    if moment == "reading":
        await proxy.close()
    else:
        silent.close()


async def test_who_has_no_time_left_blames_nobody(cluster: Cluster) -> None:
    """The directory took it all, say, or others of this node had all connections."""
    one, two = await cluster.pair()
    reader, space, keys = await filled(cluster, one, two)
    [peer] = await peers_of(two).tier._circle.of(directory_of(two).others)
    names, buffer = names_of(two, space, keys[:1]), memoryview(bytearray(BLOCK_BYTES))
    parcels = [Parcel(space.space_id, keys[0], buffer)]
    room = peers_of(two)._room
    for _ in range(WIRES):
        await room.acquire()
    for time_s in (-1.0, 0.0, 0.01):
        assert await peer.fetch(names, parcels, time_s) == ({}, (), 0, "late")
    for _ in range(WIRES):
        room.release()
    assert not peer.rests
    assert await load(reader, space, keys) == ["peers"] * BLOCKS


async def test_a_slow_disk_is_late_and_its_entries_stay(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer says what it has read in time, and of the rest nothing."""
    one = await cluster.node("one", **FEW)
    two = await cluster.node("two", peers={"timeout_s": 0.3, "enabled": True})
    reader, space, keys = await filled(cluster, one, two)
    await one.node.tiers.flush()
    for slot in one.node.tiers.memory.slots():
        one.node.tiers.memory.evict(slot)
    await quiet_peers(one)
    disk = one.node.disk
    assert disk is not None
    slow = block_name(two.node.refs(LOCAL, "", space.space_id, keys)[3])
    read = disk.read_named

    async def read_slowly(name: bytes, *more: Any) -> bytes | None:
        if name == slow:
            await asyncio.Event().wait()
        return await read(name, *more)

    monkeypatch.setattr(disk, "read_named", read_slowly)
    assert await load(reader, space, keys) == ["peers"] * 3 + [None] * (BLOCKS - 3)
    assert came(two, "late") == BLOCKS - 3
    assert came(two, "gone") == 0
    monkeypatch.undo()
    assert await load(reader, space, keys[3:]) == ["peers"] * (BLOCKS - 3)


async def test_a_busy_peer_is_a_miss_and_is_asked_again(cluster: Cluster) -> None:
    """It has refused because it had too much to do."""
    one = await cluster.node("one", server={"waiting_calls": 0, "max_data_calls": 1})
    two = await cluster.node("two")
    reader, space, keys = await filled(cluster, one, two)
    await load(reader, space, keys[:1])
    assert await one.calls.finished(60.0)
    async with one.calls.admission.admitted("somebody", 1, 30):
        assert await load(reader, space, keys[1:]) == [None] * (BLOCKS - 1)
    assert came(two, "busy") == BLOCKS - 1
    assert await load(reader, space, keys[1:]) == ["peers"] * (BLOCKS - 1)


async def test_without_the_directory_there_are_misses(
    cluster: Cluster, private_redis: RedisServer
) -> None:
    """Counted, and in time; when it is back, all is announced anew."""
    cluster.redis_url = private_redis.url
    one, two = await cluster.pair()
    reader, space, keys = await filled(cluster, one, two)
    private_redis.kill()
    assert await load(reader, space, keys) == [None] * BLOCKS
    assert counter(two, "tier_errors", tier="peers", cause="error") > 0
    client = await cluster.client(one)
    more = keys_of("more", 3)
    assert await store(client, space, more) == [True] * 3
    assert await load(client, space, more) == ["memory"] * 3
    await peers_of(one).announcer.settle()
    assert counter(one, "peer_announce_dropped") >= 3
    private_redis.start()
    await met(one, two)
    assert len(cluster.entries()["one"]) == BLOCKS + 3
    two.node.tiers._slow._inner._second._reads.succeeded()  # type: ignore[union-attr]
    assert await load(reader, space, keys + more) == ["peers"] * (BLOCKS + 3)


async def test_what_the_directory_lost_is_announced_anew(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an eviction there, or its restart; what has come meanwhile proves nothing."""
    monkeypatch.setattr("kvstore.peers.announcer.HEARTBEAT_S", 1000.0)
    one, two = await cluster.pair()
    _, space, _ = await filled(cluster, one, two)
    with redis.from_url(cluster.redis_url) as client:
        for key in client.scan_iter(match=LIST + b"*"):
            client.delete(key)
    await store(await cluster.client(one), space, keys_of("more", 2))
    await peers_of(one).announcer.settle()
    assert len(cluster.entries()["one"]) == 2
    assert all(0 < ttl_s <= 15 for ttl_s in cluster.ttls_s())
    await peers_of(one).announcer._renew()
    assert len(cluster.entries()["one"]) == BLOCKS + 2
    assert all(0 < ttl_s <= 15 for ttl_s in cluster.ttls_s())


async def test_no_more_is_announced_than_allowed(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest is counted, and not found here by others."""
    monkeypatch.setattr("kvstore.peers.announcer.HEARTBEAT_S", 1000.0)
    one = await cluster.node("one", peers={"announced_blocks": 5})
    await met(one)
    client = await cluster.client(one)
    space = await client.open_space(descriptor_of())
    await store(client, space, keys_of("chat", BLOCKS))
    await met(one)
    assert len(cluster.entries()["one"]) == 5
    assert counter(one, "peer_announced_blocks") == 5
    assert counter(one, "peer_announce_dropped") == BLOCKS - 5


async def test_changes_that_were_missed_are_made_good(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where more has changed at once than is kept in mind, the next heartbeat looks at all."""
    monkeypatch.setattr("kvstore.peers.holdings.MAX_CHANGES", 4)
    monkeypatch.setattr("kvstore.peers.announcer.HEARTBEAT_S", 1000.0)
    one, two = await cluster.pair()
    await met(one, two)
    reader, space, keys = await filled(cluster, one, two)
    assert peers_of(one).holdings.missed
    assert len(cluster.entries()["one"]) < BLOCKS
    await peers_of(one).announcer._renew()
    assert not peers_of(one).holdings.missed
    assert await load(reader, space, keys) == ["peers"] * BLOCKS


# Who may ask.


async def test_only_a_node_of_the_cluster_may_ask(cluster: Cluster, tmp_path: Path) -> None:
    """No token of a tenant, nothing of another cluster, and nothing that was meant for another."""
    tokens = {"auth": {"tokens_file": tokens_file(tmp_path, "acme")}}
    one, two = await cluster.pair(**tokens)
    mine = peers_of(two)._credentials
    own = directory_of(one).own
    stranger = Credentials(bytes(32), own.node_id, own.endpoint)
    shown = [
        None,
        "Bearer acme",
        "Peer",
        "Peer " + "0" * 64,
        stranger.shown_to(own.node_id, own.endpoint),
        mine.shown_to("two", own.endpoint),
        mine.shown_to(own.node_id, "127.0.0.1:1"),
        mine.shown_to(own.node_id, own.endpoint)[:-1],
    ]
    service = pb.DESCRIPTOR.services_by_name["Peer"]
    requests = {
        "Connect": pb.PeerConnectRequest(nonce=bytes(32)),
        "Forget": pb.PeerForgetRequest(tag=bytes(16)),
    }
    assert set(requests) == {method.name for method in service.methods}
    async with raw_channel(one) as channel:
        stub = pb_grpc.PeerStub(channel)
        for name, request in requests.items():
            for word in shown:
                who = () if word is None else (("authorization", word),)
                call = getattr(stub, name)(request, metadata=who)
                await refused(call, grpc.StatusCode.UNAUTHENTICATED, "authorization")
            who = (("authorization", mine.shown_to(own.node_id, own.endpoint)),)
            await getattr(stub, name)(request, metadata=who)
        # Nor is what a node shows a tenant's token.
        kvstore = pb_grpc.KVStoreStub(channel)
        await refused(
            kvstore.Status(pb.StatusRequest(), metadata=who), grpc.StatusCode.UNAUTHENTICATED
        )


async def test_a_node_without_peers_answers_none(nodes: Nodes) -> None:
    """Nobody is lent anything unless it is switched on."""
    server = await nodes.start()
    async with raw_channel(server) as channel:
        call = pb_grpc.PeerStub(channel).Connect(pb.PeerConnectRequest(nonce=bytes(32)))
        await refused(call, grpc.StatusCode.UNIMPLEMENTED)


async def test_a_ticket_opens_what_it_was_given_for(cluster: Cluster, tmp_path: Path) -> None:
    """A tenant's connection reads no names, a peer's no keys; who says so is not believed."""
    tokens = {"auth": {"tokens_file": tokens_file(tmp_path, "acme")}}
    one, two = await cluster.pair(**tokens)
    client = await cluster.client(one, "acme")
    space = await client.open_space(descriptor_of())
    keys = keys_of("chat", 2)
    await store(client, space, keys)
    await met(one, two)
    named = pb.BulkRequest(
        peer_read=pb.PeerRead(
            names=b"".join(names_of(one, space, keys, "acme")), block_bytes=[BLOCK_BYTES] * 2
        )
    )
    async with talk(one, "Bearer acme") as theirs:
        reply = await theirs.ask(named)
        assert reply.status == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    own = directory_of(one).own
    shown = peers_of(two)._credentials.shown_to(own.node_id, own.endpoint)
    async with talk(one, shown) as pretending:  # A ticket of a tenant, with a peer's header.
        reply = await pretending.ask(read_of(space, keys))
        assert reply.status == grpc.StatusCode.UNAUTHENTICATED.value[0]
    ticket = bulk(one).invite_peer(shown, "peer").ticket
    async with talk(one, ticket=ticket) as peer:
        reply = await peer.ask(read_of(space, keys))
        assert reply.status == grpc.StatusCode.PERMISSION_DENIED.value[0]
        for wrong in (
            pb.PeerRead(),
            pb.PeerRead(names=bytes(31), block_bytes=[1]),
            pb.PeerRead(names=bytes(64), block_bytes=[1]),
            pb.PeerRead(names=bytes(32), block_bytes=[0]),
            pb.PeerRead(names=bytes(32), block_bytes=[1 << 31]),
            pb.PeerRead(names=bytes(32 * 4097), block_bytes=[1] * 4097),
        ):
            reply = await peer.ask(pb.BulkRequest(peer_read=wrong))
            assert reply.status == grpc.StatusCode.INVALID_ARGUMENT.value[0], wrong
        assert [block.here for block in (await peer.ask(named)).window.blocks] == [True] * 2
        await peer.receive(space, keys)


async def test_who_does_not_have_the_secret_is_told_nothing_and_not_believed(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node of another cluster in the same directory, which claims to have everything."""
    secret = tmp_path / "other.secret"
    secret.write_bytes(bytes(32))
    one, two = await cluster.node("one", cluster={"secret_file": secret}), await cluster.node("two")
    await cluster.client(one)
    reader = await cluster.client(two)
    space = await reader.open_space(descriptor_of())
    keys = keys_of("chat", 3)
    await met(one, two)
    cluster.plant(one, names_of(two, space, keys))
    assert await load(reader, space, keys) == [None] * 3
    assert came(two, "refused") == 3
    # Also if it lets everybody in: it cannot prove who it is.
    monkeypatch.setattr(peers_of(one)._credentials, "authenticate", lambda shown: PEERS)
    for peer in peers_of(two).tier._circle._peers.values():
        peer._rests_until_s = 0.0
    assert await load(reader, space, keys) == [None] * 3
    assert came(two, "refused") == 6
    assert counter(one, "requests", op="peer_connect", status="ok") == 1
    assert counter(one, "requests", op="peer_read", status="ok") == 0


async def test_tenants_never_meet_at_another_node(cluster: Cluster, tmp_path: Path) -> None:
    """Equal prompts of two tenants have unrelated names, there as here."""
    tokens = {"auth": {"tokens_file": tokens_file(tmp_path, "acme", "rival")}}
    one, two = await cluster.pair(**tokens)
    acme = await cluster.client(one, "acme")
    space = await acme.open_space(descriptor_of())
    keys = keys_of("chat", 4)
    await store(acme, space, keys)
    await met(one, two)
    rival, acme_again = [await cluster.client(two, name) for name in ("rival", "acme")]
    assert await rival.locate(space, keys) == [None] * 4
    assert (await rival.match([space], keys)).blocks == 0
    assert await load(rival, space, keys) == [None] * 4
    assert await rival.discard(space, keys) == 0
    assert await load(acme_again, space, keys, scopes=["shared"]) == [None] * 4
    assert await load(acme_again, space, keys) == ["peers"] * 4
    assert await load(rival, space, keys) == [None] * 4


# Forgotten is forgotten.


@pytest.mark.parametrize("how", ["discard", "clear"])
async def test_what_is_forgotten_here_is_forgotten_by_peers(cluster: Cluster, how: str) -> None:
    """In memory, on disk and where it is lent; what is not concerned stays."""
    one, two, three = [await cluster.node(name) for name in ("one", "two", "three")]
    reader, space, keys = await filled(cluster, one, two)
    clients = [await cluster.client(one), reader, await cluster.client(three)]
    for client in clients:
        other = await client.open_space(descriptor_of(numerics="other"))
    await store(clients[2], space, keys)
    await store(clients[2], other, keys)
    for server in (one, three):
        await server.node.tiers.flush()
    await met(one, two, three)
    assert await load(reader, space, keys[:3]) == ["peers"] * 3
    cluster.strike(three, names_of(three, space, keys))
    if how == "discard":
        await clients[0].discard(space, keys)
    else:
        await clients[0].clear_space(space)
    for client in clients:
        assert await load(client, space, keys) == [None] * BLOCKS
    await met(one, two, three)
    for client in clients:
        assert await client.locate(space, keys) == [None] * BLOCKS
    assert await reader.locate(other, keys) == ["peers"] * BLOCKS


async def test_what_a_peer_has_not_announced_yet_is_forgotten_as_well(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its names are known to nobody before, not even to itself."""
    monkeypatch.setattr("kvstore.peers.announcer.GATHER_S", 1000.0)
    one, two = await cluster.pair()
    for server in (one, two):
        await directory_of(server).beat()
    clients = [await cluster.client(server) for server in (one, two)]
    space = await clients[0].open_space(descriptor_of())
    keys = keys_of("chat", BLOCKS)
    await store(clients[0], space, keys)
    assert await clients[1].discard(space, keys) == BLOCKS
    assert await load(clients[0], space, keys) == [None] * BLOCKS


async def test_what_descends_from_it_goes_with_it_at_a_peer(cluster: Cluster) -> None:
    """Also what is left in memory of a chain whose middle lay on disk, and went with its head."""
    one, two = await cluster.pair()
    forgetter, client = await cluster.client(one), await cluster.client(two)
    space = await client.open_space(descriptor_of())
    keys = keys_of("chat", 8)
    await store(client, space, keys)
    await two.node.tiers.flush()
    memory, refs = two.node.tiers.memory, two.node.refs(LOCAL, "", space.space_id, keys)
    for ref in refs[:6]:
        slot = memory.find(ref)
        assert slot is not None
        memory.evict(slot)
    await met(one, two)
    assert await forgetter.discard(space, keys[3:4]) == 7
    assert memory.refs() == []
    assert await load(client, space, keys) == ["disk"] * 3 + [None] * 5


async def test_a_peer_that_cannot_forget_is_said_so(cluster: Cluster) -> None:
    """Here and at the others it is forgotten all the same."""
    one, two = await cluster.pair()
    reader, space, keys = await filled(cluster, one, two)
    await store(reader, space, keys)
    await one._grpc.stop(None)
    with pytest.raises(Unavailable, match="node one may not have forgotten"):
        await reader.discard(space, keys)
    assert two.node.tiers.memory.refs() == []


# Processes of their own, and TLS.


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes certificates")
async def test_peers_speak_tls(cluster: Cluster, tmp_path: Path) -> None:
    """Where nodes have it; who shows another certificate is not asked for anything."""
    certificate, other = make_certificate(tmp_path, "node"), make_certificate(tmp_path, "other")
    listen = {"listen": "127.0.0.1:0", "metrics_listen": None}
    trust = {"enabled": True, "timeout_s": 30, "lookup_timeout_s": 30}
    good: dict[str, Any] = {
        "server": listen | certificate.settings,
        "peers": trust | {"tls_ca_file": certificate.certificate_file},
    }
    wary = good | {"peers": trust | {"tls_ca_file": other.certificate_file, "timeout_s": 2}}
    one, two = await cluster.pair(**good)
    three = await cluster.node("three", **wary)

    async def client_of(server: NodeServer) -> AsyncClient:
        client = AsyncClient(
            server.endpoint, budgets=PATIENT, tls_ca_file=certificate.certificate_file
        )
        cluster.nodes._clients.append(client)
        await client.open_space(descriptor_of())
        return client

    writer, reader, wary_reader = [await client_of(server) for server in (one, two, three)]
    space = await writer.open_space(descriptor_of())
    keys = keys_of("chat", BLOCKS)
    await store(writer, space, keys)
    await met(one, two, three)
    assert await load(reader, space, keys) == ["peers"] * BLOCKS
    assert await load(wary_reader, space, keys) == [None] * BLOCKS
    nowhere = good | {"peers": trust | {"tls_ca_file": tmp_path / "none"}}
    with pytest.raises(ConfigError, match=r"peers\.tls_ca_file: .*none"):
        await cluster.node("four", **nowhere)
    assert counter(one, "requests", op="peer_read", status="ok") == 1


def test_a_node_that_is_killed_between_match_and_load(tmp_path: Path, redis_url: str) -> None:
    """Two real processes: what was only likely does not come, in time; the rest goes on."""
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(32)))
    processes = [NodeProcess(tmp_path / name) for name in ("one", "two")]
    for process in processes:
        process.home.mkdir()
        process.start(
            "--peers-enabled=true", f"--redis-directory-url={redis_url}",
            f"--cluster-secret-file={secret}", f"--cluster-node-id={process.home.name}",
            "--peers-lookup-timeout-s=30", "--peers-timeout-s=30",
        )  # fmt: skip
    one, two = processes
    with (
        Client(one.endpoint, budgets=PATIENT) as writer,
        Client(two.endpoint, budgets=PATIENT) as reader,
    ):
        space = writer.open_space(descriptor_of())
        reader.open_space(descriptor_of())
        keys = keys_of("chat", BLOCKS)
        blocks = [expected(space, key) for key in keys]
        assert writer.store(space, keys, blocks) == [True] * BLOCKS
        while reader.locate(space, keys) != ["peers"] * BLOCKS:
            pass  # The node announces its blocks behind the answer.
        buffers = [bytearray(BLOCK_BYTES) for _ in keys]
        assert reader.load(space, keys[:4], buffers[:4]) != []
        assert [bytes(buffer) for buffer in buffers[:4]] == blocks[:4]
        match = reader.match([space], keys, lease_ms=0)
        assert match.blocks == BLOCKS
        one.kill()
        answers = reader.load_any(space, keys, buffers)
        for answer, buffer, block in zip(answers, buffers, blocks, strict=True):
            assert answer is None or buffer == block
        assert [answer is not None for answer in answers[4:]] == [False] * (BLOCKS - 4)
        assert reader.locate(space, keys[4:]) == [None] * (BLOCKS - 4)
        assert reader.store(space, keys, blocks) == [True] * BLOCKS
        loaded = reader.load_any(space, keys, buffers)
        assert [answer.tier for answer in loaded if answer] == ["memory"] * BLOCKS
    two.stop()


async def test_bogus_entries_of_the_directory_harm_nobody(cluster: Cluster) -> None:
    """Endpoints that are none, entries that are no JSON, ids that are no text, and our own."""
    one, two = await cluster.pair()
    reader, space, keys = await filled(cluster, one, two)
    bogus = {
        b"blank": b'{"endpoint": " ", "life": "1"}',
        b"path": b'{"endpoint": "unix:///etc", "life": "1"}',
        b"list": b'["endpoint"]',
        b"text": b"endpoint",
        b"\xff\xfe": b'{"endpoint": "127.0.0.1:1", "life": "1"}',
        b"number": b'{"endpoint": 7, "life": {}}',
        b"long": b'{"endpoint": "%s:1", "life": "1"}' % (b"x" * 5000),
    }
    with redis.from_url(cluster.redis_url) as client:
        client.sadd("kvstore:d1:nodes", *bogus, "gone")
        for node_id, entry in bogus.items():
            client.set(b"kvstore:d1:node:" + node_id, entry)
        client.sadd("kvstore:d1:blocks:long:1", *names_of(two, space, keys[:2]))
    others = await directory_of(two).refresh()
    assert [node.node_id for node in others if node.lends] == ["long", "one"]
    cluster.strike(one, names_of(one, space, keys[:1]))
    assert await load(reader, space, keys) == [None] + ["peers"] * (BLOCKS - 1)
    assert came(two, "unreachable") == 1
    with redis.from_url(cluster.redis_url) as client:
        assert b"gone" not in client.smembers("kvstore:d1:nodes")

"""Blocks over wires: connections of redis-py, lent to threads, with faults at any byte."""

import asyncio
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis as sync_redis
from redis.connection import Connection

from kvstore.api.errors import TierError
from kvstore.api.tier import Block, Load
from kvstore.record import HEADER_BYTES
from kvstore.runner import ThreadRunner
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_parts import ASKED_BYTES, ASKED_PARTS, LONGEST_BYTES, part_key
from kvstore.tiers.redis_wire import Wire
from kvstore.tiers.redis_wires import Wires
from kvstore_workers.redis_server import RedisServer
from tests.sim.blocks import buffers_for, chain_of, namespace_of, present
from tests.sim.rig import WIRES, Rig
from tests.valve import Valve

MINE = namespace_of("mine")
SIZE = 10_000
PART_BYTES = 4096
PARTS = 3
SOON_S = 30.0
"""Longer than anything here takes, and shorter than the deadline of a socket."""


@pytest.fixture(scope="module")
def tcp_redis() -> Iterator[RedisServer]:
    """A real Redis behind a port."""
    with RedisServer(policy="noeviction", tcp=True) as server:
        yield server


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for loopback and its key, in one file."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("openssl makes the certificate")
    home = tmp_path_factory.mktemp("tls")
    pem = home / "both.pem"
    subprocess.run(
        [
            openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
            "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
            "subjectAltName=IP:127.0.0.1", "-keyout", str(home / "key"), "-out", str(home / "cert"),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    pem.write_bytes((home / "key").read_bytes() + (home / "cert").read_bytes())
    return pem


@pytest.fixture(params=["plain", "tls"])
def valve(request: pytest.FixtureRequest, tcp_redis: RedisServer) -> Iterator[Valve]:
    """A relay in front of it, where clients may have to speak TLS."""
    port = urlsplit(tcp_redis.url).port
    assert port is not None
    context = None
    if request.param == "tls":
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(request.getfixturevalue("certificate"))
    with Valve(port, context) as relay:
        yield relay


@pytest.fixture
def url(request: pytest.FixtureRequest, valve: Valve, tcp_redis: RedisServer) -> str:
    """The way through the relay."""
    password = urlsplit(tcp_redis.url).password
    if "tls" not in request.node.callspec.id.split("-"):
        return f"redis://:{password}@127.0.0.1:{valve.port}/0"
    pem = request.getfixturevalue("certificate")
    return f"rediss://:{password}@127.0.0.1:{valve.port}/0?ssl_ca_certs={pem}"


@pytest.fixture
def server(tcp_redis: RedisServer) -> Iterator[sync_redis.Redis]:
    """The server itself, empty at first."""
    with sync_redis.from_url(tcp_redis.url) as client:
        client.flushall()
        yield client


@pytest.fixture
def tier(rig: Rig, url: str, server: sync_redis.Redis) -> RedisTier:
    """Over small parts, without a codec."""
    return rig.redis(url, part_bytes=PART_BYTES)


def chain(count: int = 4, word: str = "chain", size: int = SIZE) -> list[Block]:
    """A chain of blocks."""
    return chain_of(word, count, MINE, size)


async def held(valve: Valve) -> None:
    """Returns when bytes are being held back."""
    assert await asyncio.to_thread(valve.is_held.wait, SOON_S), "nothing is held back"


def answer_bytes(block: Block) -> int:
    """What Redis answers to GETs of all parts of a block."""
    parts = [PART_BYTES + HEADER_BYTES] * 2
    parts.append(HEADER_BYTES + SIZE - sum(parts))
    return sum(len(b"$%d\r\n" % part) + part + 2 for part in parts)


def places() -> list[int]:
    """Bytes of an answer at which something may go wrong: in and beside all that is not value."""
    first = len(b"$4352\r\n")
    part = PART_BYTES + HEADER_BYTES
    starts = [0, first + part + 2, 2 * (first + part + 2)]
    around = [
        *range(first + 2),
        *range(first + HEADER_BYTES - 1, first + HEADER_BYTES + 2),
        *range(first + part - 1, first + part + 2),
    ]
    total = answer_bytes(chain()[0])
    return sorted({start + place for start in starts for place in around if start + place < total})


# Anywhere in an answer.


async def test_a_server_that_pauses_anywhere_is_waited_for(tier: RedisTier, valve: Valve) -> None:
    """Whatever the byte at which an answer stops for a while, the block is whole."""
    blocks = chain(1)
    await tier.store(blocks)
    assert await present(tier, blocks) == [True]
    for place in places():
        valve.hold("answers", place)
        loading = asyncio.create_task(present(tier, blocks))
        await held(valve)
        assert not loading.done()
        valve.release()
        assert await loading == [True], place


async def test_a_server_that_hangs_up_anywhere_is_an_error(tier: RedisTier, valve: Valve) -> None:
    """Whatever the byte behind which the connection ends: no block, and the next load works."""
    blocks = chain(1)
    await tier.store(blocks)
    assert await present(tier, blocks) == [True]
    for place in places():
        valve.hold("answers", place)
        loading = asyncio.create_task(tier.load(buffers_for(blocks)))
        await held(valve)
        valve.cut()
        with pytest.raises(TierError, match="redis"):
            await loading
        assert await present(tier, blocks) == [True], place


# Buffers belong to their caller.


@pytest.mark.parametrize("place", [0, 5, 100, 3000, 4500, 9000])
async def test_after_a_cancelled_load_nothing_writes_to_its_buffer(
    tier: RedisTier, valve: Valve, place: int
) -> None:
    """The connection is shut before the caller goes on; what was on its way goes nowhere."""
    blocks = chain(1)
    await tier.store(blocks)
    assert await present(tier, blocks) == [True]
    into = bytearray(b"\xee" * SIZE)
    valve.hold("answers", place)
    loading = asyncio.create_task(tier.load([Load(blocks[0].ref, memoryview(into))]))
    await held(valve)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    into[:] = b"\xaa" * SIZE
    assert await asyncio.to_thread(valve.has_hung_up.wait, SOON_S), "the connection was not shut"
    valve.release()
    assert await present(tier, blocks) == [True]
    assert into == b"\xaa" * SIZE


async def test_a_cancelled_load_waits_for_the_thread_that_fills_its_buffer(
    tier: RedisTier, valve: Valve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled once or again, it does not return while somebody is at the caller's memory."""
    blocks = chain(1)
    await tier.store(blocks)
    running: list[str] = []
    reached = threading.Event()
    receive = Wire.receive

    def watched(wire: Wire, view: memoryview) -> None:
        running.append("began")
        if len(view) > HEADER_BYTES:
            reached.set()
        try:
            receive(wire, view)
        finally:
            running.append("ended")

    monkeypatch.setattr(Wire, "receive", watched)
    valve.hold("answers", 300)
    loading = asyncio.create_task(tier.load(buffers_for(blocks)))
    await held(valve)
    assert await asyncio.to_thread(reached.wait, SOON_S)
    for _ in range(3):
        loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert running[-1] == "ended"


async def test_a_cancelled_store_reads_its_buffer_no_more(
    rig: Rig, url: str, valve: Valve, server: sync_redis.Redis
) -> None:
    """What the caller writes there afterwards is never sent."""
    size = 8 << 20
    blocks = chain(1, "large", size)
    source = bytearray(blocks[0].data)
    wide = rig.redis(url, part_bytes=size)
    await wide.store(chain(1))
    valve.hold("asks", 1000)
    storing = asyncio.create_task(wide.store([blocks[0]._replace(data=memoryview(source))]))
    await held(valve)
    storing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await storing
    source[:] = b"\xaa" * size
    valve.release()
    assert await asyncio.to_thread(valve.has_hung_up.wait, SOON_S), "the connection was not shut"
    assert b"\xaa" * 64 not in valve.asked
    assert await present(wide, blocks) == [False]
    assert await wide.store(blocks) == [True]
    assert await present(wide, blocks) == [True]


# What Redis answers.


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("change", [b"longer", b""], ids=["longer", "empty"])
async def test_a_part_of_another_length_is_a_miss_of_its_block_alone(
    rig: Rig, tier: RedisTier, server: sync_redis.Redis, part: int, change: bytes
) -> None:
    """The answers behind it are read where they begin."""
    blocks = chain()
    await tier.store(blocks)
    key = part_key(blocks[1].ref, part)
    value = server.get(key)
    assert isinstance(value, bytes)
    server.set(key, value + change if change else b"")
    assert await present(tier, blocks) == [True, False, True, True]
    assert rig.counted("corrupt", tier="redis") == 1
    assert not server.exists(part_key(blocks[1].ref, 0))


async def test_a_value_longer_than_any_part_is_not_read(
    rig: Rig, tier: RedisTier, valve: Valve, server: sync_redis.Redis
) -> None:
    """It is removed, its connection ended, and what the others lack there the next time."""
    blocks = chain()
    await tier.store(blocks)
    before = valve.connections
    server.setrange(part_key(blocks[1].ref, 0), LONGEST_BYTES, b"x")
    assert await present(tier, blocks) == [False] * 4
    assert rig.counted("corrupt", tier="redis") == 1
    assert await present(tier, blocks) == [True, False, True, True]
    assert valve.connections == before + 2, "one for pipelines, and one instead of what was ended"


async def test_a_refused_command_costs_no_connection(
    tier: RedisTier, valve: Valve, server: sync_redis.Redis
) -> None:
    """A value of another type is an error of its batch, and the connection is used again."""
    blocks = chain()
    await tier.store(blocks)
    server.delete(part_key(blocks[2].ref, 0))
    server.rpush(part_key(blocks[2].ref, 0), b"not a string")
    before = valve.connections
    for _ in range(3):
        with pytest.raises(TierError, match="WRONGTYPE"):
            await tier.load(buffers_for(blocks))
    assert await present(tier, [*blocks[:2], blocks[3]]) == [True] * 3
    assert valve.connections == before


async def test_a_server_that_became_a_replica_is_looked_for_again(
    tier: RedisTier, valve: Valve, server: sync_redis.Redis
) -> None:
    """READONLY is an error, and its connection is ended: the master may be elsewhere by now."""
    blocks = chain()
    await tier.store(blocks[:1])
    before = valve.connections
    server.replicaof("127.0.0.1", "1")
    try:
        for number in range(3):
            with pytest.raises(TierError, match="READONLY"):
                await tier.store(blocks)
            assert valve.connections == before + number
    finally:
        server.replicaof("NO", "ONE")
    assert await tier.store(blocks) == [True] * 4
    assert await present(tier, blocks) == [True] * 4


async def test_a_refusing_server_is_not_sent_a_whole_batch(
    tier: RedisTier, valve: Valve, server: sync_redis.Redis
) -> None:
    """A store ends soon after the first error."""
    blocks = chain(200)
    await tier.store(blocks[:1])
    sent = len(valve.asked)
    server.config_set("maxmemory", 1)
    try:
        with pytest.raises(TierError, match="OOM"):
            await tier.store(blocks)
    finally:
        server.config_set("maxmemory", 0)
    assert len(valve.asked) - sent < 50 * SIZE


@pytest.mark.parametrize(
    ("size", "most"), [(SIZE, ASKED_PARTS), (1 << 20, ASKED_BYTES // (1 << 20))]
)
async def test_few_answers_are_on_their_way_at_a_time(
    rig: Rig, redis_url: str, monkeypatch: pytest.MonkeyPatch, size: int, most: int
) -> None:
    """Redis makes all that is asked for at once, in memory that nobody counts."""
    tier = rig.redis(redis_url, part_bytes=size)
    blocks = chain(max(20, 2 * ASKED_PARTS * SIZE // size), "many", size)
    await tier.store(blocks)
    owed: list[int] = []
    value = Wire.value

    def watched(wire: Wire) -> int | None:
        owed.append(wire.owed)
        return value(wire)

    monkeypatch.setattr(Wire, "value", watched)
    assert await present(tier, blocks) == [True] * len(blocks)
    assert max(owed) == most
    assert sum(owed) > len(owed), "nothing was asked ahead"


async def test_large_batches_take_several_wires(
    rig: Rig, url: str, valve: Valve, server: sync_redis.Redis
) -> None:
    """Each takes its share; answers come in the order of the question, misses among them."""
    tier = rig.redis(url, part_bytes=1 << 20, codec="bitshuffle-lz4")
    blocks = chain(9, "large", 1 << 20)
    assert await tier.store(blocks) == [True] * 9
    assert valve.connections >= 2
    server.delete(part_key(blocks[1].ref, 0))
    server.set(part_key(blocks[7].ref, 0), b"nonsense")
    expected = [number not in (1, 7) for number in range(9)]
    assert await present(tier, blocks) == expected
    assert await present(tier, blocks[::-1]) == expected[::-1]
    server.rpush(part_key(blocks[1].ref, 0), b"not a string")
    with pytest.raises(TierError, match="WRONGTYPE"):
        await tier.load(buffers_for(blocks))


# What redis-py gives us.


async def test_redis_py_shows_the_socket_of_a_connection(
    url: str, redis_server_url: str, server: sync_redis.Redis
) -> None:
    """If this fails, redis-py has changed, and bytes go the slow way: see `_socket_of`."""
    for place in (url, redis_server_url, f"{url}{'&' if '?' in url else '?'}protocol=3&timeout=5"):
        wires = Wires.from_url(place, ThreadRunner(1), count=1, timeout_s=SOON_S)
        try:
            assert await wires.run(lambda wire: wire.is_idle)
        finally:
            await wires.close()


class Veiled:
    """A connection of a redis-py that keeps its socket elsewhere."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def disconnect(self) -> None:
        self.connection.disconnect()  # type: ignore[no-untyped-call]


class VeiledPool(sync_redis.ConnectionPool):
    """Gives such connections."""

    lent = 0

    def get_connection(self, *arguments: Any, **options: Any) -> Any:
        self.lent += 1
        return Veiled(super().get_connection())

    def release(self, connection: Any) -> None:
        super().release(connection.connection)


async def test_without_a_socket_blocks_go_through_pipelines(
    rig: Rig, url: str, server: sync_redis.Redis
) -> None:
    """The tier works as ever, and does not ask again."""
    pool = VeiledPool.from_url(url)
    tier = rig.redis(url, part_bytes=PART_BYTES, wires=Wires(pool, rig.threads()))
    blocks = chain(20)
    assert await tier.store(blocks) == [True] * 20
    assert await present(tier, blocks) == [True] * 20
    assert pool.lent == 1


async def test_a_caller_that_is_gone_before_it_has_a_connection_waits_for_nobody(
    rig: Rig, private_redis: RedisServer
) -> None:
    """Who has not begun is not waited for; a server that does not answer holds nobody up."""
    tier = rig.redis(private_redis.url)
    blocks = chain(1)
    private_redis.freeze()
    callers = [asyncio.create_task(tier.load(buffers_for(blocks))) for _ in range(3 * WIRES)]
    await asyncio.sleep(0)
    for caller in callers:
        caller.cancel()
    outcomes = await asyncio.wait_for(
        asyncio.gather(*callers, return_exceptions=True), timeout=SOON_S / 3
    )
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    private_redis.thaw()
    assert await tier.store(blocks) == [True]
    assert await present(tier, blocks) == [True]


async def test_a_closed_tier_is_an_error(rig: Rig, redis_url: str) -> None:
    """Who comes late, in a node's last moments, meets what he meets where Redis is gone."""
    tier = rig.redis(redis_url)
    blocks = chain(2)
    assert await tier.store(blocks) == [True] * 2
    await tier.close()
    for call in (lambda: tier.store(blocks), lambda: tier.load(buffers_for(blocks))):
        with pytest.raises(TierError, match="closed"):
            await call()


async def test_the_first_part_is_written_last(tier: RedisTier, valve: Valve) -> None:
    """Who finds it shall find the others as well, whenever the store was ended."""
    (block,) = chain(1)
    await tier.store([block])
    sent = [valve.asked.index(part_key(block.ref, part)) for part in range(PARTS)]
    assert max(sent) == sent[0]

"""Blocks over wires: connections of redis-py, lent to threads, with faults at any byte."""

import asyncio
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis as sync_redis

from kvstore.api.errors import TierError
from kvstore.api.tier import Block, Load
from kvstore.record import HEADER_BYTES
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_wire import Wire
from kvstore_workers.redis_server import RedisServer
from tests.sim.blocks import buffers_for, chain_of, namespace_of, present
from tests.sim.rig import Rig
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
    tier: RedisTier, valve: Valve, server: sync_redis.Redis
) -> None:
    """What the caller writes there afterwards is never sent."""
    size = 8 << 20
    blocks = chain(1, "large", size)
    source = bytearray(blocks[0].data)
    wide = rig_part(tier, size)
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


def rig_part(tier: RedisTier, part_bytes: int) -> RedisTier:
    """The same tier with other parts."""
    tier._part_bytes = part_bytes
    return tier

"""The Redis tier over a real Redis: parts, damage, limits, and a server that goes away."""

import asyncio
import random
from collections.abc import Iterator, Sequence

import pytest
import redis as sync_redis

from kvstore.api.errors import TierError
from kvstore.api.tier import Block, BlockRef
from kvstore.codec import Raw
from kvstore.names import block_name, namespace_tag
from kvstore.record import HEADER_BYTES, Header, encode_block
from kvstore.tiers.guarded import FAILURES_TO_OPEN, OPEN_S, Guarded
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_parts import part_key
from kvstore_workers.redis_server import RedisServer
from tests.sim.blocks import block_of, buffers_for, chain_of, load_all, namespace_of, present
from tests.sim.faulty import Faulty
from tests.sim.rig import Rig

MINE, THEIRS = namespace_of("mine"), namespace_of("theirs")
SIZE = 10_000
PART_BYTES = 4096
STEP = PART_BYTES + HEADER_BYTES
"""How long a part is: what bounds it is how much it holds of the block."""
PARTS = 3
"""Of a block of SIZE with its header, uncompressed."""
TTL_S = 600
SHORT_S = 0.2
"""A deadline that is met by nobody who is frozen."""


def chain(word: str = "chain", count: int = 4, namespace: bytes = MINE) -> list[Block]:
    """A chain of blocks of SIZE."""
    return chain_of(word, count, namespace, SIZE)


def refs_of(blocks: Sequence[Block]) -> list[BlockRef]:
    return [block.ref for block in blocks]


def key_of(block: Block, part: int) -> bytes:
    """Where a part lies, as docs/format.md says."""
    tag, name = namespace_tag(block.ref.namespace).hex(), block_name(block.ref).hex()
    return f"kvstore:b1:{tag}:{name}:{part}".encode()


@pytest.fixture
def server(redis_url: str) -> Iterator[sync_redis.Redis]:
    """The server itself, to look behind the tier's back."""
    with sync_redis.from_url(redis_url) as client:
        yield client


@pytest.fixture(params=["wires", "pipelines"])
def tier(request: pytest.FixtureRequest, rig: Rig, redis_url: str) -> RedisTier:
    """A tier over small parts, without a codec; its bytes go either way."""
    wired = request.param == "wires"
    return rig.redis(redis_url, part_bytes=PART_BYTES, ttl_s=TTL_S, wired=wired)


def keys_in(server: sync_redis.Redis) -> set[bytes]:
    """All keys of ours."""
    return set(server.scan_iter(match="kvstore:*", count=1000))


def value_at(server: sync_redis.Redis, key: bytes) -> bytes:
    """What lies under a key; nothing if there is none."""
    value = server.get(key)
    return value if isinstance(value, bytes) else b""


# Layout.


async def test_a_block_lies_in_parts_of_bounded_size(
    tier: RedisTier, server: sync_redis.Redis
) -> None:
    """Header and payload are cut into parts under the documented keys."""
    blocks = chain()
    assert await tier.store(blocks) == [True] * 4
    assert keys_in(server) == {key_of(block, part) for block in blocks for part in range(PARTS)}
    values = [value_at(server, key_of(blocks[0], part)) for part in range(PARTS)]
    assert [len(value) for value in values] == [
        STEP, STEP, HEADER_BYTES + SIZE - 2 * STEP,
    ]  # fmt: skip
    assert b"".join(values)[HEADER_BYTES:] == blocks[0].data
    assert await present(tier, blocks) == [True] * 4


@pytest.mark.parametrize("codec", ["raw", "bitshuffle-lz4"])
@pytest.mark.parametrize("size", [1, PART_BYTES - HEADER_BYTES, 2 * PART_BYTES, 50_001])
async def test_every_size_comes_back(rig: Rig, redis_url: str, codec: str, size: int) -> None:
    """Whether it is a byte, ends with a part, or needs many parts; with other part sizes too."""
    blocks = chain_of("chain", 4, MINE, size)
    writer = rig.redis(redis_url, codec=codec, part_bytes=PART_BYTES)
    assert await writer.store(blocks) == [True] * 4
    assert await present(writer, blocks) == [True] * 4
    reader = rig.redis(redis_url, part_bytes=3 * PART_BYTES)
    assert await present(reader, blocks) == [True] * 4, "parts are as large as their writer's"


@pytest.mark.parametrize(
    ("size", "parts"), [(1, 1), (PART_BYTES, 1), (PART_BYTES + 1, 2), (3 * PART_BYTES, 3)]
)
async def test_a_block_of_the_size_of_a_part_is_one_value(
    tier: RedisTier, server: sync_redis.Redis, size: int, parts: int
) -> None:
    """The header does not make a second part necessary."""
    blocks = chain_of("chain", 2, MINE, size)
    assert await tier.store(blocks) == [True] * 2
    assert len(keys_in(server)) == 2 * parts
    assert await present(tier, blocks) == [True] * 2


async def test_parts_without_room_for_the_header_are_read_as_well(
    tier: RedisTier, server: sync_redis.Redis
) -> None:
    """Nodes used to count the header into the first part: any length of it is that of the rest."""
    blocks = chain()
    for block in blocks:
        header, payload = encode_block(block, Raw(), now_s=0.0, ttl_s=TTL_S)
        record = header.pack() + bytes(payload)
        for part, start in enumerate(range(0, len(record), PART_BYTES)):
            server.set(key_of(block, part), record[start : start + PART_BYTES], ex=50)
    assert await present(tier, blocks) == [True] * 4
    assert await tier.wants(refs_of(blocks)) == [False] * 4
    assert {server.ttl(key) for key in keys_in(server)} <= {TTL_S - 1, TTL_S}
    assert await tier.discard(refs_of(blocks)) == 4
    assert not keys_in(server)


async def test_names_in_redis_tell_nothing(tier: RedisTier, server: sync_redis.Redis) -> None:
    """Neither namespace nor key is to be found in names or values."""
    blocks = chain()
    await tier.store(blocks)
    stored = b" ".join(sorted(keys_in(server)))
    stored += b" ".join(value_at(server, key) for key in keys_in(server))
    for secret in [MINE, *(block.ref.key for block in blocks)]:
        assert secret not in stored
        assert secret.hex().encode() not in stored


# Time to live.


async def test_every_part_expires(tier: RedisTier, server: sync_redis.Redis) -> None:
    """Nothing of ours stays in a shared server for good."""
    await tier.store(chain())
    assert {server.ttl(key) for key in keys_in(server)} <= {TTL_S - 1, TTL_S}


async def test_to_want_renews_all_parts_and_to_locate_none(
    tier: RedisTier, server: sync_redis.Redis
) -> None:
    """Who is about to demote a block that is here gives it its full time again, all of it."""
    blocks = chain()
    await tier.store(blocks)
    for key in keys_in(server):
        server.expire(key, 50)
    assert await tier.locate(refs_of(blocks)) == ["redis"] * 4
    await load_all(tier, blocks)
    assert {server.ttl(key) for key in keys_in(server)} <= {49, 50}
    assert await tier.wants(refs_of(blocks)) == [False] * 4
    assert {server.ttl(key) for key in keys_in(server)} <= {TTL_S - 1, TTL_S}


# Damage.


async def damaged(
    rig: Rig, tier: RedisTier, server: sync_redis.Redis, blocks: list[Block], victim: int
) -> None:
    """One block is a counted miss and gone; the next store repairs it."""
    before = rig.counted("corrupt", tier="redis")
    expected = [index != victim for index in range(len(blocks))]
    assert await present(tier, blocks) == expected
    assert rig.counted("corrupt", tier="redis") == before + 1
    assert not server.exists(key_of(blocks[victim], 0)), "what is damaged is removed"
    assert await tier.wants(refs_of(blocks)) == [not here for here in expected]
    assert await tier.store([blocks[victim]]) == [True]
    assert await present(tier, blocks) == [True] * len(blocks)
    assert rig.counted("corrupt", tier="redis") == before + 1


@pytest.mark.parametrize("codec", ["raw", "bitshuffle-lz4"])
async def test_a_flipped_bit_anywhere_is_a_miss(
    rig: Rig, redis_url: str, server: sync_redis.Redis, rng: random.Random, codec: str
) -> None:
    """In the header, in any part: never a wrong byte; counted, removed, and repaired."""
    tier = rig.redis(redis_url, codec=codec, part_bytes=PART_BYTES)
    blocks = chain()
    await tier.store(blocks)
    for number in range(24):
        victim = rng.randrange(4)
        keys = [key_of(blocks[victim], part) for part in range(PARTS)]
        keys = [key for key in keys if server.exists(key)]
        key = keys[0] if number < 8 else rng.choice(keys)
        value = bytearray(value_at(server, key))
        bit = rng.randrange(8 * (HEADER_BYTES if number < 8 else len(value)))
        value[bit // 8] ^= 1 << bit % 8
        server.set(key, bytes(value), keepttl=True)
        await damaged(rig, tier, server, blocks, victim)


async def test_swapped_values_are_misses(
    rig: Rig, tier: RedisTier, server: sync_redis.Redis
) -> None:
    """A whole, intact block under the name of another one is not that block."""
    blocks = chain()
    await tier.store(blocks)
    for part in range(PARTS):
        one, two = (value_at(server, key_of(blocks[index], part)) for index in (0, 2))
        server.set(key_of(blocks[0], part), two)
        server.set(key_of(blocks[2], part), one)
    assert await present(tier, blocks) == [False, True, False, True]
    assert rig.counted("corrupt", tier="redis") == 2
    assert await tier.store([blocks[0], blocks[2]]) == [True] * 2
    assert await present(tier, blocks) == [True] * 4


async def test_another_tenants_value_is_a_miss(
    rig: Rig, tier: RedisTier, server: sync_redis.Redis
) -> None:
    """An intact block with the same key, copied from another namespace, is not this one."""
    mine, theirs = chain(count=4), chain(count=4, namespace=THEIRS)
    await tier.store([*mine, *theirs])
    for part in range(PARTS):
        server.set(key_of(mine[1], part), value_at(server, key_of(theirs[1], part)))
    await damaged(rig, tier, server, mine, 1)


@pytest.mark.parametrize("keep", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, PART_BYTES - 1])
async def test_a_truncated_first_part_is_a_miss(
    rig: Rig, tier: RedisTier, server: sync_redis.Redis, keep: int
) -> None:
    """However short it is, also shorter than a header."""
    blocks = chain()
    await tier.store(blocks)
    value = value_at(server, key_of(blocks[1], 0))
    server.set(key_of(blocks[1], 0), value[:keep])
    assert await present(tier, blocks) == [True, False, True, True]
    assert not server.exists(key_of(blocks[1], 0))
    await tier.store([blocks[1]])
    assert await present(tier, blocks) == [True] * 4


@pytest.mark.parametrize("keep", [0, 1, PART_BYTES - 1])
async def test_a_truncated_later_part_is_a_miss(
    rig: Rig, tier: RedisTier, server: sync_redis.Redis, keep: int
) -> None:
    """The parts together are as long as the header says, or nothing is delivered."""
    blocks = chain()
    await tier.store(blocks)
    value = value_at(server, key_of(blocks[1], 1))
    server.set(key_of(blocks[1], 1), value[:keep])
    await damaged(rig, tier, server, blocks, 1)


@pytest.mark.parametrize("part", [1, 2])
async def test_a_missing_part_is_a_miss_and_no_damage(
    rig: Rig, tier: RedisTier, server: sync_redis.Redis, part: int
) -> None:
    """Redis evicts part by part; what is left of a block goes too, and the next store repairs."""
    blocks = chain()
    await tier.store(blocks)
    server.delete(key_of(blocks[2], part))
    assert await present(tier, blocks) == [True, True, False, True]
    assert rig.counted("corrupt", tier="redis") == 0
    assert await tier.wants(refs_of(blocks)) == [False, False, True, False]
    await tier.store([blocks[2]])
    assert await present(tier, blocks) == [True] * 4


async def test_strangers_values_are_misses(
    rig: Rig, tier: RedisTier, server: sync_redis.Redis, rng: random.Random
) -> None:
    """Whatever somebody writes under our names is never delivered."""
    blocks = chain()
    values = [b"", b"hello", rng.randbytes(HEADER_BYTES), rng.randbytes(PART_BYTES)]
    for value in values:
        await tier.store(blocks)
        server.set(key_of(blocks[3], 0), value)
        await damaged(rig, tier, server, blocks, 3)


async def test_a_value_of_another_type_is_an_error_of_its_batch_alone(
    rig: Rig, tier: RedisTier, server: sync_redis.Redis
) -> None:
    """A list under our name makes Redis complain: `TierError`, and other batches go on."""
    blocks = chain()
    await tier.store(blocks)
    server.delete(key_of(blocks[0], 0))
    server.rpush(key_of(blocks[0], 0), b"not a string")
    with pytest.raises(TierError, match="redis"):
        await tier.load(buffers_for(blocks))
    assert await present(tier, blocks[1:]) == [True] * 3


async def test_a_header_that_promises_the_world_costs_nothing(
    rig: Rig, tier: RedisTier, server: sync_redis.Redis
) -> None:
    """A record far longer than the block is refused before anything is fetched for it."""
    blocks = chain()
    await tier.store(blocks)
    huge = block_of(blocks[1].ref, blocks[1].parent, 1 << 20)
    await rig.redis(_url(server), part_bytes=PART_BYTES, ttl_s=TTL_S).store([huge])
    commands = server.info("commandstats")["cmdstat_get"]["calls"]
    await damaged(rig, tier, server, blocks, 1)
    asked = server.info("commandstats")["cmdstat_get"]["calls"] - commands
    assert asked < 40, "the parts of a block that cannot fit were fetched"


async def test_a_length_that_nobody_wrote_is_not_followed(
    tier: RedisTier, server: sync_redis.Redis
) -> None:
    """A header of a gibibyte in a short value does not make a look-up go through its parts."""
    (block,) = chain(count=1)
    hostile = Header(block_bytes=2**30, stored_bytes=2**30, name=block_name(block.ref))
    server.set(key_of(block, 0), hostile.pack())
    assert await tier.wants([block.ref]) == [True]
    assert await tier.discard([block.ref]) == 1
    assert not keys_in(server)


def _url(server: sync_redis.Redis) -> str:
    kwargs = server.connection_pool.connection_kwargs
    if "path" in kwargs:
        return f"unix://{kwargs['path']}?db={kwargs.get('db', 0)}"
    password = f":{kwargs['password']}@" if kwargs.get("password") else ""
    return f"redis://{password}{kwargs['host']}:{kwargs['port']}/{kwargs.get('db', 0)}"


# Limits.


async def test_a_full_allowance_refuses(rig: Rig, redis_url: str, server: sync_redis.Redis) -> None:
    """Beyond `capacity_bytes` of the server's memory nothing is added; what is there is served."""
    used = int(server.info("memory")["used_memory"])
    tier = rig.redis(redis_url, capacity_bytes=used + 60 * SIZE, part_bytes=PART_BYTES)
    at_once = chain("at once", 100)
    held = await tier.store(at_once)
    assert 10 <= sum(held) < 90, "a single batch may exceed the allowance"
    assert await present(tier, at_once) == held
    await tier.discard(refs_of(at_once))
    blocks = chain(count=100)
    held = []
    for start in range(0, 100, 10):
        held += await tier.store(blocks[start : start + 10])
    assert 10 <= sum(held) < 90
    assert await present(tier, blocks) == held
    assert int(server.info("memory")["used_memory"]) < used + 120 * SIZE
    assert tier.usage()[0].used_bytes > 0


async def test_a_server_out_of_memory_is_an_error_and_serves_on(rig: Rig) -> None:
    """Redis that refuses writes is a `TierError`; what it has can still be read."""
    with RedisServer(maxmemory_bytes=3 << 20, policy="noeviction") as server:
        tier = rig.redis(server.url)
        blocks = chain(count=300)
        stored = 0
        with pytest.raises(TierError, match="redis"):
            for start in range(0, 300, 10):
                assert await tier.store(blocks[start : start + 10]) == [True] * 10
                stored = start + 10
        assert 0 < stored < 300
        assert await present(tier, blocks[:stored]) == [True] * stored


async def test_a_server_that_evicts_under_us_never_lies(rig: Rig) -> None:
    """With LRU eviction of single parts some blocks are gone, and none is wrong."""
    with RedisServer(maxmemory_bytes=3 << 20, policy="allkeys-random") as server:
        tier = rig.redis(server.url)
        blocks = chain(count=300)
        for start in range(0, 300, 20):
            await tier.store(blocks[start : start + 20])
        here = await present(tier, blocks)
        assert here.count(False) > 0
        assert here.count(True) > 0
        assert rig.counted("corrupt", tier="redis") == 0


# Forgetting.


async def test_clear_counts_blocks_and_leaves_no_part(
    tier: RedisTier, server: sync_redis.Redis
) -> None:
    """All parts of a namespace go; other namespaces and other people's keys stay."""
    server.set("kvstore:d1:node:somebody", b"{}")
    mine, theirs = chain(count=30), chain("theirs", 3, THEIRS)
    await tier.store([*mine, *theirs])
    assert await tier.clear(MINE) == 30
    assert len(keys_in(server)) == 3 * PARTS + 1
    assert await present(tier, theirs) == [True] * 3


async def test_discard_leaves_no_part(tier: RedisTier, server: sync_redis.Redis) -> None:
    """What is forgotten for good is not left to expire; what it is beside stays."""
    blocks = chain()
    await tier.store(blocks)
    assert await tier.discard(refs_of([*blocks[1:3], *chain("absent", 2)])) == 2
    assert keys_in(server) == {
        key_of(block, part) for block in (blocks[0], blocks[3]) for part in range(PARTS)
    }
    assert await present(tier, blocks) == [True, False, False, True]


# A server that goes away.


async def test_a_server_that_is_gone_is_a_tier_error(rig: Rig, private_redis: RedisServer) -> None:
    """Every operation says so, and all of them work again when it is back."""
    tier = rig.redis(private_redis.url)
    blocks = chain()
    await tier.store(blocks)
    private_redis.kill()
    refs = refs_of(blocks)
    for call in (
        lambda: tier.locate(refs),
        lambda: tier.wants(refs),
        lambda: tier.load(buffers_for(blocks)),
        lambda: tier.store(blocks),
        lambda: tier.discard(refs),
        lambda: tier.clear(MINE),
    ):
        with pytest.raises(TierError, match="redis"):
            await call()
    private_redis.start()
    assert await present(tier, blocks) == [False] * 4
    assert await tier.store(blocks) == [True] * 4
    assert await present(tier, blocks) == [True] * 4


async def test_the_breaker_opens_after_three_failures_and_tries_again(
    rig: Rig, private_redis: RedisServer
) -> None:
    """Then everything is a miss at once, for a second; then one batch at a time tries."""
    inner = Faulty(rig.redis(private_redis.url))
    tier = rig.guarded(inner)
    blocks = chain()
    assert await tier.store(blocks) == [True] * 4
    private_redis.kill()
    for failure in range(FAILURES_TO_OPEN):
        assert tier.serving, failure
        assert await load_all(tier, blocks) == [None] * 4
    assert not tier.serving
    assert not tier.usage()[0].serving
    asked = inner.asked.total()
    assert await tier.locate(refs_of(blocks)) == [None] * 4
    assert await tier.store(blocks) == [False] * 4
    assert await load_all(tier, blocks) == [None] * 4
    assert inner.asked.total() == asked, "an open breaker asks nobody"
    assert rig.counted("tier_errors", tier="redis", cause="error") == FAILURES_TO_OPEN
    assert rig.counted("tier_errors", tier="redis", cause="open") == 3
    await rig.clock.advance(OPEN_S)
    assert await load_all(tier, blocks) == [None] * 4
    assert inner.asked.total() == asked + 4, "after a second one batch tries"
    assert await load_all(tier, blocks) == [None] * 4
    assert inner.asked.total() == asked + 4, "and only one"
    private_redis.start()
    assert await tier.locate(refs_of(blocks)) == [None] * 4
    assert not tier.serving
    await rig.clock.advance(OPEN_S)
    assert await tier.store(blocks) == [True] * 4
    assert tier.serving
    assert await present(tier, blocks) == [True] * 4


async def test_while_half_open_one_batch_tries(rig: Rig) -> None:
    """Of many callers at the moment when a second is over, one is let through."""
    inner = Faulty(rig.memory())
    tier = rig.guarded(inner)
    reached, opened = asyncio.Event(), asyncio.Event()

    async def fail(operation: str, refs: Sequence[BlockRef]) -> None:
        raise TierError("planted")

    async def wait(operation: str, refs: Sequence[BlockRef]) -> None:
        reached.set()
        await opened.wait()

    blocks = chain()
    inner.before = fail
    for _ in range(FAILURES_TO_OPEN):
        await load_all(tier, blocks)
    await rig.clock.advance(OPEN_S)
    inner.before = wait
    asked = inner.asked.total()
    callers = [asyncio.create_task(load_all(tier, blocks)) for _ in range(5)]
    await reached.wait()
    assert inner.asked.total() == asked + 4
    opened.set()
    await asyncio.gather(*callers)
    assert tier.serving


async def test_a_frozen_server_is_a_miss_within_the_deadline(
    rig: Rig, private_redis: RedisServer
) -> None:
    """Nobody waits longer than the deadline; what comes late is nobody's answer.

    When the server goes on, its late replies must not be taken for those to later questions.
    """
    inner = rig.redis(private_redis.url)
    tier = Guarded(
        inner,
        lookup_timeout_s=SHORT_S,
        timeout_s=SHORT_S,
        clock=rig.clock,
        metrics=rig.metrics,
    )
    blocks, others = chain("blocks", 6), chain("others", 6)
    assert await tier.store([*blocks, *others]) == [True] * 12
    loop = asyncio.get_running_loop()
    private_redis.freeze()
    started_s = loop.time()
    answers = await asyncio.gather(load_all(tier, blocks), load_all(tier, others))
    assert list(answers) == [[None] * 6] * 2
    assert loop.time() - started_s < 20 * SHORT_S
    assert rig.counted("tier_errors", tier="redis", cause="late") == 2
    private_redis.thaw()
    patient = rig.guarded(inner)
    for _ in range(5):
        assert await present(patient, others) == [True] * 6
        assert await present(patient, blocks) == [True] * 6
    assert await patient.locate(refs_of(blocks)) == ["redis"] * 6
    assert rig.counted("corrupt", tier="redis") == 0


async def test_cancelled_callers_never_cross_answers(
    rig: Rig, tier: RedisTier, rng: random.Random
) -> None:
    """Batches that are given up at random moments leave no reply behind for the next one."""
    chains = [chain(str(number), 3) for number in range(6)]
    for blocks in chains:
        await tier.store(blocks)
    cancelled = 0
    for _ in range(60):
        callers = [asyncio.create_task(load_all(tier, rng.choice(chains))) for _ in range(3)]
        for _ in range(rng.randrange(12)):
            await asyncio.sleep(0)
        callers[0].cancel()
        outcomes = await asyncio.gather(*callers, return_exceptions=True)
        cancelled += isinstance(outcomes[0], asyncio.CancelledError)
        assert not any(isinstance(outcome, Exception) for outcome in outcomes), outcomes
    assert cancelled > 20
    for blocks in chains:
        assert await present(tier, blocks) == [True] * 3
    assert rig.counted("corrupt", tier="redis") == 0


async def test_a_repair_that_is_refused_takes_no_other_block_along(rig: Rig) -> None:
    """Whoever may not delete still reads what is whole."""
    with RedisServer() as server:
        tier = rig.redis(server.url)
        blocks = chain_of("chain", 3, namespace_of("space"), 20_000)
        assert all(await tier.store(blocks))
        client = sync_redis.Redis.from_url(server.url)
        client.delete(part_key(blocks[1].ref, 1))
        client.execute_command("ACL", "SETUSER", "default", "-unlink")  # type: ignore[no-untyped-call]
        loads = buffers_for(blocks)
        answers = await tier.load(loads)
        assert [answer is not None for answer in answers] == [True, False, True]
        client.close()

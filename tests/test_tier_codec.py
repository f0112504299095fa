"""The codec of a tier: it follows the link, counts, and loses nothing that nobody allowed."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from kvstore.api.clock import SystemClock
from kvstore.api.digest import block_digest
from kvstore.api.tier import Block, BlockRef, Load
from kvstore.codec import AUTO, LOSSLESS, NAMES, NO_LOSS, CodecId, decode
from kvstore.codec_choice import FIRST_TRIALS, TRIAL_BLOCKS, TRIAL_PERIOD_S
from kvstore.metrics import Metrics
from kvstore.names import block_name
from kvstore.record import decode_block, encode_block
from kvstore.spaces import NAMESPACES, Spaces
from kvstore.tier_codec import CHOICES, SAMPLE_BYTES, TierCodec, _sample
from kvstore_client.status_command import CodecUse, codecs_of
from tests.sim.blocks import keys_of, namespace_of
from tests.sim.clock import ManualClock
from tests.sim.nodes import Nodes, descriptor_of
from tests.sim.rig import Rig

NAMESPACE, SPACE_ID = namespace_of("mine"), bytes(range(32))
MIB = 1 << 20


def kv_bytes(rng: random.Random, values: int = 20_000) -> bytes:
    """bf16 of a bell curve."""
    numbers = np.random.default_rng(rng.randrange(2**32)).normal(0, 1, values)
    return (numbers.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


def block_with(data: bytes, namespace: bytes = NAMESPACE) -> Block:
    """A block of these bytes, with the digest that its writer gave it."""
    [key] = keys_of("block", 1)
    digest = block_digest(SPACE_ID, key, data)
    return Block(BlockRef(namespace, key), None, digest, memoryview(data))


class Bench:
    """A tier's codec under test."""

    def __init__(self, codec: str = AUTO, lossy: str = NO_LOSS, dtype: str = "bfloat16") -> None:
        self.spaces, self.metrics, self.clock = Spaces(), Metrics(), ManualClock()
        if dtype:
            self.spaces.learn(NAMESPACE, SPACE_ID, dtype)
        self.codec = TierCodec("disk", codec, lossy, self.spaces, self.clock, self.metrics)

    def link(self, bytes_per_s: float) -> None:
        """So fast it has been of late."""
        for direction in ("put", "get"):
            for _ in range(200):
                self.codec.moved(direction, MIB, MIB / bytes_per_s)

    def used(self, blocks: Sequence[Block]) -> list[CodecId]:
        """What each block is encoded by."""
        return [self.codec.encode(block).codec for block in blocks]

    def counted(self, metric: str, **labels: str) -> float:
        """What a counter says."""
        name = f"kvstore_{metric}_total"
        return self.metrics.registry.get_sample_value(name, {"tier": "disk"} | labels) or 0.0


def timed(link_bytes_per_s: float, data: bytes) -> CodecId:
    """What real measurements choose behind a link of this speed."""
    bench = Bench()
    bench.codec = TierCodec("disk", AUTO, NO_LOSS, bench.spaces, SystemClock(), bench.metrics)
    bench.link(link_bytes_per_s)
    return bench.used([block_with(data)] * FIRST_TRIALS)[-1]


def test_a_slow_link_gets_the_strong_codec_and_a_fast_one_none(rng: random.Random) -> None:
    """With the clock of this machine: 1 MB/s and 1 PB/s lie far from anything a CPU does."""
    kv = kv_bytes(rng)
    assert timed(1e6, kv) is CodecId.PLANES_ZSTD
    assert timed(1e15, kv) is CodecId.RAW
    assert timed(1e6, rng.randbytes(len(kv))) is CodecId.RAW


def test_a_link_that_changes_changes_the_codec(rng: random.Random) -> None:
    """From one block to the next; what was stored before says itself how it is read."""
    bench, block = Bench(), block_with(kv_bytes(rng))
    assert bench.used([block]) == [CodecId.BITSHUFFLE_LZ4]  # Nothing is known yet.
    bench.link(1e6)
    # On this clock encoding takes no time at all.
    assert bench.used([block]) == [CodecId.PLANES_ZSTD]
    assert bench.counted("codec_changes", codec="planes-zstd") == 1


def test_trials_are_bounded(rng: random.Random) -> None:
    """After the first blocks, one in `TRIAL_BLOCKS` at most, and only as time goes by."""
    bench, block = Bench(), block_with(kv_bytes(rng, 500))
    bench.used([block] * 10 * TRIAL_BLOCKS)
    assert bench.counted("codec_trials") == FIRST_TRIALS
    bench.clock._now_s += TRIAL_PERIOD_S
    bench.used([block] * 10 * TRIAL_BLOCKS)
    assert bench.counted("codec_trials") == FIRST_TRIALS + 1


def test_a_large_block_is_tried_in_parts_of_all_of_it(rng: random.Random) -> None:
    """One that only begins like KV is seen to be noise for the most; a trial takes a part of it."""
    head = kv_bytes(rng, SAMPLE_BYTES // 2)
    block = block_with(head + rng.randbytes(8 * SAMPLE_BYTES))
    stored = {trial.codec: trial.stored for trial in Bench().codec._try(block, 2)}
    assert 0.85 < stored[CodecId.PLANES_ZSTD] < 0.95
    stored = {trial.codec: trial.stored for trial in Bench().codec._try(block_with(head), 2)}
    assert stored[CodecId.PLANES_ZSTD] < 0.75
    assert len(_sample(block.data)) == SAMPLE_BYTES
    assert _sample(block.data)[-100:] != block.data[SAMPLE_BYTES - 100 : SAMPLE_BYTES]
    for size in (1, SAMPLE_BYTES - 1, SAMPLE_BYTES, SAMPLE_BYTES + 1, SAMPLE_BYTES + 5000):
        assert len(_sample(memoryview(bytes(size)))) == min(size, SAMPLE_BYTES)


def test_what_is_used_is_counted(rng: random.Random) -> None:
    """Blocks, and bytes before and after, by codec; the link's speed as well."""
    for name, codec in LOSSLESS.items():
        bench, block = Bench(name), block_with(kv_bytes(rng))
        encoded = bench.codec.encode(block)
        assert encoded.codec is codec
        assert bench.counted("codec_blocks", codec=name) == 1
        assert bench.counted("codec_in_bytes", codec=name) == len(block.data)
        assert bench.counted("codec_out_bytes", codec=name) == len(encoded.payload)
        assert bench.counted("codec_trials") == 0
    bench.link(1e6)
    gauge = "kvstore_link_bytes_per_second"
    speed = bench.metrics.registry.get_sample_value(gauge, {"tier": "disk", "direction": "get"})
    assert speed == pytest.approx(1e6)
    bench.codec.moved("get", 300, 1.0)
    assert bench.metrics.registry.get_sample_value(
        gauge, {"tier": "disk", "direction": "get"}
    ) == pytest.approx(1e6), "so little says nothing of the speed"


def test_what_is_remembered_is_bounded() -> None:
    """Namespaces are any that callers think of."""
    bench = Bench("auto", dtype="")
    for number in range(CHOICES + 10):
        bench.codec.encode(block_with(bytes(10), namespace_of(str(number))))
    assert len(bench.codec._choices) == CHOICES
    for number in range(NAMESPACES + 10):
        bench.spaces.learn(number.to_bytes(32), SPACE_ID, "bfloat16")
    assert len(bench.spaces._spaces) == NAMESPACES
    assert bench.spaces.find(bytes(32)) is None
    assert bench.spaces.find((NAMESPACES + 9).to_bytes(32)) is not None


@pytest.mark.parametrize(
    ("dtype", "item_bytes", "floats"),
    [
        ("bfloat16", 2, "bfloat16"), ("torch.float16", 2, "float16"), ("FP32", 4, "float32"),
        ("float8_e4m3fn", 1, ""), ("fp8_e5m2", 1, ""), ("int8", 1, ""), ("float64", 8, ""),
        ("packed weird", 2, ""),
    ],
)  # fmt: skip
def test_a_dtype_says_how_wide_values_are(dtype: str, item_bytes: int, floats: str) -> None:
    """However it is written; only three of them may lose anything."""
    bench = Bench("raw", "int8", dtype)
    space = bench.spaces.find(NAMESPACE)
    assert space is not None
    assert space.item_bytes == item_bytes
    zeros = block_with(bytes(6000))
    assert (bench.codec.encode(zeros).codec is CodecId.INT8) == bool(floats)
    assert not floats or space.dtype == floats
    planes = Bench("planes-zstd", dtype=dtype).codec.encode(zeros)
    assert planes.codec is CodecId.PLANES_ZSTD
    assert planes.payload[0] == item_bytes


@pytest.mark.parametrize("lossy", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_blocks_of_any_size_are_taken(lossy: str, dtype: str, rng: random.Random) -> None:
    """Also those in which there is not one value; what is stored is never longer."""
    bench = Bench(AUTO, lossy, dtype)
    for size in range(1, 300):
        block = block_with(bytes(size - size // 2) + rng.randbytes(1) * (size // 2))
        header, payload = encode_block(block, bench.codec, now_s=0)
        assert len(payload) <= size
        into = bytearray(size)
        digest = decode_block(header, block_name(block.ref), memoryview(payload), memoryview(into))
        assert digest == block_digest(SPACE_ID, block.ref.key, bytes(into))


@pytest.mark.parametrize("lossy", ["fp8", "int8"])
def test_a_lossy_block_comes_back_with_a_digest_of_its_own(lossy: str, rng: random.Random) -> None:
    """The reader's check holds for the bytes that he gets, and would not for others."""
    bench, block = Bench("auto", lossy), block_with(kv_bytes(rng))
    header, payload = encode_block(block, bench.codec, now_s=0)
    assert NAMES[header.codec] == lossy
    assert len(payload) < 0.6 * len(block.data)
    into = bytearray(len(block.data))
    digest = decode_block(header, block_name(block.ref), memoryview(payload), memoryview(into))
    assert into != block.data
    assert digest == block_digest(SPACE_ID, block.ref.key, bytes(into)) != block.digest
    again = bench.codec.encode(block._replace(data=memoryview(into), digest=digest))
    assert again.codec is header.codec
    assert again.digest == digest, "it lost twice"


def test_what_was_damaged_in_memory_is_not_blessed(rng: random.Random) -> None:
    """A digest of its own is given only to what had the writer's; else readers notice it still."""
    bench, data = Bench("raw", "int8"), bytearray(kv_bytes(rng))
    block = block_with(bytes(data))
    data[100] ^= 1
    encoded = bench.codec.encode(block._replace(data=memoryview(data)))
    assert (encoded.codec, encoded.digest) == (CodecId.RAW, block.digest)


def test_what_would_miss_its_bound_is_kept_exactly(rng: random.Random) -> None:
    """Infinities come back as they were, and are counted."""
    bench = Bench("planes-zstd", "fp8")
    data = bytearray(kv_bytes(rng))
    data[1000:1002] = b"\x80\x7f"
    block = block_with(bytes(data))
    encoded = bench.codec.encode(block)
    assert (encoded.codec, encoded.digest) == (CodecId.PLANES_ZSTD, block.digest)
    into = memoryview(bytearray(len(data)))
    decode(encoded.codec, memoryview(encoded.payload), into)
    assert into == data
    assert bench.counted("codec_kept_exact") == 1


def test_nothing_is_lost_in_a_space_that_is_not_known(rng: random.Random) -> None:
    """As long as no request has named it."""
    bench = Bench("auto", "int8", dtype="")
    assert bench.codec.encode(block_with(kv_bytes(rng))).codec in LOSSLESS.values()


@pytest.mark.parametrize("codec", [AUTO, *LOSSLESS])
async def test_a_tier_reports_what_its_link_moves(rig: Rig, redis_url: str, codec: str) -> None:
    """Disk and Redis both say how long stored bytes took, each way; blocks come back exactly."""
    for name in ("disk", "redis"):
        spaces = Spaces()
        tier_codec = TierCodec(name, codec, NO_LOSS, spaces, SystemClock(), rig.metrics)
        seen: list[tuple[str, int]] = []

        def moved(way: str, size: int, seconds: float, seen: list[tuple[str, int]] = seen) -> None:
            assert seconds >= 0
            seen.append((way, size))

        tier_codec.moved = moved  # type: ignore[method-assign, assignment]
        tier = (
            rig.redis(redis_url, codec=tier_codec)
            if name == "redis"
            else await rig.disk(codec=tier_codec)
        )
        block = block_with(kv_bytes(random.Random(1), 10_000))
        assert await tier.store([block]) == [True]
        into = memoryview(bytearray(len(block.data)))
        [loaded] = await tier.load([Load(block.ref, into)])
        assert loaded is not None
        assert (into == block.data, loaded.digest) == (True, block.digest)
        sizes = dict(seen)
        assert set(sizes) == {"put", "get"}
        assert all(0.3 < size / len(block.data) < 1.3 for size in sizes.values())


@pytest.mark.parametrize("lossy", ["fp8", "int8"])
async def test_a_node_restores_from_a_lossy_disk_after_a_restart(
    nodes: Nodes, rng: random.Random, lossy: str
) -> None:
    """The client's own check of digests holds, and no restart after the first changes a byte."""
    sections: dict[str, Any] = {"disk": {"lossy": lossy}}
    keys = keys_of("chain", 4)
    stored = [kv_bytes(rng, 4000) for _ in keys]
    came: list[list[bytes]] = []
    for _ in range(3):
        server = await nodes.start(**sections)
        client = nodes.connect(server)
        space = await client.open_space(descriptor_of(len(stored[0])))
        if not came:
            assert await client.store(space, keys, stored) == [True] * 4
            came.append(stored)
        else:
            match = await client.match([space], keys)
            assert match.blocks == 4
            buffers = [bytearray(space.block_bytes) for _ in keys]
            answers = await client.load_any(space, keys, buffers, lease=match)
            assert [answer and answer.tier for answer in answers] == ["disk"] * 4
            came.append([bytes(buffer) for buffer in buffers])
            await client.release(match)
        await nodes.stop(server)
    assert came[1] == came[2] != came[0]
    for before, after in zip(came[0], came[1], strict=True):
        x, y = (np.frombuffer(data, "<u2").astype("<u4") << 16 for data in (before, after))
        error = np.abs(x.view("<f4") - y.view("<f4")).max()
        assert 0 < error <= np.abs(x.view("<f4")).max() / (125 if lossy == "int8" else 15.9)


async def test_by_default_a_node_loses_nothing(nodes: Nodes, rng: random.Random) -> None:
    """Whatever codec was chosen by then."""
    keys, stored = keys_of("chain", 4), [kv_bytes(rng, 4000) for _ in range(4)]
    for run in range(2):
        server = await nodes.start()
        client = nodes.connect(server)
        space = await client.open_space(descriptor_of(len(stored[0])))
        if run == 0:
            assert await client.store(space, keys, stored) == [True] * 4
        else:
            buffers = [bytearray(space.block_bytes) for _ in keys]
            answers = await client.load_any(space, keys, buffers)
            assert [answer and answer.tier for answer in answers] == ["disk"] * 4
            assert [bytes(buffer) for buffer in buffers] == stored
        await nodes.stop(server)


def test_status_says_which_codecs_are_used() -> None:
    """From the node's counters, whatever order they come in."""
    assert codecs_of({"kvstore_hints_total": 3.0}) == []
    labels, other = '{tier="disk",codec="raw"}', '{tier="disk",codec="planes-zstd"}'
    counters = {
        f"kvstore_codec_out_bytes_total{other}": 1000.0,
        f"kvstore_codec_blocks_total{labels}": 1.0,
        f"kvstore_codec_blocks_total{other}": 2.0,
        f"kvstore_codec_in_bytes_total{other}": 1500.0,
        f"kvstore_codec_in_bytes_total{labels}": 7.0,
        f"kvstore_codec_out_bytes_total{labels}": 7.0,
    }
    expected = [
        CodecUse("disk", "planes-zstd", 2, 1500, 1000), CodecUse("disk", "raw", 1, 7, 7)
    ]  # fmt: skip
    assert codecs_of(counters) == expected
    bench = Bench("raw")
    bench.used([block_with(bytes(1000))])
    assert codecs_of(bench.metrics.samples()) == [CodecUse("disk", "raw", 1, 1000, 1000)]

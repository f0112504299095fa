"""What every tier and every composition of tiers promises, checked with one suite over all.

A tier may forget, but what fits is kept; it may never lie.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvstore.api.tier import Block, BlockRef, Load, Tier
from kvstore.tiers.beside import Beside
from kvstore.tiers.tiered import Tiered
from kvstore_client import RemoteTier
from tests.sim.blocks import (
    block_of,
    buffers_for,
    chain_of,
    keys_of,
    load_all,
    present,
)
from tests.sim.borrowed import Borrowed
from tests.sim.faulty import Faulty
from tests.sim.nodes import BLOCK_BYTES, Nodes, descriptor_of
from tests.sim.rig import Rig

BLOCKS = 20
"""More than the small memories below hold, so that compositions have to demote."""
FEW_SLOTS = 8


@dataclass(frozen=True, slots=True)
class Subject:
    """A tier under test and two namespaces that it knows."""

    tier: Tier
    mine: bytes
    theirs: bytes


@dataclass(frozen=True, slots=True)
class Workshop:
    """What a case may build its tier from."""

    rig: Rig
    redis_url: Callable[[], str]
    nodes: Callable[[], Nodes]
    home: Path


async def memory(shop: Workshop) -> Tier:
    return shop.rig.memory()


async def redis_raw(shop: Workshop) -> Tier:
    return shop.rig.redis(shop.redis_url())


async def redis_pipelines(shop: Workshop) -> Tier:
    return shop.rig.redis(shop.redis_url(), codec="bitshuffle-lz4", wired=False)


async def redis_lz4(shop: Workshop) -> Tier:
    return shop.rig.redis(shop.redis_url(), codec="bitshuffle-lz4")


async def disk_raw(shop: Workshop) -> Tier:
    return await shop.rig.disk()


async def disk_lz4(shop: Workshop) -> Tier:
    return await shop.rig.disk(codec="bitshuffle-lz4")


async def disk_real(shop: Workshop) -> Tier:
    files = shop.rig.real_files(shop.home / "blocks")
    return await shop.rig.disk(files, codec="bitshuffle-lz4", runner=shop.rig.threads())


async def guarded(shop: Workshop) -> Tier:
    return shop.rig.guarded(shop.rig.memory())


async def faulty(shop: Workshop) -> Tier:
    return Faulty(shop.rig.memory())


async def beside(shop: Workshop) -> Tier:
    return Beside(shop.rig.redis(shop.redis_url()), await shop.rig.disk())


async def beside_reversed(shop: Workshop) -> Tier:
    return Beside(await shop.rig.disk(), shop.rig.redis(shop.redis_url()))


async def tiered_alone(shop: Workshop) -> Tier:
    return Tiered(shop.rig.memory(), None, shop.rig.metrics)


async def tiered_disk(shop: Workshop) -> Tier:
    return Tiered(shop.rig.memory(FEW_SLOTS), await shop.rig.disk(), shop.rig.metrics)


async def tiered_redis(shop: Workshop) -> Tier:
    slow = shop.rig.redis(shop.redis_url(), codec="bitshuffle-lz4")
    return Tiered(shop.rig.memory(FEW_SLOTS), slow, shop.rig.metrics)


async def whole_path(shop: Workshop) -> Tier:
    redis = shop.rig.guarded(shop.rig.redis(shop.redis_url(), codec="bitshuffle-lz4"))
    disk = shop.rig.guarded(await shop.rig.disk(codec="bitshuffle-lz4"))
    return Tiered(shop.rig.memory(FEW_SLOTS), Beside(redis, disk), shop.rig.metrics)


async def peers(shop: Workshop) -> Tier:
    """Stored at one node, and asked of another."""
    return await Borrowed.from_nodes(shop.nodes(), shop.home, shop.redis_url())


DESCRIPTORS = [descriptor_of(numerics="mine"), descriptor_of(numerics="theirs")]


async def remote(shop: Workshop) -> Tier:
    nodes = shop.nodes()
    server = await nodes.start(
        memory={"capacity_bytes": 2 << 16, "slab_bytes": 1 << 16},
        redis={"blocks_url": shop.redis_url()},
    )
    return RemoteTier(nodes.connect(server), DESCRIPTORS)


CASES: list[Callable[[Workshop], Awaitable[Tier]]] = [
    memory, redis_raw, redis_pipelines, redis_lz4, disk_raw, disk_lz4, disk_real, guarded, faulty,
    beside, beside_reversed, tiered_alone, tiered_disk, tiered_redis, whole_path, remote,
    peers,
]  # fmt: skip


@pytest.fixture(params=CASES, ids=lambda case: case.__name__)
async def subject(
    request: pytest.FixtureRequest, rig: Rig, tmp_path: Path
) -> AsyncIterator[Subject]:
    """Every tier and composition in turn; the rig checks its invariants afterwards."""
    nodes = Nodes(tmp_path)
    shop = Workshop(rig, lambda: request.getfixturevalue("redis_url"), lambda: nodes, tmp_path)
    mine, theirs = (descriptor.space_id for descriptor in DESCRIPTORS)
    yield Subject(await request.param(shop), mine, theirs)
    await nodes.finish()


@pytest.fixture
def tier(subject: Subject) -> Tier:
    """The tier under test."""
    return subject.tier


def chain(subject: Subject, word: str = "chain", count: int = BLOCKS) -> list[Block]:
    """A chain of blocks in the first namespace."""
    return chain_of(word, count, subject.mine, BLOCK_BYTES)


async def store(tier: Tier, blocks: list[Block]) -> list[bool]:
    """Stores blocks as every user of a tier does: only those that it wants."""
    wanted = await tier.wants([block.ref for block in blocks])
    held = await tier.store([block for block, want in zip(blocks, wanted, strict=True) if want])
    answers = iter(held)
    return [next(answers) if want else True for want in wanted]


async def test_what_fits_is_kept_and_returned_exactly(subject: Subject, tier: Tier) -> None:
    """Every block that was stored comes back, byte by byte, as often as it is asked for."""
    blocks = chain(subject)
    assert await tier.store(blocks) == [True] * BLOCKS
    for _ in range(2):
        assert await present(tier, blocks) == [True] * BLOCKS
    assert await tier.wants([block.ref for block in blocks]) == [False] * BLOCKS


async def test_what_is_absent_is_a_miss(subject: Subject, tier: Tier) -> None:
    """None, wanted, and nothing to discard; never an exception."""
    await tier.store(chain(subject, "others", 3))
    blocks = chain(subject, "absent", 5)
    refs = [block.ref for block in blocks]
    assert await present(tier, blocks) == [False] * 5
    assert await tier.locate(refs) == [None] * 5
    assert await tier.wants(refs) == [True] * 5
    assert await tier.discard(refs) == 0


@pytest.mark.parametrize("length", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES + 1, 2 * BLOCK_BYTES])
async def test_a_wrong_length_is_a_miss(subject: Subject, tier: Tier, length: int) -> None:
    """A buffer of another length gets no answer; its neighbours in the batch do, exactly."""
    blocks = chain(subject, count=5)
    await tier.store(blocks)
    loads = buffers_for(blocks)
    loads[2] = Load(blocks[2].ref, memoryview(bytearray(length)))
    answers = await tier.load(loads)
    assert [answer is not None for answer in answers] == [True, True, False, True, True]
    for index in (0, 1, 3, 4):
        assert loads[index].into == blocks[index].data
    # The block itself may be forgotten over it, and be stored again.
    await load_all(tier, blocks)
    assert await store(tier, blocks) == [True] * 5
    assert await present(tier, blocks) == [True] * 5


async def test_batches_keep_their_order_with_holes(subject: Subject, tier: Tier) -> None:
    """Answers stand in the order of the question, with the missing ones in between."""
    here, absent = chain(subject, count=9), chain(subject, "absent", 9)
    await tier.store(here)
    mixed = [block for pair in zip(here, absent, strict=True) for block in pair]
    for question in (mixed, mixed[::-1], mixed[5:] + mixed[:5]):
        truth = [block in here for block in question]
        refs = [block.ref for block in question]
        assert await present(tier, question) == truth
        assert [place is not None for place in await tier.locate(refs)] == truth
        assert [not want for want in await tier.wants(refs)] == truth


async def test_the_first_copy_wins(subject: Subject, tier: Tier) -> None:
    """Who asks what is wanted stores a block once; a later variant changes nothing."""
    blocks = chain(subject, count=6)
    assert await store(tier, blocks) == [True] * 6
    again = [block_of(block.ref, block.parent, BLOCK_BYTES, variant=1) for block in blocks]
    assert await store(tier, again) == [True] * 6
    assert await present(tier, blocks) == [True] * 6


async def test_two_copies_are_never_mixed(subject: Subject, tier: Tier) -> None:
    """Who stores a block again without asking leaves one whole copy with its own digest."""
    blocks = chain(subject, count=4)
    await tier.store(blocks)
    again = [block_of(block.ref, block.parent, BLOCK_BYTES, variant=1) for block in blocks]
    assert await tier.store(again) == [True] * 4
    loads = buffers_for(blocks)
    for one, two, load, answer in zip(blocks, again, loads, await tier.load(loads), strict=True):
        assert answer is not None
        assert (answer.digest, load.into) in [(one.digest, one.data), (two.digest, two.data)]


async def test_storing_twice_changes_nothing(subject: Subject, tier: Tier) -> None:
    """The same batch again is held again, and takes no more room."""
    blocks = chain(subject, count=6)
    await tier.store(blocks)
    blocks_before = [usage.blocks for usage in tier.usage()]
    assert await store(tier, blocks) == [True] * 6
    assert [usage.blocks for usage in tier.usage()] == blocks_before
    assert await present(tier, blocks) == [True] * 6


async def test_a_discarded_block_is_gone(subject: Subject, tier: Tier) -> None:
    """It is a miss from then on, its ancestors stay, and it can be stored again."""
    blocks, others = chain(subject, count=8), chain(subject, "others", 3)
    await tier.store([*blocks, *others])
    gone = [block.ref for block in blocks[5:]]
    assert await tier.discard(gone) >= 3
    assert await present(tier, [*blocks, *others]) == [True] * 5 + [False] * 3 + [True] * 3
    assert await tier.discard(gone) == 0
    assert await store(tier, blocks[5:]) == [True] * 3
    assert await present(tier, blocks) == [True] * 8


async def test_a_cleared_namespace_leaves_the_other(subject: Subject, tier: Tier) -> None:
    """Everything of the one is gone, nothing of the other."""
    mine = chain(subject, count=6)
    theirs = chain_of("chain", 6, subject.theirs, BLOCK_BYTES)
    await tier.store([*mine, *theirs])
    assert await tier.clear(subject.mine) >= 6
    assert await present(tier, mine) == [False] * 6
    assert await present(tier, theirs) == [True] * 6
    assert await tier.clear(subject.mine) == 0
    assert await store(tier, mine) == [True] * 6
    assert await present(tier, mine) == [True] * 6


async def test_equal_keys_of_two_namespaces_never_meet(subject: Subject, tier: Tier) -> None:
    """One prompt, two namespaces: two chains with bytes of their own."""
    mine = chain(subject, count=6)
    theirs = chain_of("chain", 6, subject.theirs, BLOCK_BYTES)
    assert {block.ref.key for block in mine} == {block.ref.key for block in theirs}
    await tier.store(mine)
    assert await present(tier, theirs) == [False] * 6
    await tier.store(theirs)
    assert await present(tier, [*mine, *theirs]) == [True] * 12
    await tier.discard([block.ref for block in theirs])
    assert await present(tier, [*mine, *theirs]) == [True] * 6 + [False] * 6


async def test_locate_names_a_tier_and_moves_nothing(subject: Subject, tier: Tier) -> None:
    """Whoever asks where blocks lie changes nothing about it."""
    blocks = chain(subject)
    await tier.store(blocks)
    refs = [block.ref for block in blocks]
    before = tier.usage()
    places = await tier.locate(refs)
    assert all(places)
    assert await tier.locate(refs) == places
    assert tier.usage() == before
    answers = await load_all(tier, blocks)
    assert [answer.tier for answer in answers if answer] == places


async def test_usage_counts(subject: Subject, tier: Tier) -> None:
    """Blocks come and go in the counts, no tier holds more than it may, and all of them serve."""
    blocks = chain(subject, count=6)
    counts = any(usage.capacity_bytes for usage in tier.usage())
    await tier.store(blocks)
    full = tier.usage()
    assert all(usage.serving for usage in full)
    assert all(
        usage.used_bytes <= usage.capacity_bytes or not usage.capacity_bytes for usage in full
    )
    if counts:
        assert sum(usage.blocks for usage in full) >= 6
        assert sum(usage.used_bytes for usage in full) >= 6 * BLOCK_BYTES // 2
        await tier.clear(subject.mine)
        assert sum(usage.blocks for usage in tier.usage()) == 0


async def test_empty_batches_are_answered(subject: Subject, tier: Tier) -> None:
    """With nothing, before and after there is something."""
    for _ in range(2):
        assert await tier.locate([]) == []
        assert await tier.wants([]) == []
        assert await tier.load([]) == []
        assert await tier.store([]) == []
        assert await tier.discard([]) == 0
        await tier.store(chain(subject, count=2))


async def test_buffers_belong_to_the_caller(subject: Subject, tier: Tier) -> None:
    """The source of a store may be reused at once, and a load writes to its buffer alone."""
    blocks = chain(subject, count=4)
    source = bytearray(b"".join(block.data for block in blocks))
    moved = [
        block._replace(data=memoryview(source)[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES])
        for index, block in enumerate(blocks)
    ]
    assert await tier.store(moved) == [True] * 4
    source[:] = bytes(len(source))
    target = bytearray(b"\xaa" * (4 * BLOCK_BYTES + 100))
    wishes = [
        Load(block.ref, memoryview(target)[50 + index * BLOCK_BYTES :][:BLOCK_BYTES])
        for index, block in enumerate(blocks)
    ]
    assert all(await tier.load(wishes))
    assert target == b"\xaa" * 50 + b"".join(block.data for block in blocks) + b"\xaa" * 50


async def test_siblings_share_their_parent(subject: Subject, tier: Tier) -> None:
    """Two continuations of one prefix lie side by side."""
    trunk = chain(subject, count=3)
    keys = keys_of("branches", 4)
    branches = [block_of(BlockRef(subject.mine, key), trunk[-1].ref, BLOCK_BYTES) for key in keys]
    assert await tier.store([*trunk, *branches]) == [True] * 7
    assert await present(tier, [*trunk, *branches]) == [True] * 7
    await tier.discard([branches[0].ref])
    assert await present(tier, branches) == [False, True, True, True]


async def test_what_is_called_held_is_delivered(subject: Subject, tier: Tier) -> None:
    """An orphan may be refused; if it is taken, it is there."""
    orphans = chain(subject)[3:6]
    held = await tier.store(orphans)
    assert await present(tier, orphans) == held


async def test_concurrent_callers_get_exact_bytes(subject: Subject, tier: Tier) -> None:
    """Stores, loads and look-ups of the same chains at once never mix anything up."""
    chains = [chain(subject, word, 6) for word in "abcd"]
    await asyncio.gather(*(store(tier, blocks) for blocks in [*chains, *chains]))
    everything = [block for blocks in chains for block in blocks]
    answers = await asyncio.gather(
        *(present(tier, blocks) for blocks in chains),
        *(present(tier, blocks[::-1]) for blocks in chains),
        present(tier, everything),
    )
    assert all(all(row) for row in answers)

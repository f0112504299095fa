"""The disk tier: its room, its chains, and what it keeps over full, failing and dead devices."""

import asyncio
import contextlib
import errno
import os
import random
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvstore.api.errors import ConfigError, TierError
from kvstore.api.tier import Block, BlockRef, Load
from kvstore.files import PAGE_BYTES, DirectoryFiles
from kvstore.names import block_name
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.disk_index import Entry
from kvstore.tiers.segment import file_name, segment_ids
from kvstore.tiers.segment_log import SPARE
from tests.disk_rig import (
    MINE,
    RECORD_BYTES,
    SIZE,
    SMALL_CAPACITY,
    SMALL_SEGMENT,
    THEIRS,
    chain,
    close,
    kill,
    refs_of,
    serves,
    small,
)
from tests.sim.blocks import block_of, chain_of, load_all, present
from tests.sim.clock import settle
from tests.sim.files import FailAlways, FailNth, SimulatedFiles
from tests.sim.rig import SYNC_AFTER_S, Rig
from tests.sim.runner import GatedRunner

# Capacity.


@pytest.mark.parametrize("size", [1, 100, PAGE_BYTES, 9000])
async def test_capacity_is_hard(rig: Rig, size: int) -> None:
    """The files together never take more than allowed, at no moment, whatever is stored."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    for number in range(125):
        assert await tier.store(chain_of(f"chain {number}", 8, MINE, size)) == [True] * 8
        assert files.peak_bytes <= SMALL_CAPACITY
        tier.check()
    assert files.peak_bytes > SMALL_CAPACITY // 2, "the room is not used"
    assert rig.counted("disk_segments_dropped") > 10


async def test_capacity_is_hard_for_all_sizes_at_once(rig: Rig, rng: random.Random) -> None:
    """The same with every size from one byte to more than a segment, and with restarts."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    for number in range(300):
        size = rng.choice([1, 100, 5000, 20_000, SMALL_SEGMENT // 2, SMALL_SEGMENT])
        blocks = chain_of(f"chain {number}", rng.randint(1, 4), MINE, size)
        held = await tier.store(blocks)
        assert all(held) == (size < SMALL_SEGMENT)
        assert files.peak_bytes <= SMALL_CAPACITY
        if rng.random() < 0.05:
            tier.check()
            kill(rig, files, tier)
            tier = await small(rig, files)
    assert rig.counted("disk_segments_dropped") > 10


async def test_a_block_larger_than_a_segment_is_refused(rig: Rig) -> None:
    """It is not held, and what comes after it is."""
    tier = await small(rig, SimulatedFiles())
    large = chain_of("large", 2, MINE, SMALL_SEGMENT)
    blocks = chain(count=3)
    assert await tier.store([*large, *blocks]) == [False, False, True, True, True]
    assert await present(tier, [*large, *blocks]) == [False, False, True, True, True]


async def test_hot_blocks_are_written_forward(rig: Rig) -> None:
    """A chain that is read now and then outlives its segment many times over; others do not."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    hot, cold = chain("hot", 2), chain("cold", 3)
    await tier.store([*hot, *cold])
    for number in range(60):
        await tier.store(chain(f"filler {number}", 3))
        assert await present(tier, hot) == [True] * 2
        tier.check()
    assert await present(tier, cold) == [False] * 3
    assert rig.counted("disk_forwarded_bytes") >= 2 * 2 * SIZE
    assert files.peak_bytes <= SMALL_CAPACITY
    kill(rig, files, tier)
    tier = await small(rig, files)
    assert await present(tier, hot) == [True] * 2


async def test_a_parent_goes_forward_with_its_children(rig: Rig) -> None:
    """A prompt that grows turn by turn stays whole, though its start is as old as the log."""
    files = SimulatedFiles()
    tier = await small(rig, files, capacity_bytes=2 * SMALL_CAPACITY)
    prompt = chain_of("prompt", 10, MINE, 100)
    for turn in range(10):
        assert await tier.store(prompt[: turn + 1]) == [True] * (turn + 1)
        for number in range(3):
            await tier.store(chain(f"filler {turn} {number}", 4))
        tier.check()
    assert await present(tier, prompt) == [True] * 10
    assert rig.counted("disk_segments_dropped") > 0


async def test_the_number_of_files_is_bounded(rig: Rig) -> None:
    """A node that is restarted again and again, storing little, does not collect open files."""
    files = SimulatedFiles()
    for number in range(80):
        tier = await small(rig, files, capacity_bytes=32 * SMALL_SEGMENT)
        assert await tier.store(chain_of(str(number), 1, MINE, 10)) == [True]
        await close(rig, files, tier)
    assert 40 < len(files.names()) <= 2 * 32 + 2
    tier = await small(rig, files, capacity_bytes=32 * SMALL_SEGMENT)
    assert await present(tier, chain_of("79", 1, MINE, 10)) == [True]


async def test_large_blocks_and_hot_ones_share_a_segment(rig: Rig) -> None:
    """What is written forward leaves room for the block that asked for the room."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    hot = chain_of("hot", 3, MINE, 100)
    await tier.store(hot)
    for number in range(20):
        await present(tier, hot)
        large = chain_of(f"large {number}", 1, MINE, 2 * SMALL_SEGMENT // 3)
        assert await tier.store(large) == [True]
        assert await present(tier, large) == [True]
        assert files.peak_bytes <= SMALL_CAPACITY
        assert max(len(files.content(name)) for name in files.names()) <= SMALL_SEGMENT
        tier.check()
    assert rig.counted("disk_segments_dropped") > 10


async def test_a_trickle_fills_the_room_before_anything_is_dropped(rig: Rig) -> None:
    """Segments that were sealed because of their age, nearly empty, do not push out others."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    blocks = [chain(f"single {number}", 1)[0] for number in range(12)]
    for block in blocks:
        assert await tier.store([block]) == [True]
        await rig.clock.advance(2 * SYNC_AFTER_S)
    assert 12 * (2 * PAGE_BYTES + RECORD_BYTES) < SMALL_CAPACITY - 2 * SMALL_SEGMENT
    assert await present(tier, blocks) == [True] * 12
    assert files.peak_bytes <= SMALL_CAPACITY


# Chains.


async def test_an_orphan_is_refused_and_counted(rig: Rig) -> None:
    """Without its parent a block could never be matched, so it takes no room."""
    tier = await rig.disk()
    blocks = chain(count=6)
    assert await tier.store([blocks[0], blocks[2], blocks[3]]) == [True, False, False]
    assert rig.counted("disk_orphans") == 2
    assert await tier.store(blocks) == [True] * 6


async def test_what_loses_its_parent_is_gone(rig: Rig) -> None:
    """A discarded block takes its descendants along, also those of other namespaces."""
    files = SimulatedFiles()
    tier = await rig.disk(files)
    trunk = chain(count=4)
    branch = block_of(BlockRef(THEIRS, b"b" * 32), trunk[-1].ref, SIZE)
    await tier.store([*trunk, branch])
    await tier.discard([trunk[1].ref])
    assert await present(tier, [*trunk, branch]) == [True, False, False, False, False]
    tier.check()
    kill(rig, files, tier)
    tier = await rig.disk(files)
    assert await present(tier, [*trunk, branch]) == [True, False, False, False, False]


@pytest.mark.parametrize("codec", ["raw", "bitshuffle-lz4"])
async def test_random_histories_follow_the_model(rig: Rig, rng: random.Random, codec: str) -> None:
    """Whatever is stored, read, forgotten and restarted: closed, within its room, never wrong.

    What was discarded or cleared does not come back before it is stored again, restarts or not.
    """
    files = SimulatedFiles()
    tier = await small(rig, files, codec=codec)
    chains = [
        chain_of(f"{number}", 6, rng.choice([MINE, THEIRS]), rng.choice([50, 5000]))
        for number in range(12)
    ]
    forgotten: set[BlockRef] = set()
    seen: dict[str, int] = dict.fromkeys(["store", "load", "discard", "clear", "kill", "close"], 0)
    for _ in range(500):
        blocks = rng.choice(chains)
        weights = [40, 30, 8, 2, 3, 3]
        what = rng.choices(list(seen), weights)[0]
        seen[what] += 1
        if what == "store":
            offered = blocks[: rng.randint(1, 6)]
            await tier.store(offered)
            # Also what was written and left with its parent again, before the call was over.
            forgotten -= set(refs_of(offered))
        elif what == "load":
            here = await present(tier, blocks)
            assert here == sorted(here, reverse=True), "a hole in a chain"
        elif what == "discard":
            chosen = rng.sample(refs_of(blocks), 2)
            await tier.discard(chosen)
            forgotten |= set(chosen)
        elif what == "clear":
            namespace = rng.choice([MINE, THEIRS])
            await tier.clear(namespace)
            forgotten |= {b.ref for c in chains for b in c if b.ref.namespace == namespace}
        else:
            tier.check()
            await (close(rig, files, tier) if what == "close" else _killed(rig, files, tier))
            tier = await small(rig, files, codec=codec)
        tier.check()
        assert files.peak_bytes <= SMALL_CAPACITY
        assert not any(await tier.locate(sorted(forgotten))), "the dead have risen"
    assert all(seen.values())
    assert rig.counted("disk_segments_dropped") > 0


async def _killed(rig: Rig, files: SimulatedFiles, tier: DiskTier) -> None:
    kill(rig, files, tier)


# Forgetting.


@pytest.mark.parametrize("whole_namespace", [False, True])
@pytest.mark.parametrize("orderly", [False, True])
async def test_what_was_forgotten_stays_forgotten(
    rig: Rig, whole_namespace: bool, orderly: bool
) -> None:
    """Over restarts, and while the segments that held block and record are dropped one by one."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    secret = chain("secret", 4)
    await tier.store(secret)
    await tier.store(chain("between", 6, THEIRS))
    if whole_namespace:
        assert await tier.clear(MINE) == 4
    else:
        assert await tier.discard(refs_of(secret)) == 4
    for number in range(12):
        await tier.store(chain(f"filler {number}", 4, THEIRS))
        if orderly:
            await close(rig, files, tier)
        else:
            kill(rig, files, tier)
        tier = await small(rig, files)
        assert await present(tier, secret) == [False] * 4
        assert await tier.locate(refs_of(secret)) == [None] * 4
    assert rig.counted("disk_segments_dropped") > 0


async def test_what_is_stored_after_it_was_forgotten_stays(rig: Rig) -> None:
    """A record of oblivion concerns what was written before it, not what comes after."""
    files = SimulatedFiles()
    tier = await rig.disk(files)
    blocks = chain(count=4)
    for _ in range(3):
        await tier.store(blocks)
        await tier.clear(MINE)
        await tier.store(blocks)
        await tier.discard([blocks[-1].ref])
        await tier.store(blocks)
        kill(rig, files, tier)
        tier = await rig.disk(files)
        assert await present(tier, blocks) == [True] * 4
        await tier.clear(MINE)
        kill(rig, files, tier)
        tier = await rig.disk(files)
        assert await present(tier, blocks) == [False] * 4


# Damage.


async def test_a_damaged_block_is_dropped_counted_and_repaired(
    rig: Rig, rng: random.Random
) -> None:
    """A flipped bit is a miss; the next store writes the block again, with its descendants."""
    files = SimulatedFiles()
    tier = await rig.disk(files)
    blocks, others = chain(count=6), chain("others", 4)
    await tier.store([*blocks, *others])
    for number in range(1, 41):
        victim = rng.randrange(6)
        place = tier._index.find(block_name(blocks[victim].ref))
        assert place is not None
        start = place.offset + PAGE_BYTES
        files.flip(file_name(place.segment_id), 8 * start + rng.randrange(8 * SIZE))
        here = await present(tier, [*blocks, *others])
        assert here[victim] is False
        assert here[6:] == [True] * 4
        assert rig.counted("corrupt", tier="disk") == number
        assert await present(tier, blocks) == [True] * victim + [False] * (6 - victim)
        assert await tier.store(blocks) == [True] * 6
        assert await present(tier, blocks) == [True] * 6
        tier.check()


async def test_a_block_of_another_length_is_repaired(rig: Rig) -> None:
    """Nobody can ever read it: it is a miss that is counted, then wanted, and written again."""
    tier = await rig.disk()
    blocks = chain(count=3)
    await tier.store([*blocks[:2], block_of(blocks[2].ref, blocks[1].ref, SIZE - 1)])
    assert await present(tier, blocks) == [True] * 2 + [False]
    assert rig.counted("corrupt", tier="disk") == 1
    assert await tier.wants(refs_of(blocks)) == [False] * 2 + [True]
    assert await tier.store(blocks) == [True] * 3
    assert await present(tier, blocks) == [True] * 3


async def test_an_unreadable_block_costs_itself_alone(rig: Rig) -> None:
    """A sector that cannot be read is a miss of one block, not of the batch around it."""
    files = SimulatedFiles()
    tier = await rig.disk(files)
    blocks, others = chain(count=4), chain("others", 4)
    await tier.store([*blocks, *others])
    files.fault = FailNth(4, errno.EIO, ["read"])
    here = await present(tier, [*others, *blocks])
    assert files.injected["read"] == 1
    assert here == [True] * 3 + [False] + [True] * 4
    files.fault = None
    await tier.store([*others, *blocks])
    assert await present(tier, [*others, *blocks]) == [True] * 8


# Failing devices.


async def attempt(call: Awaitable[object]) -> bool:
    """As `Guarded` does: of a call that met a broken device nothing is known."""
    try:
        await call
    except (OSError, TierError):
        return False
    return True


def everything() -> list[Block]:
    """All blocks that the script may have stored."""
    kinds = [(namespace, size) for namespace in (MINE, THEIRS) for size in (50, 5000)]
    chains = [chain_of(str(n), 3, *kind) for n in range(4) for kind in kinds]
    return HOT + [block for blocks in chains for block in blocks]


HOT = chain_of("hot", 1, MINE, 50)
"""Read again and again, so that it is written forward."""


async def script(tier: DiskTier, rng: random.Random) -> tuple[set[BlockRef], set[BlockRef]]:
    """Some of everything, enough to roll and drop segments, whatever the device does.

    Answers what was forgotten for good and not stored since, and what may have been forgotten.
    """
    forgotten: set[BlockRef] = set()
    perhaps: set[BlockRef] = set()
    for number in range(8):
        blocks = chain_of(str(number % 4), 3, rng.choice([MINE, THEIRS]), rng.choice([50, 5000]))
        forgotten -= set(refs_of(blocks))
        await attempt(tier.store([*HOT, *blocks]))
        await attempt(load_all(tier, [*HOT, *blocks]))
        if number % 4 == 1:
            gone = {blocks[2].ref}
            done = await attempt(tier.discard(sorted(gone)))
        elif number == 6:
            gone = {block.ref for block in everything() if block.ref.namespace == THEIRS}
            done = await attempt(tier.clear(THEIRS))
        else:
            continue
        perhaps |= gone
        forgotten |= gone if done else set()
    return forgotten, perhaps


TINY_SEGMENT = 1 << 15
TINY_CAPACITY = 5 * TINY_SEGMENT
CHANGES = ["open", "write", "truncate", "sync", "rename", "remove"]


async def tiny(rig: Rig, files: SimulatedFiles) -> DiskTier:
    """A tier whose segments take two or three blocks."""
    return await rig.disk(files, capacity_bytes=TINY_CAPACITY, segment_bytes=TINY_SEGMENT)


async def operations_of_script(rig: Rig, seed: str, operations: Sequence[str]) -> int:
    """How many operations of these kinds the script needs on a healthy device."""
    files = SimulatedFiles()
    tier = await tiny(rig, files)
    counter = files.fault = FailNth(0, errno.EIO, operations)
    await script(tier, random.Random(seed))
    seen = counter.seen
    await close(rig, files, tier)
    assert rig.counted("disk_segments_dropped") > 0, "the script is too short"
    return seen


async def test_an_error_anywhere_leaves_the_tier_working(rig: Rig, rng: random.Random) -> None:
    """Whichever operation fails once, the tier goes on, within its room, and restarts."""
    seed = str(rng.random())
    changes = await operations_of_script(rig, seed, CHANGES)
    reads = await operations_of_script(rig, seed, ["read"])
    cases = [(CHANGES, number + 1) for number in range(changes)]
    cases += [(["read"], number + 1) for number in rng.sample(range(reads), 10)]
    for operations, number in cases:
        files = SimulatedFiles()
        tier = await tiny(rig, files)
        files.fault = FailNth(number, rng.choice([errno.ENOSPC, errno.EIO]), operations)
        await script(tier, random.Random(seed))
        assert sum(files.injected.values()) == 1
        await serves(tier, "after", 3)
        assert files.peak_bytes <= TINY_CAPACITY, f"operation {number}"
        assert len(segment_ids(files.names())) == files.open_handles == tier._segments.count
        assert {SPARE} >= {name for name in files.names() if not segment_ids([name])}
        kill(rig, files, tier)
        tier = await tiny(rig, files)
        await load_all(tier, of_their_length(tier, everything()))
        await serves(tier, "restarted", 2)
        await close(rig, files, tier)


async def test_a_full_device_is_survived(rig: Rig) -> None:
    """While there is no room nothing is held that is not there; with room it all goes on."""
    room_bytes = SMALL_CAPACITY // 2
    files = SimulatedFiles(room_bytes=room_bytes)
    tier = await small(rig, files)
    for number in range(40):
        blocks = chain(f"{number}", 4)
        held = [False] * 4
        with contextlib.suppress(OSError, TierError):
            held = await tier.store(blocks)
        here = await present(tier, blocks)
        assert all(is_here for is_here, kept in zip(here, held, strict=True) if kept)
        tier.check()
    assert files.injected["enospc"] > 0
    assert files.total_bytes <= room_bytes
    kill(rig, files, tier)
    tier = await small(rig, files)
    files.room_bytes = None
    await serves(tier, "afterwards", 12)
    assert files.peak_bytes <= SMALL_CAPACITY


async def test_a_volume_smaller_than_the_capacity_is_used_like_a_smaller_capacity(
    rig: Rig,
) -> None:
    """What is new takes the place of what is oldest; a tier that takes nothing is of no use."""
    files = SimulatedFiles(room_bytes=SMALL_CAPACITY // 2)
    tier = await small(rig, files)
    taken = 0
    for number in range(60):
        blocks = chain(f"{number}", 4)
        await tier.store(blocks)
        taken += all(await present(tier, blocks))
        tier.check()
        if number % 20 == 10:  # Sealed with hardly anything in it: its room is not enough.
            await close(rig, files, tier)
            tier = await small(rig, files)
    assert files.injected["enospc"] > 0
    assert taken > 50
    assert await tier.discard([block.ref for block in blocks]) == 4
    everything = [block for number in range(60) for block in chain(f"{number}", 4)]
    assert any(await present(tier, everything)), "read and compared, byte by byte"
    assert rig.counted("corrupt", tier="disk") == 0
    assert not any(await present(tier, chain("0", 4)))
    kill(rig, files, tier)
    await serves(await small(rig, files), "restarted", 1)


async def test_what_leaves_a_full_volume_is_written_again_as_it_was(rig: Rig) -> None:
    """A batch larger than the room pushes out its own beginning, and begins once more."""
    files = SimulatedFiles(room_bytes=2 * SMALL_SEGMENT - PAGE_BYTES)
    tier = await small(rig, files)
    here = 0
    for number in range(40):
        blocks = chain(f"{number}", 3 + number % 8)
        await attempt(tier.store(blocks))
        here += sum(await present(tier, blocks))
    assert here > 20
    assert rig.counted("corrupt", tier="disk") == 0


async def test_a_device_that_never_has_room_costs_two_segments(rig: Rig) -> None:
    """Where making room does not help, what else is there stays."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    await serves(tier, "before", 12)
    before = set(segment_ids(files.names()))
    files.fault = FailAlways(errno.ENOSPC, ["write"])
    for number in range(30):
        await attempt(tier.store(chain(f"{number}", 4)))
    assert before - set(segment_ids(files.names())) <= set(sorted(before)[:3])
    files.fault = None
    await serves(tier, "after", 12)


async def test_what_cannot_be_cut_off_is_counted(rig: Rig) -> None:
    """A footer of which a part was written and that cannot be taken away again takes its room."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    await tier.store(chain("first", 4))
    files.room_bytes = files.total_bytes + PAGE_BYTES
    files.fault = FailAlways(errno.EIO, ["truncate"])
    assert not await attempt(tier.store(chain("second", 1)))
    assert files.injected["truncate"] > 0
    tier.check()
    assert tier.usage()[0].used_bytes >= files.total_bytes
    files.fault = files.room_bytes = None
    await serves(tier, "after", 12)
    assert files.peak_bytes <= SMALL_CAPACITY


@pytest.mark.parametrize("operation", ["sync", "rename", "remove", "read", "open", "write"])
async def test_a_lasting_fault_never_costs_more_room(rig: Rig, operation: str) -> None:
    """A device that keeps failing one kind of operation does not make the files outgrow it."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    await serves(tier, "before", 12)
    # A file is removed where it cannot be kept for later.
    operations = ["remove", "rename"] if operation == "remove" else [operation]
    files.fault = FailAlways(errno.EIO, operations)
    for number in range(30):
        blocks = chain(f"{number}", 4)
        await attempt(tier.store(blocks))
        await attempt(load_all(tier, blocks))
        assert files.peak_bytes <= SMALL_CAPACITY
        tier.check()
    assert files.injected[operation] > 0
    files.fault = None
    await serves(tier, "after", 12)
    assert files.peak_bytes <= SMALL_CAPACITY
    kill(rig, files, tier)
    await serves(await small(rig, files), "restarted", 12)
    assert files.peak_bytes <= SMALL_CAPACITY


async def test_a_sector_that_cannot_be_read_does_not_stop_the_log(rig: Rig) -> None:
    """Hot blocks of a segment that went bad are lost; the segment goes, and room comes back."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    hot = chain("hot", 2)
    await tier.store(hot)
    await present(tier, hot)
    files.fault = FailAlways(errno.EIO, ["read"], lambda name: name == file_name(1))
    for number in range(20):
        await tier.store(chain(f"filler {number}", 4))
    assert files.injected["read"] > 0
    assert file_name(1) not in files.names()
    assert files.peak_bytes <= SMALL_CAPACITY
    await serves(tier, "after", 12)


Safe = dict[Entry, set[int]]
"""What was said to be on the device, with the segments in which it lay then."""


def promises(tier: DiskTier, safe: Safe) -> dict[bytes, set[int]]:
    """The blocks that were said to be safe, like all their ancestors, and have not left since.

    With the segments on which that rests.
    """
    promised: dict[bytes, set[int]] = {}
    for name in tier._index._entries:
        rests_on: set[int] = set()
        entry = tier._index.find(name)
        while entry is not None and entry in safe:
            rests_on |= safe[entry] | {entry.segment_id}
            if entry.above is None:
                promised[name] = rests_on
                break
            entry = entry.above
    return promised


def note_safe(tier: DiskTier, safe: Safe) -> None:
    """The tier has just said that all it has is on the device."""
    for entry in tier._index._entries.values():
        safe.setdefault(entry, set()).add(entry.segment_id)


def of_their_length(tier: DiskTier, blocks: list[Block]) -> list[Block]:
    """The blocks without those that the tier has under the same name in another length."""
    entries = [tier._index.find(block_name(block.ref)) for block in blocks]
    return [
        block
        for block, entry in zip(blocks, entries, strict=True)
        if entry is None or entry.block_bytes == len(block.data)
    ]


class PowerCut:
    """Cuts the power at the `number`-th change."""

    def __init__(self, files: SimulatedFiles, number: int) -> None:
        self._files = files
        self._fail = FailNth(number, errno.EIO, CHANGES)

    def __call__(self, operation: str, name: str) -> None:
        try:
            self._fail(operation, name)
        except OSError:
            self._files.turn_off()
            raise


async def test_a_crash_of_the_machine_anywhere_is_survived(rig: Rig, rng: random.Random) -> None:
    """Power fails at every operation in turn: afterwards no wrong byte, and chains are closed.

    What was forgotten stays so. What was said to be on the device is there, unless its segment
    had to go to make room for the start.
    """
    # Two, because one may store nothing that is safe for long.
    seeds = [str(rng.random()), str(rng.random())]
    totals = [await operations_of_script(rig, seed, CHANGES) for seed in seeds]
    kept = 0
    for seed, number in [
        (seed, number + 1)
        for seed, total in zip(seeds, totals, strict=True)
        for number in range(total)
    ]:
        files = SimulatedFiles()
        tier = await tiny(rig, files)
        safe: Safe = {}
        rig.when_sealed = lambda tier=tier, safe=safe: note_safe(tier, safe)  # type: ignore[misc]
        files.fault = PowerCut(files, number)
        forgotten, perhaps = await script(tier, random.Random(seed))
        rig.when_sealed = lambda: None
        excused = {block_name(ref) for ref in perhaps}
        promised = promises(tier, safe)
        rig.gone(tier)
        files.crash(rng)
        # The open segment gets a footer at the start, which takes two pages more.
        needed_bytes = files.total_bytes + 2 * PAGE_BYTES + TINY_SEGMENT
        before, full = set(files.names()), needed_bytes > TINY_CAPACITY
        tier = await tiny(rig, files)
        tier.check()
        await load_all(tier, of_their_length(tier, everything()))
        assert not any(await tier.locate(sorted(forgotten))), f"operation {number}: resurrected"
        dropped = set(segment_ids(list(before - set(files.names())))) if full else set()
        for name, rests_on in promised.items():
            if name not in excused and not rests_on & dropped:
                assert tier._index.find(name) is not None, f"operation {number}: a block is gone"
                kept += 1
        await serves(tier, f"after {number}", 3)
        assert files.peak_bytes <= TINY_CAPACITY
        await close(rig, files, tier)
    assert kept > 20, "the test promises itself nothing"


# Sealing.


async def test_what_is_old_enough_survives_the_machine(rig: Rig, rng: random.Random) -> None:
    """After `sync_after_s` at the latest a block is on the device, and that is announced."""
    files = SimulatedFiles()
    tier = await rig.disk(files)
    blocks = chain(count=6)
    await tier.store(blocks[:4])
    await rig.clock.advance(SYNC_AFTER_S)
    assert [blocks for _, blocks, _ in rig.sealed] == [4]
    assert rig.sealed[0][2] == 4 * SIZE
    await tier.store(blocks[4:])
    rig.gone(tier)
    files.crash(rng)
    tier = await rig.disk(files)
    here = await present(tier, blocks)
    assert here[:4] == [True] * 4
    assert here == sorted(here, reverse=True)


async def test_hot_blocks_stay_safe_when_they_are_written_forward(rig: Rig) -> None:
    """A block that was on the device is on it still when its first segment is deleted."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    hot = chain("hot", 2)
    await tier.store(hot)
    await rig.clock.advance(SYNC_AFTER_S)
    assert [count for _, count, _ in rig.sealed] == [2]
    number = 0
    while file_name(1) in files.names():
        await present(tier, hot)
        number += 1
        await tier.store(chain(f"filler {number}", 1))
    assert rig.counted("disk_forwarded_bytes") == 2 * SIZE
    rig.gone(tier)
    files.crash(None)
    assert await present(await small(rig, files), hot) == [True] * 2


async def test_what_cannot_be_written_forward_safely_keeps_its_place(rig: Rig) -> None:
    """A block that was on the device, and is still said to be here, survives a power cut."""
    kept = 0
    for fillers in range(1, 40):
        files = SimulatedFiles()
        tier = await small(rig, files)
        hot = chain("hot", 2)
        await tier.store(hot)
        await rig.clock.advance(SYNC_AFTER_S)
        files.fault = FailAlways(errno.EIO, ["sync"])
        for number in range(fillers):
            await present(tier, hot)
            with contextlib.suppress(TierError):
                await tier.store(chain(f"filler {number}", 1))
        places = await tier.locate(refs_of(hot))
        rig.gone(tier)
        files.crash(None)
        here = await present(await small(rig, files), hot)
        assert all(there for there, place in zip(here, places, strict=True) if place)
        kept += places == ["disk"] * 2
    assert kept > 10


async def test_a_forget_record_of_which_a_sync_failed_is_written_again(rig: Rig) -> None:
    """Later records say that there was one; without it nothing older would be believed."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    kept, gone = chain("kept", 2), chain("gone", 1)
    await tier.store([*kept, *gone])
    await rig.clock.advance(SYNC_AFTER_S)
    files.fault = FailNth(1, errno.EIO, ["sync"])
    with pytest.raises(TierError):
        await tier.discard(refs_of(gone))
    for number in range(3):
        await tier.store(chain(f"later {number}", 2))
    assert len(files.names()) > 1
    await rig.clock.advance(SYNC_AFTER_S)
    rig.gone(tier)
    files.crash(None)
    tier = await small(rig, files)
    assert await present(tier, [*kept, *gone]) == [True, True, False]


async def test_an_idle_tier_seals_nothing(rig: Rig) -> None:
    """Time alone writes nothing: neither without blocks nor once all of them are sealed."""
    files = SimulatedFiles()
    tier = await rig.disk(files)
    await rig.clock.advance(10 * SYNC_AFTER_S)
    assert (files.names(), rig.sealed) == ([], [])
    await tier.store(chain())
    await rig.clock.advance(10 * SYNC_AFTER_S)
    assert len(rig.sealed) == 1
    assert files.done["sync"] == 1


async def test_what_a_failed_sync_was_to_make_safe_is_never_said_to_be(rig: Rig) -> None:
    """The kernel may have given those pages up, and succeeds the next time for want of them.

    They are served as long as they are there; what comes later is announced as ever.
    """
    files = SimulatedFiles()
    tier = await rig.disk(files)
    blocks, later = chain(), chain("later", 3)
    await tier.store(blocks)
    files.fault = FailNth(1, errno.EIO, ["sync"])
    await rig.clock.advance(SYNC_AFTER_S)
    assert (files.injected["sync"], rig.sealed) == (1, [])
    await tier.store(later)
    await rig.clock.advance(SYNC_AFTER_S)
    assert [count for _, count, _ in rig.sealed] == [3]
    kill(rig, files, tier)
    assert await present(await rig.disk(files), [*blocks, *later]) == [True] * 13


# Callers that give up.


def movable(blocks: list[Block]) -> tuple[list[Block], bytearray]:
    """The same blocks in one buffer that the test may overwrite."""
    source = bytearray(b"".join(block.data for block in blocks))
    views = [memoryview(source)[at * SIZE : (at + 1) * SIZE] for at in range(len(blocks))]
    return [b._replace(data=view) for b, view in zip(blocks, views, strict=True)], source


async def test_a_store_that_is_cancelled_while_it_waits_spoils_nothing(rig: Rig) -> None:
    """Its write may still happen, later, but never over the blocks that others wrote since.

    1. A store hands its write to the pool, all of whose threads are busy, and is cancelled.
    2. Others store so much that the segment is sealed and another one is open.
    3. The pool comes to the write of step 1.
    """
    runner = GatedRunner()
    files = SimulatedFiles()
    tier = await rig.disk(
        files, runner=runner, capacity_bytes=SMALL_CAPACITY, segment_bytes=SMALL_SEGMENT
    )
    early = chain("early", 2)
    await tier.store(early)
    for steps in range(9):
        runner.held = True
        blocks, source = movable(chain(f"late {steps}", 4))
        late = asyncio.create_task(tier.store(blocks))
        await settle()
        for _ in range(steps):
            await runner.step()
        waiting = runner.waiting
        late.cancel()
        await asyncio.wait([late])
        source[:] = b"\xff" * len(source)  # It was the caller's, who is gone.
        runner.held = False
        others = [asyncio.create_task(tier.store(chain(f"{steps} {n}", 4))) for n in range(2)]
        await settle()
        await runner.release()
        assert waiting, "it was over already"
        assert await asyncio.gather(*others) == [[True] * 4] * 2
        assert late.cancelled()
        arrived = await present(tier, chain(f"late {steps}", 4))
        assert arrived == sorted(arrived, reverse=True)
        for number in range(2):
            assert await present(tier, chain(f"{steps} {number}", 4)) == [True] * 4
        assert await present(tier, early) == [True] * 2
        assert rig.counted("corrupt", tier="disk") == 0
        tier.check()


async def test_a_load_that_is_cancelled_writes_to_no_buffer(rig: Rig) -> None:
    """After a cancelled load the caller may use the buffer for something else."""
    runner = GatedRunner()
    tier = await rig.disk(runner=runner)
    blocks = chain(count=3)
    await tier.store(blocks)
    loads = [Load(block.ref, memoryview(bytearray(SIZE))) for block in blocks]
    runner.held = True
    loading = asyncio.create_task(tier.load(loads))
    await settle()
    assert runner.waiting == 3
    loading.cancel()
    await asyncio.wait([loading])
    await runner.release()
    assert all(load.into == bytes(SIZE) for load in loads)
    assert await present(tier, blocks) == [True] * 3


async def test_a_block_whose_segment_goes_during_a_read_is_a_miss(rig: Rig) -> None:
    """A read that comes too late for its segment finds nothing, and nothing is called damaged."""
    runner = GatedRunner()
    files = SimulatedFiles()
    tier = await rig.disk(
        files, runner=runner, capacity_bytes=SMALL_CAPACITY, segment_bytes=SMALL_SEGMENT
    )
    blocks = chain("old", 3)
    await tier.store(blocks)
    runner.held = True
    loading = asyncio.create_task(present(tier, blocks))
    await settle()
    runner.held = False
    for number in range(20):
        await tier.store(chain(f"filler {number}", 4))
    assert file_name(1) not in files.names()
    await runner.release()
    assert await loading == [False] * 3
    assert rig.counted("corrupt", tier="disk") == 0


# Real directories.


async def test_one_directory_serves_one_process(rig: Rig, tmp_path: Path) -> None:
    """The second one is told so, by the name of the setting; the first one's end frees it."""
    first = DirectoryFiles(tmp_path / "blocks")
    with pytest.raises(ConfigError, match=r"disk\.path: .* in use by another process"):
        DirectoryFiles(tmp_path / "blocks")
    first.shut()
    rig.real_files(tmp_path / "blocks")


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    """A file in its place is a mistake in the setting `disk.path`."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"disk\.path: .*file"):
        DirectoryFiles(tmp_path / "file" / "blocks")


@pytest.mark.parametrize("mask", [0o000, 0o022])
async def test_only_the_owner_can_read_the_files(rig: Rig, tmp_path: Path, mask: int) -> None:
    """Directory 0700 and files 0600, however generous the process's umask is."""
    before = os.umask(mask)
    try:
        home = tmp_path / "blocks"
        tier = await rig.disk(rig.real_files(home), runner=rig.threads())
        await tier.store(chain())
    finally:
        os.umask(before)
    assert home.stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in home.iterdir()}
    assert len(modes) >= 2
    assert set(modes.values()) == {0o600}


async def test_files_on_a_real_device_survive_a_restart(rig: Rig, tmp_path: Path) -> None:
    """The same as in the simulation: closed or not, what was stored is served."""
    blocks = chain()
    runner = rig.threads()
    for orderly in (True, False, True):
        files = DirectoryFiles(tmp_path / "blocks")
        tier = await rig.disk(files, codec="bitshuffle-lz4", runner=runner)
        await tier.store(blocks)
        assert await present(tier, blocks) == [True] * 10
        if orderly:
            await tier.close()
        rig.gone(tier)
        files.shut()


async def test_no_secret_name_lies_on_disk(rig: Rig) -> None:
    """Neither namespaces nor keys are written: names on disk cannot be turned back."""
    files = SimulatedFiles()
    tier = await rig.disk(files)
    blocks = chain()
    await tier.store(blocks)
    written = b"".join(files.content(name) for name in files.names())
    assert MINE not in written
    assert not any(block.ref.key in written for block in blocks)


async def test_a_block_that_moves_while_its_load_waits_is_read_where_it_lies(rig: Rig) -> None:
    """It was written forward, and the segment dropped in which it was looked up."""
    tier = await small(rig, SimulatedFiles())
    hot = chain("hot", 2)
    await tier.store(hot)
    run, go_on, waiting = tier._reader._run, asyncio.Event(), True

    async def late(*read: Any) -> bytes:
        nonlocal waiting
        if waiting:
            waiting = False
            await go_on.wait()  # As one does for a place among those that read.
        return await run(*read)

    tier._reader._run = late  # type: ignore[assignment, method-assign]
    entry = tier._find(hot[0].ref)
    assert entry is not None
    entry.used, segment_id = True, entry.segment_id
    into = memoryview(bytearray(len(hot[0].data)))
    loading = asyncio.create_task(tier.load([Load(hot[0].ref, into)]))
    await settle()
    number = 0
    while entry.segment_id == segment_id:
        number += 1
        await tier.store(chain(f"cold {number}", 3))
    go_on.set()
    assert await loading != [None]
    assert into == hot[0].data


async def test_a_forget_record_that_stands_there_only_once_is_no_success(rig: Rig) -> None:
    files = SimulatedFiles()
    tier = await small(rig, files)
    gone = chain("gone", 1)
    await tier.store(gone)
    files.fault = FailNth(1, errno.EIO, ["write"])
    with pytest.raises(TierError):
        await tier.discard(refs_of(gone))
    files.fault = None
    await tier.discard(refs_of(gone))
    rig.gone(tier)
    assert await present(await small(rig, files), gone) == [False]


async def test_want_of_memory_is_no_damage(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = await small(rig, SimulatedFiles())
    blocks = chain("kept", 2)
    await tier.store(blocks)

    def refuse(size: int) -> Any:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patched:
        patched.setattr(tier._staging, "borrow", refuse)
        with contextlib.suppress(TierError):
            assert await load_all(tier, blocks) == [None, None]
    assert await present(tier, blocks) == [True, True]

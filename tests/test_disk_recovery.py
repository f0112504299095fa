"""The disk tier's start: what it believes of the files that an earlier run left."""

import contextlib
import errno
import os
import random
import struct
from collections.abc import Sequence

import pytest
import xxhash

from kvstore.api.errors import TierError
from kvstore.api.tier import Block
from kvstore.files import PAGE_BYTES
from kvstore.record import HEADER_BYTES, Damaged, Header, Kind
from kvstore.tiers.disk_index import survivors
from kvstore.tiers.segment import (
    MAX_ID,
    SEQUENCE_BITS,
    Placed,
    file_name,
    pack_footer,
    segment_ids,
)
from kvstore.tiers.segment_log import Found
from tests.disk_rig import (
    RECORD_BYTES,
    SIZE,
    SMALL_CAPACITY,
    SMALL_SEGMENT,
    chain,
    close,
    kill,
    refs_of,
    serves,
    small,
)
from tests.sim.blocks import present
from tests.sim.files import FailAlways, FailNth, SimulatedFiles
from tests.sim.rig import SYNC_AFTER_S, Rig

# Restarts.


async def test_a_closed_tier_is_read_by_its_footers(rig: Rig) -> None:
    """After an orderly end nothing but first pages, first headers and footers is read."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    blocks = chain(count=12)
    assert await tier.store(blocks) == [True] * 12
    await close(rig, files, tier)
    segments = len(files.names())
    assert segments > 1
    files.done.clear()
    tier = await small(rig, files)
    assert files.done["read"] <= 4 * segments
    assert await present(tier, blocks) == [True] * 12


async def test_a_killed_tier_is_read_by_scanning(rig: Rig) -> None:
    """What was stored before kill -9 is served after it; then its segments have footers again."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    blocks = chain(count=12)
    await tier.store(blocks)
    kill(rig, files, tier)
    tier = await small(rig, files)
    assert await present(tier, blocks) == [True] * 12
    kill(rig, files, tier)
    files.done.clear()
    tier = await small(rig, files)
    assert files.done["read"] <= 4 * len(files.names())
    assert await present(tier, blocks) == [True] * 12
    assert sum(blocks for _, blocks, _ in rig.sealed) == 12


async def test_a_restarted_tier_goes_on(rig: Rig) -> None:
    """It takes new blocks below old ones, over many restarts of either kind."""
    files = SimulatedFiles()
    blocks = chain(count=12)
    for start in range(0, 12, 2):
        tier = await rig.disk(files)
        assert await present(tier, blocks) == [True] * start + [False] * (12 - start)
        assert await tier.store(blocks[: start + 2]) == [True] * (start + 2)
        if start % 4:
            kill(rig, files, tier)
        else:
            await close(rig, files, tier)
    tier = await rig.disk(files)
    assert await present(tier, blocks) == [True] * 12


def cuts(rng: random.Random, blocks: int) -> list[int]:
    """Places in a segment of so many records: around every page of the last three, and anywhere."""
    first = PAGE_BYTES + (blocks - 3) * RECORD_BYTES
    end = PAGE_BYTES + blocks * RECORD_BYTES
    near = [page + by for page in range(first, end + 1, PAGE_BYTES) for by in (-1, 0, 1, 100)]
    return [cut for cut in near if cut <= end] + [rng.randrange(end) for _ in range(40)]


def whole_records(cut: int, blocks: int) -> int:
    """How many records lie before the cut, with all bytes of their payload."""
    ends = [PAGE_BYTES + n * RECORD_BYTES + PAGE_BYTES + SIZE for n in range(blocks)]
    return sum(end <= cut for end in ends)


async def test_a_torn_tail_is_cut(rig: Rig, rng: random.Random) -> None:
    """Wherever the file ends after a crash: every whole record counts, nothing torn does."""
    original = SimulatedFiles()
    blocks = chain(count=8)
    tier = await rig.disk(original)
    await tier.store(blocks)
    kill(rig, original, tier)
    name = file_name(1)
    for cut in cuts(rng, 8):
        files = original.copy()
        files.put(name, bytes(original.content(name)[:cut]))
        tier = await rig.disk(files)
        whole = whole_records(cut, 8)
        assert await present(tier, blocks) == [True] * whole + [False] * (8 - whole), f"cut {cut}"
        assert rig.counted("corrupt", tier="disk") == 0, "a torn record was believed"
        assert await tier.store(blocks) == [True] * 8
        await close(rig, files, tier)
        tier = await rig.disk(files)
        assert await present(tier, blocks) == [True] * 8, f"cut {cut}"
        await close(rig, files, tier)


async def test_a_scribbled_tail_is_cut(rig: Rig, rng: random.Random) -> None:
    """The same where the rest of the file is noise instead of missing."""
    original = SimulatedFiles()
    blocks = chain(count=8)
    tier = await rig.disk(original)
    await tier.store(blocks)
    kill(rig, original, tier)
    name = file_name(1)
    for cut in cuts(rng, 8):
        files = original.copy()
        content = original.content(name)
        files.put(name, bytes(content[:cut]) + rng.randbytes(len(content) - cut))
        tier = await rig.disk(files)
        whole = whole_records(cut, 8)
        held = await present(tier, blocks)
        assert held == [True] * whole + [False] * (8 - whole), f"cut {cut}"
        assert rig.counted("corrupt", tier="disk") == 0, "a torn record was believed"
        kill(rig, files, tier)
        files.done.clear()
        tier = await rig.disk(files)
        assert files.done["read"] <= 4, "what was cut is sealed"
        assert await present(tier, blocks) == held
        await close(rig, files, tier)


async def test_a_damaged_first_page_costs_nothing(rig: Rig, rng: random.Random) -> None:
    """Records speak for themselves; and what was forgotten in a segment stays forgotten."""
    original = SimulatedFiles()
    tier = await small(rig, original)
    chains = [chain(word, 6) for word in "abc"]
    for blocks in chains:
        await tier.store(blocks)
    all_blocks = [block for blocks in chains for block in blocks]
    await tier.discard([block.ref for block in chains[0][3:]])
    await close(rig, original, tier)
    for name in original.names():
        files = original.copy()
        for bit in (rng.randrange(36 * 8), 8 * 628, rng.randrange(8 * PAGE_BYTES)):
            files.flip(name, bit)
        tier = await small(rig, files)
        assert await present(tier, all_blocks) == [True] * 3 + [False] * 3 + [True] * 12
        await close(rig, files, tier)


async def test_a_segment_of_another_version_is_deleted(rig: Rig) -> None:
    """An older node does not guess at what a newer one wrote."""
    files = SimulatedFiles()
    tier = await rig.disk(files)
    await tier.store(chain())
    await close(rig, files, tier)
    body = struct.pack("<8sIQ", b"KVSTSEG1", 3, 1)
    page = body + xxhash.xxh3_128_digest(body)
    files.content(file_name(1))[: len(page)] = page
    tier = await rig.disk(files)
    assert await present(tier, chain()) == [False] * 10
    assert files.names() == []
    await close(rig, files, tier)


async def test_a_damaged_footer_is_replaced_by_scanning(rig: Rig, rng: random.Random) -> None:
    """Whatever bit of footer or last page is wrong, every block is found."""
    original = SimulatedFiles()
    blocks = chain(count=8)
    tier = await rig.disk(original)
    await tier.store(blocks)
    await close(rig, original, tier)
    name = file_name(1)
    start = PAGE_BYTES + 8 * RECORD_BYTES
    size = len(original.content(name))
    entries = 8 * 264
    bits = [rng.randrange(8 * entries) for _ in range(30)]
    bits += [8 * (size - PAGE_BYTES - start) + bit for bit in range(0, 40 * 8, 5)]
    for bit in bits:
        files = original.copy()
        files.flip(name, 8 * start + bit)
        files.done.clear()
        tier = await rig.disk(files)
        assert files.done["read"] > 8, "the footer was believed"
        assert await present(tier, blocks) == [True] * 8
        await close(rig, files, tier)


async def test_a_segment_that_cannot_be_read_does_not_stop_the_start(rig: Rig) -> None:
    """A bad sector in one file costs its blocks; the file counts, and goes in its turn."""
    original = SimulatedFiles()
    tier = await small(rig, original)
    chains = [chain(word, 4) for word in "abcd"]
    for blocks in chains:
        await tier.store(blocks)
    await close(rig, original, tier)
    for name in original.names():
        files = original.copy()
        files.fault = FailAlways(errno.EIO, ["read"], name.__eq__)
        tier = await small(rig, files)
        here = [await present(tier, blocks) for blocks in chains]
        assert files.injected["read"] > 0
        # What the newest one forgot nobody knows: then nothing is believed.
        assert any(all(row) for row in here) == (name != max(original.names()))
        assert not all(all(row) for row in here)
        await serves(tier, "after", 12)
        assert files.peak_bytes <= SMALL_CAPACITY
        files.fault = None
        await close(rig, files, tier)


async def test_strangers_files_are_left_alone(rig: Rig) -> None:
    """Only segments are read; whatever else lies in the directory stays as it is."""
    files = SimulatedFiles()
    strangers = ["README.txt", ".lock", "z" * 16 + ".segment", "1.segment"]
    strangers += [file_name(7) + ".bak", "old " + file_name(7), file_name(0xABC).upper()]
    for name in strangers:
        files.put(name, b"not ours")
    tier = await rig.disk(files)
    blocks = chain(count=4)
    await tier.store(blocks)
    assert await present(tier, blocks) == [True] * 4
    assert all(files.content(name) == b"not ours" for name in strangers)


async def test_smaller_limits_hold_from_the_next_start(rig: Rig) -> None:
    """A run with less capacity drops the oldest segments before it serves."""
    files = SimulatedFiles()
    tier = await small(rig, files, capacity_bytes=20 * SMALL_SEGMENT)
    chains = [chain(f"chain {number}", 4) for number in range(16)]
    for blocks in chains:
        await tier.store(blocks)
    await close(rig, files, tier)
    assert files.total_bytes > SMALL_CAPACITY
    tier = await small(rig, files)
    assert files.total_bytes <= SMALL_CAPACITY
    assert await present(tier, chains[-1]) == [True] * 4
    assert await present(tier, chains[0]) == [False] * 4
    for blocks in chains:
        await tier.store(blocks)
        assert files.total_bytes <= SMALL_CAPACITY


async def test_a_lower_limit_holds_while_the_tail_is_sealed(rig: Rig) -> None:
    """Sealing what a killed run left open takes room as well: first the oldest segments go."""
    files = SimulatedFiles()
    tier = await small(rig, files, capacity_bytes=20 * SMALL_SEGMENT)
    for number in range(14):
        await tier.store(chain(f"chain {number}", 4))
    kill(rig, files, tier)
    assert files.total_bytes > SMALL_CAPACITY
    files.peak_bytes = 0
    tier = await small(rig, files)
    assert 0 < files.peak_bytes <= SMALL_CAPACITY
    assert await present(tier, chain("chain 13", 4)) == [True] * 4


async def test_a_start_that_fails_lets_go_of_its_files(rig: Rig) -> None:
    """What was opened is closed again when the limit cannot be kept, and the next start works."""
    files = SimulatedFiles()
    tier = await small(rig, files, capacity_bytes=20 * SMALL_SEGMENT)
    for number in range(14):
        await tier.store(chain(f"chain {number}", 4))
    await close(rig, files, tier)
    files.fault = FailAlways(errno.EIO, ["remove"])
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        await small(rig, files)
    assert files.open_handles == 0
    files.fault = None
    assert await present(await small(rig, files), chain("chain 13", 4)) == [True] * 4


@pytest.mark.parametrize("offset", [0, PAGE_BYTES + 1, 1 << 40, (1 << 64) - PAGE_BYTES])
async def test_a_footer_that_points_elsewhere_is_not_believed(rig: Rig, offset: int) -> None:
    """Its digest is right and a record cannot lie there: the records are looked for instead."""
    files = SimulatedFiles()
    tier = await rig.disk(files)
    blocks = chain(count=4)
    await tier.store(blocks)
    await close(rig, files, tier)
    content = files.content(file_name(1))
    start = PAGE_BYTES + 4 * RECORD_BYTES
    records = [
        Placed(at, Header.unpack(bytes(content[at : at + HEADER_BYTES])))
        for at in range(PAGE_BYTES, start, RECORD_BYTES)
    ]
    records[-1] = records[-1]._replace(offset=offset)
    content[start:] = pack_footer(records)
    tier = await rig.disk(files)
    assert await present(tier, blocks) == [True] * 4
    assert rig.counted("corrupt", tier="disk") == 0


@pytest.mark.parametrize("entries", [0, 1])
async def test_a_block_that_ends_like_a_segment_is_no_footer(rig: Rig, entries: int) -> None:
    """Who writes the last block of an open segment does not say what lies in it."""
    files = SimulatedFiles()
    tier = await rig.disk(files)
    others = chain("others", 4)
    [mine] = chain("mine", 1)
    claimed = [Placed(PAGE_BYTES, Header(name=mine.ref.key, forgets=1 << 60))] * entries
    footer = pack_footer(claimed)
    data = memoryview(bytes(PAGE_BYTES) + footer)
    await tier.store([*others, mine._replace(data=data)])
    kill(rig, files, tier)
    assert files.content(file_name(1)).endswith(footer)
    tier = await rig.disk(files)
    assert await present(tier, others) == [True] * 4
    assert await tier.store(chain("new", 2)) == [True] * 2


@pytest.mark.parametrize("number", [0, MAX_ID, (1 << 64) - 1])
async def test_a_segment_with_a_number_that_nobody_gives_is_a_strangers(
    rig: Rig, number: int
) -> None:
    """Numbering behind it would leave none for what comes."""
    files = SimulatedFiles()
    files.put(file_name(number), b"")
    await serves(await small(rig, files), "beside it", 12)
    assert file_name(number) in files.names()


class Counted(bytes):
    """A name that counts how often any was looked up."""

    lookups = 0

    def __hash__(self) -> int:
        Counted.lookups += 1
        return super().__hash__()


def test_orphans_cost_a_start_no_more_than_others() -> None:
    """A chain without its beginning is walked once, however long it is."""
    count, before = 2000, Counted.lookups
    names = [Counted(number.to_bytes(32, "big")) for number in range(count + 1)]
    found = [
        Found(Kind.BLOCK, at, 0, names[at], names[at - 1], bytes(16), 9, 9, 0, 1, at * PAGE_BYTES)
        for at in range(1, count + 1)
    ]
    assert survivors(found) == []
    assert Counted.lookups - before < 50 * count


async def test_records_are_on_the_device_before_their_footer(rig: Rig) -> None:
    """Or a power cut might keep a footer and lose what it speaks of."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    done: list[str] = []
    files.fault = lambda operation, name: done.append(operation) if name == file_name(1) else None
    await tier.store(chain(count=6))
    assert file_name(2) in files.names()
    assert done[-4:] == ["write", "sync", "write", "sync"]


async def test_what_a_start_found_is_on_the_device_before_its_footer(rig: Rig) -> None:
    """A killed process left it in the page cache, perhaps."""
    files = SimulatedFiles()
    tier = await rig.disk(files)
    await tier.store(chain())
    kill(rig, files, tier)
    done: list[str] = []
    files.fault = lambda operation, name: done.append(operation)
    await rig.disk(files)
    assert done[-5:] == ["truncate", "sync", "write", "sync", "size"]


async def test_records_that_may_not_be_on_the_device_get_no_footer(rig: Rig) -> None:
    """It would outlive them in a power cut; without it the next start looks for them."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    blocks = chain(count=12)
    await tier.store(blocks[:2])
    files.fault = FailNth(1, errno.EIO, ["sync"])
    await rig.clock.advance(SYNC_AFTER_S)
    assert files.injected["sync"] == 1
    await tier.store(blocks[2:])
    assert file_name(2) in files.names()
    # The second block never came to the device.
    start = PAGE_BYTES + RECORD_BYTES
    files.content(file_name(1))[start : start + RECORD_BYTES] = bytes(RECORD_BYTES)
    kill(rig, files, tier)
    tier = await small(rig, files)
    here = [block is not None for block in await tier.locate(refs_of(blocks))]
    assert here == [True] + [False] * 11


async def test_a_footer_that_is_still_to_come_has_its_room(rig: Rig) -> None:
    """Or the next start would have to drop the oldest segment for it."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    files.fault = FailNth(1, errno.EIO, ["sync"])
    await tier.store(chain(count=2))
    await rig.clock.advance(SYNC_AFTER_S)
    assert files.injected["sync"] == 1
    await tier.store(chain("more", 6))
    await close(rig, files, tier)
    counted_bytes = tier.usage()[0].used_bytes
    assert counted_bytes > files.total_bytes
    await small(rig, files)
    assert files.total_bytes == counted_bytes


async def test_a_block_that_holds_records_is_not_stored(rig: Rig, rng: random.Random) -> None:
    """Were its own header torn, the next start would take them for blocks of their names."""
    original = SimulatedFiles()
    tier = await rig.disk(original)
    [mine, theirs] = chain("mine", 2)
    await tier.store([mine])
    await close(rig, original, tier)
    record = original.content(file_name(1))[PAGE_BYTES : PAGE_BYTES + RECORD_BYTES]
    files = SimulatedFiles()
    tier = await rig.disk(files)
    page = memoryview(rng.randbytes(PAGE_BYTES))
    forger = theirs._replace(data=memoryview(bytes(page) + record), parent=None)
    assert await tier.store([forger, *chain("other", 2)]) == [False, True, True]
    assert await tier.store([forger._replace(data=page)]) == [True]
    kill(rig, files, tier)
    content = files.content(file_name(1))
    for at in range(PAGE_BYTES, len(content), PAGE_BYTES):
        content[at] ^= 1  # No header is as it was written.
    assert await present(await rig.disk(files), [mine]) == [False]


async def test_forget_records_reach_the_device_in_their_order(rig: Rig) -> None:
    """Or a power cut might keep the later of two, and the earlier would be missed for ever."""
    files = SimulatedFiles()
    tier = await rig.disk(files)
    blocks = chain(count=3)
    await tier.store(blocks)
    done: list[str] = []
    files.fault = lambda operation, name: done.append(operation)
    await tier.discard(refs_of(blocks))
    assert done == ["write", "write", "sync"] * 3


async def test_what_cannot_be_deleted_is_not_passed_over(rig: Rig) -> None:
    """A newer segment says what is forgotten in an older one, and never goes before it."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    gone = chain("gone", 2)
    await tier.store(gone)
    for number in range(3):
        await tier.store(chain(f"{number}", 5))
    files.fault = FailAlways(errno.EIO, ["remove", "rename"], lambda name: name == file_name(1))
    await tier.discard(refs_of(gone))
    for number in range(30):
        with contextlib.suppress(TierError):
            await tier.store(chain(f"more {number}", 5))
    assert files.injected["remove"] > 0
    kill(rig, files, tier)
    assert await present(await small(rig, files), gone) == [False] * 2


async def test_both_halves_of_a_forget_record_lie_together(rig: Rig, rng: random.Random) -> None:
    """Or a write that fails between them would leave one that nobody counts."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    places: dict[int, set[str]] = {}
    for number in range(60):
        blocks = chain(f"{number}", 3)
        await tier.store(blocks[: rng.randrange(4)])
        await tier.discard([blocks[-1].ref])
        for segment_id in segment_ids(files.names()):
            name = file_name(segment_id)
            content = files.content(name)
            for at in range(PAGE_BYTES, len(content), PAGE_BYTES):
                with contextlib.suppress(Damaged):
                    header = Header.unpack(bytes(content[at : at + HEADER_BYTES]))
                    own = header.sequence >> SEQUENCE_BITS == segment_id
                    if header.kind is Kind.FORGET_BLOCK and own:
                        places.setdefault(header.forgets, set()).add(name)
    assert len(places) == 60
    assert all(len(names) == 1 for names in places.values())


async def test_what_is_stored_after_a_start_that_could_not_read_is_the_latest(rig: Rig) -> None:
    """Its records are numbered behind those that nobody could read, which come back later."""
    files = SimulatedFiles()
    tier = await rig.disk(files)
    blocks = chain(count=4)
    await tier.store([*chain("earlier", 4), *blocks])
    await close(rig, files, tier)
    files.fault = FailAlways(errno.EIO, ["read"])
    tier = await rig.disk(files)
    assert await present(tier, blocks) == [False] * 4
    files.fault = None
    assert await tier.store(blocks) == [True] * 4
    await close(rig, files, tier)
    assert await present(await rig.disk(files), blocks) == [True] * 4


# What was forgotten.


TWINS = PAGE_BYTES + 4 * RECORD_BYTES
"""Where the forget records of the following lie."""


async def forgotten_in_a_killed_run(
    rig: Rig, files: SimulatedFiles, after: Sequence[Block] = ()
) -> list[Block]:
    """A chain of three, and a block that was discarded before others were stored."""
    tier = await rig.disk(files)
    kept, gone = chain("kept", 3), chain("gone", 1)
    await tier.store([*kept, *gone])
    assert await tier.discard(refs_of(gone)) == 1
    await tier.store(after)
    kill(rig, files, tier)
    return kept + gone


@pytest.mark.parametrize("twin", [0, 1])
async def test_a_damaged_forget_record_has_a_twin(rig: Rig, twin: int) -> None:
    """Whichever of the two is damaged, what they forgot stays so and nothing else is lost."""
    files = SimulatedFiles()
    blocks = await forgotten_in_a_killed_run(rig, files)
    files.flip(file_name(1), 8 * (TWINS + twin * PAGE_BYTES + 100))
    assert await present(await rig.disk(files), blocks) == [True] * 3 + [False]


async def test_where_a_forget_record_is_missing_nothing_older_is_believed(rig: Rig) -> None:
    """It may have been any of it. What was stored since the record knows of it, and counts."""
    files = SimulatedFiles()
    after = chain("after", 2)
    blocks = await forgotten_in_a_killed_run(rig, files, after)
    for twin in range(2):
        files.flip(file_name(1), 8 * (TWINS + twin * PAGE_BYTES + 100))
    assert await present(await rig.disk(files), blocks + after) == [False] * 4 + [True] * 2


async def test_what_was_discarded_after_its_parent_stays_so(rig: Rig) -> None:
    """It had left with the parent already, but its record would rise once that is stored again."""
    files = SimulatedFiles()
    tier = await rig.disk(files)
    blocks = chain(count=2)
    await tier.store(blocks)
    await tier.discard(refs_of(blocks[:1]))
    assert await tier.discard(refs_of(blocks[1:])) == 0
    await tier.store(blocks[:1])
    kill(rig, files, tier)
    assert await present(await rig.disk(files), blocks) == [True, False]

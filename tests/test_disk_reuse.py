"""Files of dropped segments that become new ones: faster, and none of their old records is back."""

import errno
import random
import struct

import xxhash

from kvstore.api.tier import Block
from kvstore.files import PAGE_BYTES
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.segment import file_name, pack_first_page, segment_ids
from kvstore.tiers.segment_log import SPARE
from tests.disk_rig import (
    RECORD_BYTES,
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
from tests.sim.files import FailNth, SimulatedFiles
from tests.sim.rig import Rig


async def fill(tier: DiskTier, word: str, chains: int) -> list[Block]:
    """Stores so many short chains; all of their blocks."""
    blocks: list[Block] = []
    for number in range(chains):
        added = chain(f"{word} {number}", 4)
        assert await tier.store(added) == [True] * 4
        blocks += added
    return blocks


def newest(files: SimulatedFiles) -> str:
    return file_name(max(segment_ids(files.names())))


async def test_a_file_is_written_again_instead_of_another(rig: Rig) -> None:
    """Once the log is full no file is made and none deleted; each keeps its room."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    await fill(tier, "first", 30)
    before = files.done.copy()
    await fill(tier, "more", 30)
    assert files.done["rename"] - before["rename"] > 10
    assert files.done["remove"] == before["remove"]
    assert files.peak_bytes <= SMALL_CAPACITY
    assert len(files.names()) <= SMALL_CAPACITY // SMALL_SEGMENT + 1


async def test_what_is_served_after_a_kill_is_what_was_there(rig: Rig, rng: random.Random) -> None:
    """Wherever the open segment ends in a file that is longer: neither more nor less."""
    for trial in range(30):
        files = SimulatedFiles()
        tier = await small(rig, files)
        blocks = await fill(tier, f"{trial}", rng.randrange(20, 50))
        forgotten = rng.sample(blocks, 5)
        await tier.discard(refs_of(forgotten))
        blocks += await fill(tier, f"{trial} more", rng.randrange(3))
        here = await present(tier, blocks)
        assert len(files.content(newest(files))) > PAGE_BYTES
        kill(rig, files, tier)
        tier = await small(rig, files)
        assert await present(tier, blocks) == here
        assert rig.counted("corrupt", tier="disk") == 0
        assert SPARE not in files.names()
        await close(rig, files, tier)


async def test_nothing_of_the_old_segment_is_believed_after_a_power_cut(
    rig: Rig, rng: random.Random
) -> None:
    """Whatever of the new one's writes was lost, the old one's records stand in their place."""
    for trial in range(60):
        files = SimulatedFiles()
        tier = await small(rig, files)
        blocks = await fill(tier, f"{trial}", rng.randrange(20, 50))
        gone = rng.sample(blocks[:40], 10)
        await tier.discard(refs_of(gone))
        blocks += await fill(tier, f"{trial} more", rng.randrange(4))
        rig.gone(tier)
        files.crash(rng)
        tier = await small(rig, files)
        back = await present(tier, blocks)
        dead = {block.ref for block in gone}
        for block, there in zip(blocks, back, strict=True):
            assert not (there and block.ref in dead), "what was forgotten is back"
        assert rig.counted("corrupt", tier="disk") == 0, "a record was believed that is not there"
        await serves(tier, "after", 5)
        await close(rig, files, tier)


async def test_a_footer_of_the_old_segment_is_no_footer(rig: Rig) -> None:
    """Also if its first record is still there: the new segment's own records are found."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    blocks = await fill(tier, "old", 1)
    await close(rig, files, tier)
    old = bytes(files.content(file_name(1)))
    for kept in (PAGE_BYTES, len(old)):
        # Renamed, but for its first page nothing of the new segment came to the device.
        files = SimulatedFiles()
        files.put(file_name(7), pack_first_page(7) + old[PAGE_BYTES:kept])
        tier = await small(rig, files)
        assert await present(tier, blocks) == [False] * len(blocks)
        await serves(tier, "after", 3)
        await close(rig, files, tier)


async def test_segments_of_earlier_nodes_are_served(rig: Rig) -> None:
    """Their records were numbered from the newest id at the start, so lower than their own ids."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    blocks = await fill(tier, "old", 1)
    await close(rig, files, tier)
    old = bytes(files.content(file_name(1)))
    body = struct.pack("<8sIQ", b"KVSTSEG1", 1, 7)
    first = (body + xxhash.xxh3_128_digest(body)).ljust(PAGE_BYTES, b"\0")
    for end in (len(old), len(old) - PAGE_BYTES):  # With a footer, and without.
        files = SimulatedFiles()
        files.put(file_name(7), first + old[PAGE_BYTES:end])
        tier = await small(rig, files)
        assert await present(tier, blocks) == [True] * len(blocks)
        await serves(tier, "after", 12)
        await close(rig, files, tier)


async def test_a_file_that_waits_goes_with_its_process(rig: Rig) -> None:
    """It is deleted at the end, and what a killed process left at the next start."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    await fill(tier, "first", 30)
    assert SPARE in files.names()
    await close(rig, files, tier)
    assert SPARE not in files.names()
    files.put(SPARE, bytes(SMALL_SEGMENT))
    tier = await small(rig, files)
    assert SPARE not in files.names()
    await close(rig, files, tier)


async def test_a_file_of_another_process_is_never_written_again(rig: Rig) -> None:
    """Where it cannot be deleted at once it counts, and goes before the next segment begins."""
    files = SimulatedFiles()
    files.put(SPARE, b"\xee" * SMALL_SEGMENT)
    files.fault = FailNth(1, errno.EIO, ["remove"])
    tier = await small(rig, files)
    assert files.injected["remove"] == 1
    assert tier.usage()[0].used_bytes == SMALL_SEGMENT
    await serves(tier, "after", 1)
    assert SPARE not in files.names()
    assert b"\xee" * 64 not in files.content(newest(files))


async def test_a_full_volume_takes_the_file_that_waits_first(rig: Rig) -> None:
    """Before any block has to go for it."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    await fill(tier, "first", 30)
    number = 0
    while SPARE not in files.names() or tier._segments._end > 2 * RECORD_BYTES:
        number += 1
        await tier.store(chain(f"next {number}", 1))
    tier._segments._cut(tier._segments.open_id, tier._segments._end)  # No longer than it must be.
    before = set(segment_ids(files.names()))
    files.room_bytes = files.total_bytes
    assert await tier.store(chain("tight", 2)) == [True] * 2
    assert SPARE not in files.names()
    assert set(segment_ids(files.names())) == before
    files.room_bytes = None
    await serves(tier, "after", 12)


async def test_a_sealed_segment_ends_with_its_footer(rig: Rig) -> None:
    """However long its file was before: a start reads footers, and walks through nothing."""
    files = SimulatedFiles()
    tier = await small(rig, files)
    blocks = await fill(tier, "first", 30)
    blocks += chain("last", 1)
    await tier.store(blocks[-1:])
    here = await present(tier, blocks)
    await close(rig, files, tier)
    files.done.clear()
    tier = await small(rig, files)
    assert files.done["read"] <= 4 * len(files.names())
    assert files.done["truncate"] == 0, "a segment had to be looked through, and cut"
    assert await present(tier, blocks) == here

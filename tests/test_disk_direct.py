"""The disk tier's straight way between files and slots, and who may use a slot meanwhile."""

import asyncio
import errno
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from benchmarks.crash.system_calls import Call, SystemCalls, standing_in
from kvstore.api.errors import TierError
from kvstore.api.tier import Block, Load
from kvstore.files import PAGE_BYTES, SECTOR_BYTES, DirectoryFiles, begins_on_a_page
from kvstore.record import HEADER_BYTES, Header
from kvstore.staging import Staging
from kvstore.tiers.beside import Beside
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.disk_reader import READS_AT_ONCE
from kvstore.tiers.segment import SEQUENCE_BITS
from kvstore.tiers.segment import pages as pages_of
from kvstore.tiers.staged import PIECE_BYTES, WHOLE_BYTES
from kvstore.tiers.tiered import Tiered, Want
from tests.disk_rig import MINE, RECORD_BYTES, SIZE, chain, refs_of
from tests.sim.blocks import chain_of, present
from tests.sim.clock import settle
from tests.sim.files import FailNth, SimulatedFiles
from tests.sim.rig import Rig
from tests.sim.runner import GatedRunner

WAIT_S = 30.0
SOON_S = 0.05


class Gate:
    """A device that hangs: `entered` once a thread is at it, which goes on when `go` is set."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go = threading.Event()
        self.go.set()

    def shut(self) -> None:
        """The next thread waits."""
        self.entered.clear()
        self.go.clear()

    def pass_through(self) -> None:
        """What a thread does on its way."""
        self.entered.set()
        assert self.go.wait(WAIT_S)

    async def wait(self) -> None:
        """Until a thread is at it."""
        assert await asyncio.to_thread(self.entered.wait, WAIT_S)


class HangingFiles(SimulatedFiles):
    """Reads and writes that can hang, before they touch a byte; and what buffers they had."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.writes = Gate(), Gate()
        self.buffers: list[memoryview] = []

    def read_into(self, handle: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.reads.pass_through()
        self.buffers += buffers
        return super().read_into(handle, buffers, offset)

    def write(self, handle: int, buffers: Sequence[memoryview], offset: int) -> None:
        self.writes.pass_through()
        self.buffers += buffers
        super().write(handle, buffers, offset)


class Counting:
    """A keeper that counts."""

    def __init__(self) -> None:
        self.holds = self.ever = 0

    @property
    def held(self) -> bool:
        return self.holds > 0

    def hold(self) -> None:
        self.holds += 1
        self.ever += 1

    def release(self) -> None:
        assert self.holds
        self.holds -= 1


@pytest.fixture
def pages() -> Iterator[memoryview]:
    """Some memory that begins on a page."""
    with Staging(0).lent(1 << 18) as view:
        yield view


def uses(files: HangingFiles, memory: memoryview) -> bool:
    """Whether a file was read into, or written from, this very memory."""
    kept = bytes(memory)
    memory[:] = b"\x5a" * len(memory)
    seen = any(len(part) and part[0] == 0x5A and part[-1] == 0x5A for part in files.buffers)
    memory[:] = kept
    return seen


def placed(block: Block, memory: memoryview, keeper: Counting | None) -> Block:
    """The block with its bytes in this memory."""
    view = memory[: len(block.data)]
    view[:] = block.data
    return block._replace(data=view, keeper=keeper)


@pytest.mark.parametrize("size", [1, PAGE_BYTES - 1, PAGE_BYTES, SIZE, 2 * PAGE_BYTES, 50_000])
async def test_bytes_move_straight_from_and_to_a_buffer_with_a_keeper(
    rig: Rig, pages: memoryview, size: int
) -> None:
    """What whole pages it has; the rest of its last page is copied. Afterwards nobody holds it."""
    files = HangingFiles()
    tier = await rig.disk(files)
    [block] = chain_of("straight", 1, MINE, size)
    keeper = Counting()
    assert await tier.store([placed(block, pages, keeper)]) == [True]
    whole = size // PAGE_BYTES * PAGE_BYTES
    assert uses(files, pages[:whole]) == (whole > 0)
    assert (keeper.holds, keeper.ever) == (0, 1)
    pages[:size], files.buffers[:] = bytes(size), []
    [loaded] = await tier.load([Load(block.ref, pages[:size], keeper)])
    assert loaded is not None
    assert (loaded.digest, pages[:size]) == (block.digest, block.data)
    assert uses(files, pages[:whole]) == (whole > 0)
    assert (keeper.holds, keeper.ever) == (0, 2)


@pytest.mark.parametrize(("offset", "kept"), [(0, False), (64, True), (SECTOR_BYTES, True)])
async def test_other_buffers_are_copied(
    rig: Rig, pages: memoryview, offset: int, kept: bool
) -> None:
    """Those that begin anywhere, and those that nobody keeps once their caller is gone."""
    files = HangingFiles()
    tier = await rig.disk(files)
    block, keeper = chain()[0], Counting()
    memory = pages[offset:]
    assert await tier.store([placed(block, memory, keeper if kept else None)]) == [True]
    assert keeper.ever == 0
    memory[:SIZE] = bytes(SIZE)
    [loaded] = await tier.load([Load(block.ref, memory[:SIZE], keeper if kept else None)])
    assert loaded is not None
    assert memory[:SIZE] == block.data
    assert not uses(files, memory[:SIZE])
    assert (keeper.holds, keeper.ever) == (0, int(kept))  # The thread that copies has to write.


async def test_what_a_codec_changed_is_decoded_into_a_buffer_with_a_keeper(
    rig: Rig, pages: memoryview
) -> None:
    """Its bytes in the file are not the block's."""
    files = HangingFiles()
    tier = await rig.disk(files, codec="bitshuffle-lz4")
    block, keeper = chain()[0], Counting()
    assert await tier.store([placed(block, pages, keeper)]) == [True]
    pages[:SIZE] = bytes(SIZE)
    [loaded] = await tier.load([Load(block.ref, pages[:SIZE], keeper)])
    assert loaded is not None
    assert (pages[:SIZE], keeper.holds, keeper.ever) == (block.data, 0, 1)


async def test_a_flipped_bit_is_a_miss_on_the_straight_way(
    rig: Rig, pages: memoryview, rng: random.Random
) -> None:
    """Wherever it is in header or payload."""
    for _ in range(20):
        files = SimulatedFiles()
        tier = await rig.disk(files)
        block = chain()[0]
        assert await tier.store([placed(block, pages, Counting())]) == [True]
        part = rng.choice([(0, 256), (PAGE_BYTES, SIZE)])
        at = PAGE_BYTES + part[0] + rng.randrange(part[1])
        files.flip(min(files.names()), 8 * at + rng.randrange(8))
        assert await tier.load([Load(block.ref, pages[:SIZE], Counting())]) == [None]


async def test_a_block_with_a_keeper_that_imitates_records_is_refused(
    rig: Rig, pages: memoryview
) -> None:
    """Whoever is stored beside it is stored; and nothing of it is believed by the next start."""
    files = SimulatedFiles()
    tier = await rig.disk(files)
    first, second, third = (b._replace(parent=None) for b in chain(count=3))
    bad = placed(second, pages[PAGE_BYTES * 4 :], Counting())
    bad.data[PAGE_BYTES : PAGE_BYTES + 4] = b"KVSR"
    blocks = [placed(first, pages, Counting()), bad, third]
    assert await tier.store(blocks) == [True, False, True]
    rig.gone(tier)
    files.restart()
    tier = await rig.disk(files)
    assert await present(tier, [first, second, third]) == [True, False, True]


class Order(SimulatedFiles):
    """Notes where each write of a block begins, counted from the record's beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: list[int] = []

    def write(self, handle: int, buffers: Sequence[memoryview], offset: int) -> None:
        super().write(handle, buffers, offset)
        self.starts.append(offset - PAGE_BYTES)


LARGE = WHOLE_BYTES + 2 * PAGE_BYTES + 100
PIECES = -(-LARGE // PIECE_BYTES)


@pytest.fixture
def large(rng: random.Random) -> Iterator[Block]:
    """A block that is written in pieces, the last of which ends within a page."""
    [block] = chain_of("large", 1, MINE, LARGE)
    with Staging(0).lent(LARGE) as memory:
        memory[:] = rng.randbytes(PIECE_BYTES) * 2 + rng.randbytes(LARGE - 2 * PIECE_BYTES)
        yield block._replace(data=memory, keeper=Counting())


async def roomy(rig: Rig, files: SimulatedFiles) -> DiskTier:
    """A tier of segments that take one large block, and no other."""
    return await rig.disk(files, capacity_bytes=32 << 20, segment_bytes=4 << 20)


async def stored_bytes(tier: DiskTier, block: Block) -> bytes | None:
    """What the tier gives back of a block."""
    into = memoryview(bytearray(len(block.data)))
    [loaded] = await tier.load([Load(block.ref, into)])
    return bytes(into) if loaded is not None else None


async def test_a_large_block_is_written_in_pieces_its_header_last(rig: Rig, large: Block) -> None:
    """And is the same bytes, before and after a start that looks for it."""
    files = Order()
    tier = await roomy(rig, files)
    assert await tier.store([large]) == [True]
    record = [start for start in files.starts if start >= 0]
    assert record == [PAGE_BYTES + n * PIECE_BYTES for n in range(PIECES)] + [0]
    for _ in range(2):
        assert await stored_bytes(tier, large) == bytes(large.data)
        rig.gone(tier)
        files.restart()
        tier = await roomy(rig, files)


@pytest.mark.parametrize("size", [WHOLE_BYTES, WHOLE_BYTES + 1, WHOLE_BYTES + PIECE_BYTES])
async def test_blocks_around_the_largest_whole_one_come_back(
    rig: Rig, rng: random.Random, size: int
) -> None:
    """Whether they are written at once or not, and wherever their last piece ends."""
    [block] = chain_of("edge", 1, MINE, size)
    with Staging(0).lent(size) as memory:
        memory[:] = rng.randbytes(PIECE_BYTES)[:1] * size
        memory[-5000:] = rng.randbytes(5000)
        tier = await roomy(rig, SimulatedFiles())
        block = block._replace(data=memory, keeper=Counting())
        assert await tier.store([block]) == [True]
        assert await stored_bytes(tier, block) == bytes(memory)


@pytest.mark.parametrize("failing", range(1, PIECES + 2))
async def test_a_large_block_of_which_a_write_fails_is_not_there(
    rig: Rig, large: Block, failing: int
) -> None:
    """Whichever it is; nor after a start. Its room is used again."""
    files = SimulatedFiles()
    tier = await roomy(rig, files)
    [small] = chain("small", 1)
    assert await tier.store([small]) == [True]
    files.fault = FailNth(failing, errno.EIO, ["write"])
    with pytest.raises(TierError):
        await tier.store([large])
    assert files.injected["write"] == 1
    assert await present(tier, [small, large]) == [True, False]
    assert len(files.content(min(files.names()))) == PAGE_BYTES + RECORD_BYTES
    rig.gone(tier)
    files.restart()
    tier = await roomy(rig, files)
    assert await present(tier, [small, large]) == [True, False]
    assert await tier.store([large]) == [True]
    assert await stored_bytes(tier, large) == bytes(large.data)


async def test_a_large_block_is_whole_or_gone_after_a_power_cut(rig: Rig, large: Block) -> None:
    """All of its writes came to the device, or it is not there, whichever one is missing."""
    files = SimulatedFiles()
    tier = await roomy(rig, files)
    assert await tier.store([large]) == [True]
    [name] = files.names()
    rig.gone(tier)
    first, *writes = [(at, data) for at, data in files._names[name].unsafe if data is not None]
    assert len(writes) == PIECES + 1
    for lost in [None, *range(len(writes))]:
        content = bytearray(PAGE_BYTES + PAGE_BYTES + pages_of(LARGE))
        for at, data in [first, *(write for n, write in enumerate(writes) if n != lost)]:
            content[at : at + len(data)] = data
        files = SimulatedFiles()
        files.put(name, bytes(content))
        tier = await roomy(rig, files)
        expected = bytes(large.data) if lost is None else None
        assert await stored_bytes(tier, large) == expected, f"write {lost} is missing"
        assert rig.counted("corrupt", tier="disk") == 0
        await tier.close()
        rig.gone(tier)


@pytest.mark.parametrize("piece", range(PIECES))
async def test_a_large_block_that_imitates_a_record_in_any_piece_is_refused(
    rig: Rig, large: Block, piece: int
) -> None:
    """The record that it holds is never on the device, whatever was written before it."""
    files = SimulatedFiles()
    tier = await roomy(rig, files)
    forged = Header(
        name=b"\x66" * 32, sequence=(1 << SEQUENCE_BITS) + 5, block_bytes=0, stored_bytes=0
    )
    at = piece * PIECE_BYTES + PAGE_BYTES
    large.data[at : at + HEADER_BYTES] = forged.pack()[: LARGE - at]
    assert await tier.store([large, *chain("beside", 1)]) == [False, True]
    assert forged.pack()[:100] not in files.content(min(files.names()))
    rig.gone(tier)
    files.restart()
    tier = await roomy(rig, files)
    assert await present(tier, [large, *chain("beside", 1)]) == [False, True]
    assert tier.usage()[0].blocks == 1


@pytest.mark.parametrize(("kept", "codec", "threads"), [
    (True, "raw", 1), (False, "raw", 8), (True, "bitshuffle-lz4", 8),
])  # fmt: skip
async def test_blocks_that_need_no_work_take_one_thread(
    rig: Rig, kept: bool, codec: str, threads: int
) -> None:
    """Others are copied or encoded side by side, and no more than eight at a time."""
    runner = GatedRunner()
    tier = await rig.disk(runner=runner, codec=codec)
    blocks = chain(count=12)
    runner.held = True
    with Staging(0).lent(12 * 2 * PAGE_BYTES) as memory:
        if kept:
            blocks = [
                placed(block, memory[n * 2 * PAGE_BYTES :], Counting())
                for n, block in enumerate(blocks)
            ]
        storing = asyncio.create_task(tier.store(blocks))
        await settle()
        waiting = runner.waiting
        await runner.release()
        assert (await storing, waiting) == ([True] * 12, threads)
        assert await present(tier, blocks) == [True] * 12


async def over_hanging_files(rig: Rig, files: HangingFiles, *, slots: int = 4) -> Tiered:
    """Memory with few slots over a disk with threads, which answers soon or is a miss."""
    disk = await rig.disk(files, runner=rig.threads())
    return Tiered(rig.memory(slots), rig.guarded(disk, timeout_s=SOON_S), rig.metrics)


def disk_of(tiered: Tiered, rig: Rig) -> DiskTier:
    [disk] = [thing for thing in rig.checked if isinstance(thing, DiskTier)]
    return disk


async def idle(tiered: Tiered, rig: Rig) -> None:
    """Returns when no thread of the disk reads or writes for anybody."""
    disk = disk_of(tiered, rig)
    await disk._reader.close()
    while changes := set(disk._writer._changes):
        await asyncio.wait(changes)
    await settle()


async def test_a_load_that_is_late_never_touches_a_slot_that_was_used_again(rig: Rig) -> None:
    """The slot that it was to fill waits for the thread, whatever happens to its promotion.

    1. A promotion reserves a slot; the read hangs, and its deadline makes it a miss.
    2. Others need all of memory.
    3. The thread comes back and fills the slot of step 1.
    """
    files = HangingFiles()
    tiered = await over_hanging_files(rig, files)
    [block] = chain("late", 1)
    assert await disk_of(tiered, rig).store([block]) == [True]
    files.reads.shut()
    assert await tiered.acquire([Want(block.ref, None, SIZE)]) == [None]
    await files.reads.wait()
    others = chain("others", 8)
    await tiered.store(others)
    slot_bytes = 2 * PAGE_BYTES
    used = tiered.memory.usage()[0]
    assert (used.used_bytes, used.blocks) == (4 * slot_bytes, 3), "the slot was given back early"
    files.reads.go.set()
    await idle(tiered, rig)
    for other in others:
        slot = tiered.memory.find(other.ref)
        assert slot is None or slot.view == other.data, "a late read wrote into another's slot"
    assert tiered.memory.usage()[0].used_bytes == 3 * slot_bytes


async def test_a_load_that_is_late_but_has_not_begun_does_nothing(
    rig: Rig, pages: memoryview
) -> None:
    """Its buffer is held until its turn comes, and then it has nothing to do."""
    runner, files = GatedRunner(), HangingFiles()
    tier = await rig.disk(files, runner=runner)
    block, keeper = chain()[0], Counting()
    assert await tier.store([placed(block, pages, keeper)]) == [True]
    runner.held, files.buffers[:] = True, []
    loading = asyncio.create_task(tier.load([Load(block.ref, pages[:SIZE], keeper)]))
    await settle()
    loading.cancel()
    await asyncio.wait([loading])
    assert keeper.held
    await runner.release()
    assert not keeper.held
    assert not files.buffers


async def test_a_device_that_hangs_is_given_only_so_many_buffers(
    rig: Rig, pages: memoryview
) -> None:
    """However many loads are given up, and however often they are asked for again."""
    runner = GatedRunner()
    tier = await rig.disk(runner=runner)
    blocks = chain(count=2 * READS_AT_ONCE)
    assert all(await tier.store(blocks))
    runner.held = True
    keepers = [Counting() for _ in range(3 * len(blocks))]
    for attempt in range(3):
        mine = keepers[attempt * len(blocks) :]
        loads = [
            Load(block.ref, pages[:SIZE], keeper)
            for block, keeper in zip(blocks, mine, strict=False)
        ]
        loading = asyncio.create_task(tier.load(loads))
        await settle()
        loading.cancel()
        await asyncio.wait([loading])
        assert runner.waiting == READS_AT_ONCE
        assert sum(keeper.holds for keeper in keepers) == READS_AT_ONCE
    await runner.release()
    assert not any(keeper.held for keeper in keepers)
    assert await present(tier, blocks) == [True] * len(blocks)


async def test_a_store_that_is_given_up_keeps_its_slots_until_the_write_is_over(rig: Rig) -> None:
    """What it records is what they held; and the slots then go back.

    A second store that has not begun by the time it is given up keeps nothing.
    """
    files = HangingFiles()
    tiered = await over_hanging_files(rig, files, slots=8)
    first, second = chain("first", 3), chain("second", 3)
    memory = tiered.memory
    await tiered.store(first)
    files.writes.shut()
    flushing = asyncio.create_task(tiered.flush())
    await files.writes.wait()
    await flushing  # Its deadline is over: the device has not answered.
    slots = [slot for block in first if (slot := memory.find(block.ref)) is not None]
    assert [slot.pins for slot in slots] == [1] * 3
    await tiered.store(second)
    await tiered.flush()
    await settle()
    assert [slot.pins for slot in memory.slots() if slot.ref in set(refs_of(second))] == [0] * 3
    memory.forget(slots)
    assert memory.usage()[0].used_bytes == 6 * 2 * PAGE_BYTES, "a slot was free while it is written"
    others = chain("others", 8)
    await memory.store(others)
    files.writes.go.set()
    await idle(tiered, rig)
    assert [slot.pins for slot in slots] == [0] * 3
    assert await present(disk_of(tiered, rig), first) == [True] * 3
    assert rig.counted("corrupt", tier="disk") == 0


async def test_of_two_tiers_the_second_is_not_asked_while_the_first_may_still_write(
    rig: Rig, pages: memoryview
) -> None:
    """Or what it read would be spoilt afterwards."""
    files = HangingFiles()
    first = await rig.disk(files, runner=rig.threads())
    second = await rig.disk()
    block, keeper = chain()[0], Counting()
    assert await first.store([block]) == await second.store([block]) == [True]
    tiers = Beside(rig.guarded(first, timeout_s=SOON_S), second)
    files.reads.shut()
    load = Load(block.ref, pages[:SIZE], keeper)
    assert await tiers.load([load]) == [None]
    files.reads.go.set()
    await first._reader.close()
    assert not keeper.held
    assert [loaded is not None for loaded in await tiers.load([load])] == [True]


# Vectors of buffers.


@pytest.mark.parametrize("direct", [True, False])
async def test_short_writes_go_on_at_a_sector(
    tmp_path: Path, rng: random.Random, direct: bool
) -> None:
    """Wherever within whichever buffer the system stops, all bytes come to their places."""
    files = DirectoryFiles(tmp_path / "files", direct=direct)

    def some_sectors(call: Call) -> object:
        return call.partly(rng.randrange(1, 20) * SECTOR_BYTES)

    def cut_short(call: Call) -> object:
        most = rng.randrange(SECTOR_BYTES, 3 * PAGE_BYTES)
        done = call.partly(min(call.size_bytes, most // SECTOR_BYTES * SECTOR_BYTES))
        # As if less of it had come through: what follows must begin a sector all the same.
        return done if done < 2 * SECTOR_BYTES else done - rng.randrange(SECTOR_BYTES)

    staging = Staging(0)
    buffers = [staging.borrow(count * PAGE_BYTES).view for count in (1, 5, 1)]
    for _ in range(20):
        for buffer in buffers:
            buffer[:] = rng.randbytes(len(buffer))
        handle = files.open(f"{rng.random()}", create=True)

        with standing_in(SystemCalls(cut_short)) as calls:
            files.write(handle, buffers, PAGE_BYTES)
        assert calls.made["pwritev"] > 2
        back = [staging.borrow(count * PAGE_BYTES).view for count in (2, 3, 2)]
        with standing_in(SystemCalls(some_sectors)) as calls:
            assert files.read_into(handle, back, PAGE_BYTES) == 7 * PAGE_BYTES
        assert calls.made["preadv"] > 2
        assert b"".join(back) == b"".join(buffers)
        assert files.read_into(handle, back, 5 * PAGE_BYTES) == 3 * PAGE_BYTES, "the file ends"
        files.close(handle)
    files.shut()


def test_only_writable_memory_on_a_page_is_good_for_direct_input() -> None:
    """What cannot be said for certain counts as not."""
    with Staging(0).lent(1 << 16) as pages:
        assert begins_on_a_page(pages)
        assert begins_on_a_page(pages[PAGE_BYTES:])
        assert not begins_on_a_page(pages[1:])
        assert not begins_on_a_page(pages[:0])
        assert not begins_on_a_page(pages.toreadonly())

"""The memory tier: slots that are pinned are never reused, and nothing is lost count of."""

import gc
import os
import random
import weakref

import pytest

from kvstore.api.tier import Block, BlockRef, Load
from kvstore.policy.policies import make_policy
from kvstore.policy.policy import Use
from kvstore.tiers.arena import Arena
from kvstore.tiers.lineage import Member, with_descendants
from kvstore.tiers.memory import Memory, Slot
from kvstore.tiers.slabs import PAGE_BYTES
from tests.sim.blocks import block_of, chain_of, keys_of, load_all, namespace_of, present
from tests.sim.clock import ManualClock
from tests.sim.rig import Rig, assert_idle

MINE = namespace_of("mine")
SIZE = 6000


def chain(word: str = "chain", count: int = 4) -> list[Block]:
    """A chain of blocks of SIZE."""
    return chain_of(word, count, MINE, SIZE)


def put(memory: Memory, block: Block) -> Slot:
    """Reserves, fills and commits."""
    slot = memory.reserve(block.ref, len(block.data))
    assert slot is not None
    slot.view[:] = block.data
    kept = memory.commit(slot, block.parent, block.digest)
    assert kept is not None
    return kept


async def test_a_block_is_not_its_own_ancestor(rig: Rig) -> None:
    """Whoever makes such a circle of names up gets no place, over however many blocks it goes."""
    memory = rig.memory(8)
    blocks = chain(count=4)
    for block in blocks[1:]:
        put(memory, block)
    [head] = blocks[:1]
    for parent in (head.ref, blocks[1].ref, blocks[3].ref):
        assert await memory.store([head._replace(parent=parent)]) == [False]
        assert memory.find(head.ref) is None
        memory.check()
    assert await memory.store([head]) == [True]
    assert memory.forget([memory._index[head.ref]]) == 4


async def test_who_waits_for_a_discarded_parent_goes_with_it(rig: Rig) -> None:
    """Also where the parent lies elsewhere; the same for all parents of a namespace."""
    memory = rig.memory(16)
    orphans, others = chain("orphans", 3)[1:], chain("others", 2)
    for forget in (memory.discard([chain("orphans", 1)[0].ref]), memory.clear(MINE)):
        await memory.store([*orphans, *others])
        assert await forget >= 2
        assert await present(memory, orphans) == [False] * 2
    assert await present(memory, others) == [False] * 2


async def test_the_coldest_leave_when_it_is_full(rig: Rig) -> None:
    """Stores beyond the capacity evict what was used longest ago, tails first."""
    memory = rig.memory(8)
    old, young, new = chain("old"), chain("young"), chain("new", 2)
    await memory.store([*old, *young])
    await load_all(memory, old)
    assert await memory.store(new) == [True, True]
    assert await present(memory, [*old, *young, *new]) == [True] * 6 + [False] * 2 + [True] * 2


async def test_to_locate_renews_nothing(rig: Rig) -> None:
    """Who only asks where a block lies does not keep it there."""
    memory = rig.memory(8)
    old, young = chain("old"), chain("young")
    await memory.store(old)
    await memory.store(young)
    for _ in range(3):
        assert await memory.locate([block.ref for block in old]) == ["memory"] * 4
        assert await memory.wants([block.ref for block in old]) == [False] * 4
        assert memory.find(old[0].ref) is not None
    await memory.store(chain("new"))
    assert await memory.locate([block.ref for block in old]) == [None] * 4
    assert await memory.locate([block.ref for block in young]) == ["memory"] * 4


async def test_a_reserved_slot_is_nobodys_until_it_is_committed(rig: Rig) -> None:
    """Nobody finds it, it takes its room, and it can be given back."""
    memory = rig.memory(8)
    block = chain()[0]
    slot = memory.reserve(block.ref, SIZE)
    assert slot is not None
    assert memory.find(block.ref) is None
    assert await memory.locate([block.ref]) == [None]
    assert memory.usage()[0].used_bytes == 2 * PAGE_BYTES
    memory.check()
    memory.abort(slot)
    assert memory.usage()[0].used_bytes == 0
    assert_idle(memory)


async def test_the_first_commit_wins(rig: Rig) -> None:
    """A second copy of a block gives its slot back and gets the first one's."""
    memory = rig.memory(8)
    block = chain()[0]
    other = block_of(block.ref, block.parent, SIZE, variant=1)
    slots = [memory.reserve(block.ref, SIZE) for _ in range(2)]
    for slot, each in zip(slots, (block, other), strict=True):
        assert slot is not None
        slot.view[:] = each.data
    assert slots[0] is not None
    assert slots[1] is not None
    first = memory.commit(slots[0], block.parent, block.digest)
    assert memory.commit(slots[1], other.parent, other.digest) is first
    assert await present(memory, [block]) == [True]
    assert_idle(memory)


async def test_a_pinned_slot_is_never_reused(rig: Rig) -> None:
    """Neither eviction nor discarding nor clearing touches bytes that somebody is reading."""
    memory = rig.memory(8)
    block = chain()[0]
    slot = memory.pin(put(memory, block))
    for number in range(6):
        await memory.store(chain(str(number)))
        assert slot.view == block.data
    await memory.discard([block.ref])
    assert memory.find(block.ref) is None
    await memory.discard([each.ref for each in chain("5")])
    again = put_variant(memory, block)
    assert again.offset != slot.offset
    for number in range(6):
        await memory.store(chain(f"more {number}"))
        assert slot.view == block.data
        memory.check()
    memory.unpin(slot)
    memory.check()
    await memory.clear(MINE)
    assert_idle(memory)
    assert memory.usage()[0].used_bytes == 0


async def test_many_slots_are_pinned_and_unpinned_as_one_by_one(rig: Rig) -> None:
    """Up to the first that is not here any more, or another size; who was forgotten is freed."""
    memory = rig.memory(8)
    blocks = chain()
    slots = [put(memory, block) for block in blocks]
    keys = [block.ref.key for block in blocks]
    assert memory.find_all(MINE, [*keys, bytes(32)]) == [*slots, None]
    assert memory.find_all(bytes(32), keys) == [None] * len(keys)
    assert memory.pin_leading([*slots[:2], None, slots[2]], SIZE) == 2
    assert memory.pin_leading(slots, SIZE + 1) == 0
    memory.pin(slots[0])
    await memory.discard([blocks[1].ref])
    assert memory.pin_leading(slots, SIZE) == 1
    memory.unpin_all([*slots[:2], slots[0]])
    assert [slot.pins for slot in slots] == [1, 0, 0, 0]
    memory.unpin_all(slots[:1])
    with pytest.raises(AssertionError, match="more often"):
        memory.unpin_all(slots[:1])
    assert_idle(memory)


def put_variant(memory: Memory, block: Block) -> Slot:
    """Stores the same block with other bytes, as a later writer would."""
    return put(memory, block_of(block.ref, block.parent, SIZE, variant=1))


async def test_all_pinned_means_no_room(rig: Rig) -> None:
    """Stores are refused, nobody is evicted, and nothing breaks."""
    memory = rig.memory(8)
    slots = [memory.pin(put(memory, block)) for block in chain("pinned", 8)]
    assert memory.coldest(SIZE, 1) == []
    assert await memory.store(chain("new")) == [False] * 4
    assert memory.reserve(chain("new")[0].ref, SIZE) is None
    for slot in slots:
        memory.unpin(slot)
    assert await memory.store(chain("new")) == [True] * 4


async def test_victims_are_of_the_class_that_needs_room(rig: Rig) -> None:
    """Room for a small block does not cost a large one that is colder."""
    memory = rig.memory(8)
    large = chain_of("large", 1, MINE, 20_000)
    await memory.store(large)
    small = chain("small")
    await memory.store(small)
    victims = memory.coldest(SIZE, 3 * 2 * PAGE_BYTES)
    assert [slot.ref for slot in victims] == [block.ref for block in reversed(small)][:3]


async def test_of_tiny_blocks_no_more_are_remembered_than_could_be_here(rig: Rig) -> None:
    """Each takes a page, and as a page it counts with the policy: asked for as well as written."""
    memory = rig.memory(8)
    asked = [BlockRef(MINE, key) for key in keys_of("asked", 1000)]
    for start in range(0, len(asked), 10):
        memory.use(Use(asked[start : start + 10], 0.0, block_bytes=1))
    pages = memory.capacity_bytes // PAGE_BYTES
    assert sum(ref in memory._policy for ref in asked) == pages
    await memory.store(chain_of("tiny", 10 * pages, MINE, 1))
    memory.use(Use(asked[:10], 0.0, block_bytes=1))
    assert sum(ref in memory._policy for ref in asked) <= pages
    assert len(memory.slots()) == pages


async def test_a_slab_changes_its_class_when_it_must(rig: Rig) -> None:
    """A size that has no slab empties that of the coldest block."""
    memory = rig.memory(8)
    old, young = chain("old"), chain("young")
    await memory.store(old)
    await memory.store(young)
    large = chain_of("large", 1, MINE, 4 * 2 * PAGE_BYTES)
    assert await memory.store(large) == [True]
    assert await present(memory, [*old, *young, *large]) == [False] * 4 + [True] * 5


async def test_one_pinned_slot_does_not_close_all_slabs(rig: Rig) -> None:
    """If the slab of the coldest block cannot be emptied, another one is."""
    memory = rig.memory(16)
    chains = [chain(word) for word in "abcd"]
    for blocks in chains:
        await memory.store(blocks)
    pinned = memory.pin(memory.find(chains[0][0].ref) or put(memory, chains[0][0]))
    large = chain_of("large", 1, MINE, 4 * 2 * PAGE_BYTES)
    assert await memory.store(large) == [True]
    assert pinned.view == chains[0][0].data
    memory.unpin(pinned)


async def test_children_leave_before_their_parents(rig: Rig) -> None:
    """However old a head is: what stays of a chain has no gap."""
    memory = rig.memory(8)
    blocks, other = chain(count=6), chain("other", 2)
    await memory.store(blocks)
    await memory.store(other)
    memory.use(Use([block.ref for block in blocks[3:]], 0.0))
    victims = memory.coldest(SIZE, 8 * 2 * PAGE_BYTES)
    depths = {block.ref: depth for depth, block in enumerate([*blocks, *other])}
    assert [depths[slot.ref] for slot in victims] == [7, 6, 5, 4, 3, 2, 1, 0]
    for slot in victims:
        memory.evict(slot)
        memory.check()
        held = [memory.find(block.ref) is not None for block in blocks]
        assert held == sorted(held, reverse=True)


async def test_a_parent_leaves_before_its_children_only_where_that_is_allowed(rig: Rig) -> None:
    """Where every leaf is pinned, its parents stay, unless they are known to lie below."""
    memory = rig.memory(8)
    blocks = chain(count=8)
    await memory.store(blocks)
    leaf = memory.find(blocks[-1].ref)
    assert leaf is not None
    memory.pin(leaf)
    assert memory.coldest(SIZE, 1) == []
    assert [slot.ref for slot in memory.coldest(SIZE, 1, parents=True)] == [blocks[-2].ref]
    memory.unpin(leaf)


async def test_who_forgets_a_block_forgets_what_descends_from_it(rig: Rig) -> None:
    """Nobody could use it any more. A parent that comes back later finds its children again."""
    memory = rig.memory(8)
    blocks = chain(count=4)
    await memory.store(blocks)
    assert await memory.discard([blocks[1].ref]) == 3
    assert await present(memory, blocks) == [True, False, False, False]
    await memory.store(blocks[2:])
    memory.check()
    await memory.store(blocks[:2])
    memory.check()
    assert await memory.discard([blocks[0].ref]) == 4
    assert_idle(memory)


@pytest.mark.parametrize("whole_namespace", [False, True])
async def test_who_forgets_a_block_that_is_not_here_forgets_who_waits_for_it(
    rig: Rig, whole_namespace: bool
) -> None:
    """Its children here, also those of another namespace, and all that descends from them."""
    memory = rig.memory(8)
    head, *tail = chain(count=2)
    theirs = block_of(BlockRef(namespace_of("theirs"), b"t" * 32), tail[0].ref, SIZE)
    foreign = block_of(BlockRef(namespace_of("theirs"), b"f" * 32), head.ref, SIZE)
    other = chain("other", 1)[0]._replace(ref=BlockRef(namespace_of("theirs"), b"o" * 32))
    await memory.store([*tail, theirs, foreign, other])
    copies = await (memory.clear(MINE) if whole_namespace else memory.discard([head.ref]))
    assert copies == 3
    here = [*tail, theirs, foreign, other]
    assert await memory.locate([block.ref for block in here]) == [None] * 3 + ["memory"]
    assert_idle(memory)


@pytest.mark.parametrize("length", [1, 2, 5])
async def test_no_block_descends_from_itself(rig: Rig, length: int) -> None:
    """Whoever would close a circle of parents is refused; his slot is free, the others stay."""
    memory = rig.memory(8)
    blocks = chain(count=length)
    await memory.store(blocks[1:])
    first = blocks[0]._replace(parent=blocks[-1].ref)
    assert await memory.store([first]) == [False]
    memory.check()
    assert await present(memory, blocks) == [False] + [True] * (length - 1)
    assert_idle(memory)
    assert await memory.store(blocks[:1]) == [True]
    assert await memory.discard([blocks[0].ref]) == length


def test_members_of_a_circle_are_named_once() -> None:
    """Even where somebody made one, its walk comes to an end."""
    one, two = Member(), Member()
    one.adopt(two)
    two.adopt(one)
    assert set(with_descendants([one])) == {one, two}


async def test_random_use_follows_the_model(rig: Rig, rng: random.Random) -> None:
    """Every plain decision at random, several sizes, pins that outlive their block: all counted.

    Bytes of a slot do not change while it is pinned, and what is found is what was stored.
    """
    memory = rig.memory(12)
    blocks = [
        block_of(BlockRef(MINE, key), None, rng.choice([100, SIZE, 20_000]))
        for key in keys_of("blocks", 40)
    ]
    data = {block.ref: block.data for block in blocks}
    reserved: list[tuple[Slot, Block]] = []
    pins: list[Slot] = []
    seen: set[str] = set()
    for _ in range(4000):
        block = rng.choice(blocks)
        here = memory.find(block.ref)
        what = rng.choice(["reserve", "commit", "abort", "pin", "unpin", "evict", "touch", "room"])
        if what == "reserve" and len(reserved) < 4:
            slot = memory.reserve(block.ref, len(block.data))
            if slot is not None:
                slot.view[:] = block.data
                reserved.append((slot, block))
        elif what in ("commit", "abort") and reserved:
            slot, block = reserved.pop(rng.randrange(len(reserved)))
            if what == "commit":
                kept = memory.commit(slot, block.parent, block.digest)
                assert kept is not None
                assert kept.view == block.data
            else:
                memory.abort(slot)
        elif what == "pin" and here is not None and len(pins) < 10:
            pins.append(memory.pin(here))
        elif what == "unpin" and pins:
            memory.unpin(pins.pop(rng.randrange(len(pins))))
        elif what == "evict" and here is not None:
            memory.evict(here)
            memory.evict(here)
        elif what == "touch":
            memory.use(Use([each.ref for each in rng.sample(blocks, 5)], 0.0))
        elif what == "room":
            for slot in memory.coldest(len(block.data), rng.choice([1, 1 << 16])):
                assert slot.indexed
                assert not slot.pins
                memory.evict(slot)
        else:
            continue
        seen.add(what)
        memory.check()
        assert all(slot.view == data[slot.ref] for slot in pins), "a pinned slot was reused"
        assert all(slot.view == data[slot.ref] for slot in memory.slots())
        assert not {s.offset for s, _ in reserved} & {s.offset for s in memory.slots()}
    assert len(seen) == 8
    for slot, _ in reserved:
        memory.abort(slot)
    for slot in pins:
        memory.unpin(slot)


async def test_a_closed_memory_gives_its_pages_back() -> None:
    """The arena's file and mapping are gone with the last view."""
    memory = Memory(1 << 20, 1 << 16, make_policy("lru", 1 << 20), ManualClock())
    await memory.store(chain())
    handle, arena = memory.arena.file, weakref.ref(memory.arena)
    assert os.fstat(handle).st_size == 1 << 20
    await memory.close()
    del memory
    gc.collect()
    assert arena() is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)


def test_views_outlive_the_arena() -> None:
    """Bytes that somebody still reads stay mapped after the end."""
    arena = Arena(1 << 16)
    view = arena.view(PAGE_BYTES, 100)
    view[:] = b"x" * 100
    arena.close()
    assert view == b"x" * 100


def test_an_arena_is_zero_and_writable() -> None:
    """Every byte of it, from the first to the last."""
    arena = Arena(1 << 16)
    assert arena.view(0, 1 << 16) == bytes(1 << 16)
    arena.view((1 << 16) - 1, 1)[:] = b"x"
    assert bytes(arena.view((1 << 16) - 1, 1)) == b"x"
    arena.close()


@pytest.mark.parametrize("length", [0, SIZE - 1, SIZE + 1])
async def test_to_read_another_length_copies_nothing(rig: Rig, length: int) -> None:
    """The buffer is as it was."""
    memory = rig.memory(8)
    block = chain()[0]
    await memory.store([block])
    into = bytearray(b"\xee" * length)
    assert memory.read(Load(block.ref, memoryview(into))) is None
    assert into == b"\xee" * length

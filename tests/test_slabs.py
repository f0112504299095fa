"""Who uses which bytes of the arena: no byte twice, none lost."""

import random

import pytest

from kvstore.tiers.slabs import PAGE_BYTES, Slabs

SLAB_BYTES = 16 * PAGE_BYTES
SLABS = 6


def test_slots_are_whole_pages_of_their_class() -> None:
    """A block takes its size rounded up to a page."""
    slabs = Slabs(SLABS * SLAB_BYTES, SLAB_BYTES)
    for size, slot in ((1, 1), (PAGE_BYTES, 1), (PAGE_BYTES + 1, 2), (5 * PAGE_BYTES, 5)):
        assert slabs.slot_bytes(size) == slot * PAGE_BYTES


def test_all_room_can_be_used_and_no_more() -> None:
    """As many slots as fit into the slabs, then none, then again after one was freed."""
    slabs = Slabs(SLABS * SLAB_BYTES, SLAB_BYTES)
    offsets = [slabs.allocate(PAGE_BYTES) for _ in range(16 * SLABS)]
    assert sorted(offset for offset in offsets if offset is not None) == [
        page * PAGE_BYTES for page in range(16 * SLABS)
    ]
    assert slabs.allocate(1) is None
    slabs.check()
    assert offsets[7] is not None
    slabs.free(offsets[7])
    assert slabs.allocate(1) == offsets[7]
    slabs.check()


def test_what_cannot_fit_is_refused() -> None:
    """A block larger than a slab has no class; a rest of capacity smaller than a slab is unused."""
    slabs = Slabs(SLAB_BYTES + SLAB_BYTES // 2, SLAB_BYTES)
    assert slabs.allocate(SLAB_BYTES + 1) is None
    assert slabs.allocate(SLAB_BYTES) == 0
    assert slabs.allocate(1) is None
    slabs.check()


def test_an_empty_slab_serves_another_class() -> None:
    """Slabs go back when their last slot does, whatever the order."""
    slabs = Slabs(SLABS * SLAB_BYTES, SLAB_BYTES)
    small = [slabs.allocate(1) for _ in range(16 * SLABS)]
    assert slabs.allocate(SLAB_BYTES) is None
    for offset in small:
        assert offset is not None
        if slabs.slab_of(offset) == 3:
            slabs.free(offset)
    assert slabs.allocate(SLAB_BYTES) == 3 * SLAB_BYTES
    assert slabs.allocate(1) is None
    slabs.check()


@pytest.mark.parametrize("pages", [3, 5, 7])
def test_a_class_that_does_not_divide_a_slab(pages: int) -> None:
    """What is left over at the end of a slab is never handed out."""
    slabs = Slabs(SLABS * SLAB_BYTES, SLAB_BYTES)
    size = pages * PAGE_BYTES
    offsets = []
    while (offset := slabs.allocate(size)) is not None:
        offsets.append(offset)
    assert len(offsets) == SLABS * (16 // pages)
    assert all(offset % SLAB_BYTES + size <= SLAB_BYTES for offset in offsets)
    assert slabs.used_bytes == len(offsets) * size
    slabs.check()


@pytest.mark.parametrize("size", [1, PAGE_BYTES + 1, SLAB_BYTES // 2 + 1, SLAB_BYTES])
def test_the_share_of_a_block_is_what_is_left_to_others_less(size: int) -> None:
    """All blocks that fit a slab together cost the whole slab."""
    slabs = Slabs(SLAB_BYTES, SLAB_BYTES)
    fit = 0
    while slabs.allocate(size) is not None:
        fit += 1
    assert slabs.share_bytes(size) == SLAB_BYTES // fit


def test_random_use_follows_the_model(rng: random.Random) -> None:
    """Slots of many classes, taken and freed at random: never overlapping, always counted."""
    slabs = Slabs(SLABS * SLAB_BYTES, SLAB_BYTES)
    owners: dict[int, int | None] = dict.fromkeys(range(SLABS * 16))
    taken: dict[int, int] = {}
    refused = 0
    for _ in range(6000):
        if taken and rng.random() < 0.48:
            offset = rng.choice(list(taken))
            for page in range(offset // PAGE_BYTES, offset // PAGE_BYTES + taken.pop(offset)):
                owners[page] = None
            slabs.free(offset)
        else:
            pages = rng.choice([1, 1, 2, 3, 5, 16])
            new = slabs.allocate(pages * PAGE_BYTES - rng.choice([0, 1, 4000]))
            if new is None:
                refused += 1
            else:
                for page in range(new // PAGE_BYTES, new // PAGE_BYTES + pages):
                    assert owners[page] is None, "bytes handed out twice"
                    owners[page] = new
                taken[new] = pages
        slabs.check()
        assert slabs.used_bytes == PAGE_BYTES * sum(taken.values())
    for offset in taken:
        slabs.free(offset)
    assert refused > 100
    slabs.check()
    assert slabs.used_bytes == 0
    assert all(slabs.allocate(SLAB_BYTES) is not None for _ in range(SLABS)), "a slab was lost"

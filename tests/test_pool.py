"""The bookkeeping of VRAM blocks."""

import random

import pytest

from kvstore_workers.pool import BlockPool, PoolUsage


def fill(pool: BlockPool[str], keys: str) -> list[int]:
    """Blocks published under the letters of `keys`, still in use."""
    allocation = pool.allocate(len(keys))
    assert allocation is not None
    for block, key in zip(allocation.blocks, keys, strict=True):
        assert pool.publish(block, key)
    return allocation.blocks


def evicted(pool: BlockPool[str], count: int) -> str:
    """The keys that giving away `count` blocks costs, as one text."""
    allocation = pool.allocate(count)
    assert allocation is not None
    return "".join(allocation.evicted)


def test_a_published_chain_is_found_up_to_its_first_missing_key() -> None:
    pool = BlockPool[str](8)
    blocks = fill(pool, "abc")
    assert pool.match("abxc") == blocks[:2]
    assert pool.match("xabc") == []
    pool.check()


def test_free_blocks_are_used_before_anything_is_evicted() -> None:
    pool = BlockPool[str](4)
    pool.release(fill(pool, "ab"))
    assert evicted(pool, 2) == ""
    assert evicted(pool, 1) == "b"
    pool.check()


def test_the_tail_of_a_chain_is_evicted_before_its_head() -> None:
    pool = BlockPool[str](4)
    pool.release(fill(pool, "abcd"))
    assert evicted(pool, 3) == "dcb"


def test_a_chain_that_was_matched_again_outlives_one_that_was_not() -> None:
    pool = BlockPool[str](4)
    pool.release(fill(pool, "ab"))
    pool.release(fill(pool, "xy"))
    pool.release(pool.match("ab"))
    assert evicted(pool, 2) == "yx"
    assert evicted(pool, 2) == "ba"


def test_a_shared_head_outlives_the_tails_of_both_chains() -> None:
    pool = BlockPool[str](3)
    first = fill(pool, "ab")
    pool.release(first)
    head = pool.match("a")
    second = head + fill(pool, "c")
    pool.release(second)
    assert evicted(pool, 3) == "bca"


def test_what_is_referenced_is_never_evicted() -> None:
    pool = BlockPool[str](3)
    held = fill(pool, "ab")
    assert pool.allocate(2) is None
    assert evicted(pool, 1) == ""
    assert pool.match("ab") == held
    pool.check()


def test_an_allocation_that_cannot_be_had_changes_nothing() -> None:
    pool = BlockPool[str](3)
    pool.release(fill(pool, "ab"))
    before = pool.usage()
    assert pool.allocate(4) is None
    assert pool.usage() == before == PoolUsage(free=1, cached=2, in_use=0)
    assert len(pool.match("ab")) == 2


def test_the_first_copy_of_a_key_stays() -> None:
    pool = BlockPool[str](4)
    (first,) = fill(pool, "a")
    allocation = pool.allocate(1)
    assert allocation is not None
    assert not pool.publish(allocation.blocks[0], "a")
    assert pool.publish(first, "a")
    pool.release(allocation.blocks)
    assert pool.match("a") == [first]
    assert pool.usage() == PoolUsage(free=3, cached=0, in_use=1)
    pool.check()


def test_an_unpublished_block_is_free_after_its_release() -> None:
    pool = BlockPool[str](2)
    allocation = pool.allocate(2)
    assert allocation is not None
    pool.release(allocation.blocks)
    assert pool.usage() == PoolUsage(free=2, cached=0, in_use=0)


def test_a_block_stays_in_use_until_its_last_reference_is_gone() -> None:
    pool = BlockPool[str](2)
    blocks = fill(pool, "a")
    pool.hold(blocks)
    pool.release(blocks)
    assert pool.usage().in_use == 1
    pool.release(blocks)
    assert pool.usage() == PoolUsage(free=1, cached=1, in_use=0)
    with pytest.raises(AssertionError, match="once too often"):
        pool.release(blocks)


def test_forgetting_frees_cached_blocks_and_leaves_those_in_use_to_their_owners() -> None:
    pool = BlockPool[str](4)
    pool.release(fill(pool, "ab"))
    mine = fill(pool, "cd")
    assert sorted(pool.forget_all()) == ["a", "b", "c", "d"]
    assert pool.usage() == PoolUsage(free=2, cached=0, in_use=2)
    assert pool.match("a") == pool.match("c") == []
    pool.check()
    pool.release(mine)
    assert pool.usage().free == 4
    pool.check()


@pytest.mark.parametrize("broken", ["free twice", "lost", "unnamed"])
def test_check_finds_what_is_broken(broken: str) -> None:
    pool = BlockPool[str](3)
    pool.release(fill(pool, "ab"))
    pool.check()
    if broken == "free twice":
        pool._free.append(pool._free[0])
    elif broken == "lost":
        pool._free.clear()
    else:
        pool._index.pop("a")
    with pytest.raises(AssertionError):
        pool.check()


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_requests_keeps_the_invariants_and_whole_prefixes(seed: int) -> None:
    """Chains of a tree are matched, extended, held and released at random.

    Afterwards and in between: every block is in one state, and no block is found whose parent
    is not found.
    """
    chance = random.Random(seed)
    pool = BlockPool[tuple[int, ...]](24)
    flying: list[list[int]] = []
    present: set[tuple[int, ...]] = set()
    for _ in range(400):
        if flying and chance.random() < 0.5:
            pool.release(flying.pop(chance.randrange(len(flying))))
        else:
            tokens = tuple(chance.randrange(2) for _ in range(chance.randrange(1, 9)))
            keys = [tokens[: length + 1] for length in range(len(tokens))]
            chain = pool.match(keys)
            allocation = pool.allocate(len(keys) - len(chain))
            if allocation is None:
                pool.release(chain)
            else:
                present.difference_update(allocation.evicted)
                for block, key in zip(allocation.blocks, keys[len(chain) :], strict=True):
                    assert pool.publish(block, key)
                    present.add(key)
                chain += allocation.blocks
                flying.append(chain)
                if chance.random() < 0.3:
                    pool.hold(chain)
                    flying.append(chain)
        if chance.random() < 0.01:
            pool.forget_all()
            present.clear()
        pool.check()
        orphans = [key for key in present if key[:-1] and key[:-1] not in present]
        assert not orphans, f"seed {seed}"
    for chain in flying:
        pool.release(chain)
    pool.check()
    assert pool.usage().in_use == 0

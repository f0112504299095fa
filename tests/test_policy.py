"""Which block is evicted first. Eviction order is no part of the contract of a tier."""

import random

from kvstore.api.tier import BlockRef
from kvstore.policy.lru import Lru
from kvstore.policy.policy import Policy
from tests.sim.blocks import keys_of, namespace_of

MINE = namespace_of("mine")


def refs(word: str, count: int) -> list[BlockRef]:
    """A chain of names."""
    return [BlockRef(MINE, key) for key in keys_of(word, count)]


def filled(*chains: list[BlockRef]) -> Lru:
    """A policy that knows these blocks."""
    policy = Lru()
    for chain in chains:
        for ref in chain:
            policy.insert(ref)
    return policy


def test_the_longest_unused_goes_first() -> None:
    """In the order of arrival, until something is used."""
    blocks = refs("chain", 5)
    policy = filled(blocks)
    assert list(policy.victims()) == blocks
    policy.touch([blocks[0]])
    policy.touch([blocks[2]])
    assert list(policy.victims()) == [blocks[1], blocks[3], blocks[4], blocks[0], blocks[2]]


def test_after_a_use_the_tail_goes_first() -> None:
    """Of a chain that was used as one, what remains is always a prefix."""
    old, chain = refs("old", 3), refs("chain", 5)
    policy = filled(chain, old)
    policy.touch(chain)
    order = list(policy.victims())
    assert order == [*old, *reversed(chain)]
    for evicted in range(5):
        left = set(chain) - set(order[: 3 + evicted])
        assert left == set(chain[: 5 - evicted])


def test_a_longer_use_renews_the_whole_chain() -> None:
    """A prefix that two prompts share outlives both of their tails."""
    trunk, one, two = refs("trunk", 2), refs("one", 2), refs("two", 2)
    policy = filled(trunk, one, two)
    policy.touch([*trunk, *one])
    policy.touch([*trunk, *two])
    assert list(policy.victims()) == [*reversed(one), *reversed(two), *reversed(trunk)]


def test_unknown_blocks_are_passed_over() -> None:
    """A use of what is not here adds nothing."""
    here, absent = refs("here", 3), refs("absent", 3)
    policy = filled(here)
    policy.touch([here[0], absent[0], here[1], absent[1]])
    assert list(policy.victims()) == [here[2], here[1], here[0]]
    policy.touch([])
    assert len(policy) == 3


def test_it_knows_exactly_what_is_here(rng: random.Random) -> None:
    """Random arrivals, uses and ends, against a plain list."""
    blocks = refs("blocks", 30)
    policy: Policy = Lru()
    model: list[BlockRef] = []
    for _ in range(3000):
        ref = rng.choice(blocks)
        if ref not in model:
            policy.insert(ref)
            model.append(ref)
        elif rng.random() < 0.4:
            policy.remove(ref)
            model.remove(ref)
        else:
            chain = rng.sample(blocks, rng.randint(0, 8))
            policy.touch(chain)
            used = [each for each in reversed(chain) if each in model]
            model = [each for each in model if each not in used] + used
        assert list(policy.victims()) == model
        assert len(policy) == len(model)

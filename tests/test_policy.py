"""Which block LRU evicts first. Eviction order is no part of the contract of a tier."""

import random

import pytest

from kvstore.api.tier import BlockRef
from kvstore.policy.policies import POLICIES, make_policy
from kvstore.policy.policy import Policy, Use
from tests.sim.blocks import keys_of, namespace_of

MINE = namespace_of("mine")


def refs(word: str, count: int) -> list[BlockRef]:
    """A chain of names."""
    return [BlockRef(MINE, key) for key in keys_of(word, count)]


def filled(*chains: list[BlockRef]) -> Policy[BlockRef]:
    """A policy that knows these blocks, each from its arrival alone."""
    policy = make_policy("lru", 1000)
    for chain in chains:
        for ref in chain:
            policy.insert(ref, None, 1)
    return policy


def order(policy: Policy[BlockRef]) -> list[BlockRef]:
    """What goes, the first first."""
    return list(policy.victims(0.0))


def test_the_longest_unused_goes_first() -> None:
    """In the order of arrival, until something is used."""
    blocks = refs("chain", 5)
    policy = filled(blocks)
    assert order(policy) == blocks
    policy.use(Use([blocks[0]], 0.0))
    policy.use(Use([blocks[2]], 0.0))
    assert order(policy) == [blocks[1], blocks[3], blocks[4], blocks[0], blocks[2]]


def test_after_a_use_the_tail_goes_first() -> None:
    """Of a chain that was used as one, what remains is always a prefix."""
    old, chain = refs("old", 3), refs("chain", 5)
    policy = filled(chain, old)
    policy.use(Use(chain, 0.0))
    assert order(policy) == [*old, *reversed(chain)]
    for evicted in range(5):
        left = set(chain) - set(order(policy)[: 3 + evicted])
        assert left == set(chain[: 5 - evicted])


def test_a_longer_use_renews_the_whole_chain() -> None:
    """A prefix that two prompts share outlives both of their tails."""
    trunk, one, two = refs("trunk", 2), refs("one", 2), refs("two", 2)
    policy = filled(trunk, one, two)
    policy.use(Use([*trunk, *one], 0.0))
    policy.use(Use([*trunk, *two], 0.0))
    assert order(policy) == [*reversed(one), *reversed(two), *reversed(trunk)]


def test_a_late_arrival_takes_the_rank_of_its_use() -> None:
    """What is written after another request came is as old as the request that asked for it."""
    chain, other = refs("chain", 3), refs("other", 2)
    policy = make_policy("lru", 1000)
    policy.use(Use(chain, 0.0))
    policy.use(Use(other, 1.0))
    for ref in [*other, *chain]:
        policy.insert(ref, None, 1)
    assert order(policy) == [*reversed(chain), *reversed(other)]


def test_what_is_awaited_at_the_end_of_the_order_still_arrives_there() -> None:
    """A block that comes after everything older has gone is the next to go, the tail first."""
    chain, other = refs("chain", 3), refs("other", 1)
    policy = filled(refs("old", 1))
    policy.use(Use(chain, 0.0))
    policy.use(Use(other, 1.0))
    policy.insert(other[0], None, 1)
    policy.remove(refs("old", 1)[0])
    for ref in chain:
        policy.insert(ref, None, 1)
    assert order(policy) == [*reversed(chain), *other]


def test_what_never_arrives_is_forgotten() -> None:
    """Blocks asked for and not here are remembered up to the capacity, or one whole chain."""
    policy = make_policy("lru", 10)
    first, long = refs("first", 4), refs("long", 30)
    policy.use(Use(first, 0.0))
    assert all(ref in policy for ref in first)
    policy.use(Use(long, 0.0))
    assert not any(ref in policy for ref in first)
    assert all(ref in policy for ref in long)
    assert len(policy) == 0
    assert order(policy) == []


def test_a_block_that_is_not_here_cannot_go() -> None:
    """Neither one that is unknown, nor one that is only awaited."""
    policy = make_policy("lru", 10)
    chain = refs("chain", 2)
    policy.use(Use(chain, 0.0))
    for ref in [chain[0], *refs("unknown", 1)]:
        with pytest.raises(KeyError):
            policy.remove(ref)


def test_it_knows_exactly_what_is_here(rng: random.Random) -> None:
    """Random arrivals, uses and ends, against a plain list."""
    blocks = refs("blocks", 30)
    policy = make_policy("lru", 1000)
    ranked: list[BlockRef] = []
    here: set[BlockRef] = set()
    for _ in range(3000):
        ref = rng.choice(blocks)
        if ref not in here and ref in ranked:
            policy.insert(ref, None, 1)
            here.add(ref)
        elif ref in here and rng.random() < 0.4:
            policy.remove(ref)
            here.remove(ref)
            ranked.remove(ref)
        else:
            chain = rng.sample(blocks, rng.randint(0, 8))
            policy.use(Use(chain, 0.0))
            ranked = [each for each in ranked if each not in chain] + chain[::-1]
        assert order(policy) == [each for each in ranked if each in here]
        assert len(policy) == len(here)
        assert [each in policy for each in blocks] == [each in ranked for each in blocks]


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    """Whoever mistypes a setting is told what may stand there."""
    with pytest.raises(ValueError, match="there are lru"):
        make_policy("lur", 1)


@pytest.mark.parametrize("name", POLICIES)
def test_no_order_of_keys_confuses_a_policy(name: str, rng: random.Random) -> None:
    """Keys are what callers say: backwards, twice in one chain, each other's parents."""
    names = refs("key", 12)
    policy = make_policy(name, 8)
    for number in range(600):
        chain = [rng.choice(names) for _ in range(rng.randrange(1, 9))]
        policy.use(Use(chain, float(number)))
    policy.use(Use(names[:2], 601.0))
    policy.use(Use([names[1], names[0]], 602.0))
    for one in range(4):
        policy.insert(names[one], names[one - 1] if one else names[3], 1)
    assert sorted(order(policy)) == sorted(names[:4])

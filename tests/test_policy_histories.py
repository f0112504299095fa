"""Every policy, through random histories: it names what is here, all of it, leaves first."""

import random

import pytest

from kvstore.policy.policies import POLICIES, make_policy
from kvstore.policy.policy import Policy, Use

Key = tuple[int, int, int]
"""Space, chain and depth."""
KIB = 1 << 10
SIZES = [KIB, 2 * KIB, 4 * KIB]
STEPS = 300


def parent_of(key: Key) -> Key | None:
    """The block before it in its chain."""
    space, chain, depth = key
    return (space, chain, depth - 1) if depth else None


class Tiny:
    """A tier without bytes that evicts as its policy says, but now and then passes one over."""

    def __init__(self, policy: Policy[Key], capacity_bytes: int, rng: random.Random) -> None:
        self.policy = policy
        self.here: set[Key] = set()
        self.now_s = 0.0
        self._capacity_bytes = capacity_bytes
        self._rng = rng

    def store(self, key: Key) -> None:
        """Makes room as memory does, then inserts."""
        size = SIZES[key[0]]
        while size + sum(SIZES[space] for space, _, _ in self.here) > self._capacity_bytes:
            victims = list(self.policy.victims(self.now_s))
            self.remove(next((v for v in victims if self._rng.random() < 0.8), victims[0]))
        self.policy.insert(key, parent_of(key), size)
        self.here.add(key)

    def remove(self, key: Key) -> None:
        """Somebody forgets a block."""
        self.policy.remove(key)
        self.here.remove(key)

    def check(self) -> None:
        """All that is here is named once, and nothing before its children."""
        victims = list(self.policy.victims(self.now_s))
        assert len(victims) == len(self.here) == len(self.policy)
        assert set(victims) == self.here
        place = {key: at for at, key in enumerate(victims)}
        for key in victims:
            parent = parent_of(key)
            assert parent not in place or place[key] < place[parent], "a parent before its child"


@pytest.mark.parametrize("name", POLICIES)
def test_any_history_leaves_every_block_nameable(name: str, rng: random.Random) -> None:
    """Uses of whole and of broken chains, arrivals in part, removals: blocks of three sizes."""
    for _ in range(12):
        capacity_bytes = rng.choice([8, 16, 40]) * KIB
        tier = Tiny(make_policy(name, capacity_bytes), capacity_bytes, rng)
        for _ in range(STEPS):
            tier.now_s += rng.random()
            space, chain = rng.randrange(3), rng.randrange(4)
            keys = [(space, chain, depth) for depth in range(rng.randrange(1, 9))]
            what = rng.choice(["use", "use", "expect", "store", "store", "remove"])
            if what == "use":
                tier.policy.use(Use(keys, tier.now_s, SIZES[space]))
            elif what == "expect":
                unknown = [key for key in keys if key not in tier.policy]
                tier.policy.use(Use(unknown, tier.now_s, SIZES[space]))
            elif what == "store":
                for key in keys:
                    rooted = parent_of(key) is None or parent_of(key) in tier.here
                    if key not in tier.here and (rooted or rng.random() < 0.3):
                        tier.store(key)
            elif tier.here:
                tier.remove(rng.choice(sorted(tier.here)))
            tier.check()

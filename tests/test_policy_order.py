"""What every policy promises whatever its order: it knows what is here, and leaves go first."""

import random
from collections.abc import Iterator

import pytest

from kvstore.api.hint import Reuse, ReuseHint
from kvstore.policy.policies import POLICIES, make_policy
from kvstore.policy.policy import Policy, Use

CAPACITY = 40


class Tree:
    """Chains of numbers that share prefixes: a request walks down, now and then on new ground."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._below: dict[int | None, list[int]] = {None: []}
        self.parents: dict[int, int | None] = {}

    def chain(self) -> list[int]:
        """A chain from the root, popular parts of the tree first."""
        chain: list[int] = []
        place: int | None = None
        for _ in range(self._rng.randint(0, 12)):
            below = self._below[place]
            if not below or self._rng.random() < 0.2:
                new = len(self.parents)
                self.parents[new] = place
                below.append(new)
                self._below[new] = []
            place = below[min(len(below) - 1, int(self._rng.expovariate(0.7)))]
            chain.append(place)
        return chain

    def hint(self) -> ReuseHint | None:
        """What somebody may say of a chain, true or not."""
        if self._rng.random() < 0.5:
            return None
        session = str(self._rng.randrange(5)).encode()
        return ReuseHint(session, self._rng.choice(list(Reuse)), self._rng.randrange(100_000))


class Tier:
    """What a tier does to its policy, at random: late writes, discards, pins, other sizes."""

    def __init__(self, rng: random.Random, policy: Policy[int]) -> None:
        self.rng = rng
        self.policy = policy
        self.tree = Tree(rng)
        self.here: set[int] = set()
        self.pinned: set[int] = set()
        self.now_s = 0.0
        self._missing: list[int] = []

    def steps(self, count: int) -> Iterator[int]:
        """Does something at random, again and again."""
        doings = [self._request, self._write, self._discard, self._pin, self._advise]
        for step in range(count):
            self.now_s += self.rng.expovariate(0.3)
            self.rng.choices(doings, [5, 8, 0.3, 1, 0.5])[0]()
            yield step

    def children(self, block: int) -> set[int]:
        """The blocks that are here and have this one as parent."""
        return {each for each in self.here if self.tree.parents[each] == block}

    def _request(self) -> None:
        chain = self.tree.chain()
        self.policy.use(Use(chain, self.now_s, hint=self.tree.hint()))
        lacking = [block for block in chain if block not in self.here]
        # Some of what is computed is never written.
        self._missing += lacking[: self.rng.randint(0, len(lacking) + 3)]

    def _write(self) -> None:
        for _ in range(min(len(self._missing), self.rng.randint(1, 6))):
            block = self._missing.pop(0)
            parent = self.tree.parents[block]
            if block in self.here or (parent is not None and parent not in self.here):
                continue
            if len(self.here) >= CAPACITY and not self._make_room(parent):
                continue
            self.policy.insert(block, parent, 1)
            self.here.add(block)

    def _make_room(self, parent: int | None) -> bool:
        for block in self.policy.victims(self.now_s):
            if block not in self.pinned and block != parent and not self.children(block):
                self.policy.remove(block)
                self.here.remove(block)
                return True
        return False

    def _discard(self) -> None:
        leaves = [block for block in sorted(self.here) if not self.children(block)]
        for block in self.rng.sample(leaves, min(len(leaves), 3)):
            self.policy.remove(block)
            self.here.remove(block)

    def _pin(self) -> None:
        self.pinned = set(self.rng.sample(sorted(self.here), min(len(self.here), 5)))

    def _advise(self) -> None:
        chain = self.tree.chain()
        self.policy.advise(Use(chain, self.now_s, hint=self.tree.hint()))


@pytest.mark.parametrize("name", POLICIES)
def test_it_knows_exactly_what_is_here(name: str, rng: random.Random) -> None:
    """Whatever comes, late or never: the victims are the blocks that are here, each once."""
    tier = Tier(rng, make_policy(name, CAPACITY))
    for step in tier.steps(1200):
        assert len(tier.policy) == len(tier.here)
        if step % 20 == 0:
            victims = list(tier.policy.victims(tier.now_s))
            assert len(victims) == len(tier.here)
            assert set(victims) == tier.here


@pytest.mark.parametrize("name", POLICIES)
def test_leaves_go_before_what_is_above_them(name: str, rng: random.Random) -> None:
    """Evicting in the order of the victims never leaves a block without its parent."""
    tier = Tier(rng, make_policy(name, CAPACITY))
    for step in tier.steps(1200):
        if step % 10 == 0:
            gone: set[int] = set()
            for block in tier.policy.victims(tier.now_s):
                assert tier.children(block) <= gone
                gone.add(block)


@pytest.mark.parametrize("name", POLICIES)
def test_what_was_used_is_known_until_it_is_forgotten(name: str) -> None:
    """A chain that was asked for is known at once, and what was removed is not."""
    policy = make_policy(name, CAPACITY)
    policy.use(Use([1, 2, 3], 0.0))
    assert all(block in policy for block in (1, 2, 3))
    assert 4 not in policy
    assert len(policy) == 0
    policy.insert(1, None, 1)
    policy.insert(2, 1, 1)
    policy.remove(2)
    assert 2 not in policy
    assert 3 in policy
    with pytest.raises(KeyError):
        policy.remove(2)
    with pytest.raises(KeyError):
        policy.remove(3)


@pytest.mark.parametrize("name", POLICIES)
def test_an_arrival_that_nobody_asked_for_counts_as_a_use(name: str) -> None:
    """It is here and can go like any other."""
    policy = make_policy(name, CAPACITY)
    policy.insert(7, None, 1)
    assert 7 in policy
    assert list(policy.victims(0.0)) == [7]


@pytest.mark.parametrize("name", POLICIES)
def test_requests_without_writes_cost_bounded_memory(name: str, rng: random.Random) -> None:
    """Blocks that are asked for and never come are forgotten, the oldest first."""
    policy = make_policy(name, CAPACITY)
    for start in range(0, 20_000, 10):
        policy.use(Use(list(range(start, start + 10)), start / 10))
    known = [block for block in range(20_000) if block in policy]
    assert known == list(range(20_000 - CAPACITY, 20_000))


@pytest.mark.parametrize("name", POLICIES)
def test_a_chain_longer_than_the_tier_keeps_its_head(name: str) -> None:
    """What cannot be held as a whole is held from its start, as far as it goes."""
    policy = make_policy(name, 10)
    here: set[int] = set()
    for now_s in range(3):
        policy.use(Use(list(range(30)), float(now_s)))
        for block in range(30):
            if block not in here:
                policy.insert(block, block - 1 if block else None, 1)
                here.add(block)
        surplus = len(here) - 10
        for block in list(policy.victims(float(now_s)))[:surplus]:
            policy.remove(block)
            here.remove(block)
        assert here == set(range(10))


@pytest.mark.parametrize("name", POLICIES)
def test_a_parent_may_go_and_come_before_its_children(name: str, rng: random.Random) -> None:
    """A tier that has a copy below may give up any block; the policy still knows what is here."""
    policy = make_policy(name, CAPACITY)
    parents = {block: rng.randrange(block) if block else None for block in range(30)}
    here: set[int] = set()
    for now_s in range(600):
        block = rng.randrange(30)
        if block in here:
            policy.remove(block)
            here.remove(block)
        else:
            if rng.random() < 0.5:
                policy.use(Use([block], float(now_s)))
            policy.insert(block, parents[block], 1)
            here.add(block)
        victims = list(policy.victims(float(now_s)))
        assert len(victims) == len(policy) == len(here)
        assert set(victims) == here
        for place, each in enumerate(victims):
            assert parents[each] not in victims[:place], "a child came after its parent"


@pytest.mark.parametrize("name", POLICIES)
def test_blocks_that_are_their_own_ancestors_can_go(name: str) -> None:
    """Nobody may keep a block for ever by a lie about its parent."""
    policy = make_policy(name, CAPACITY)
    policy.insert(1, 1, 1)
    policy.insert(2, 3, 1)
    policy.insert(3, 2, 1)
    policy.insert(4, None, 1)
    assert sorted(policy.victims(0.0)) == [1, 2, 3, 4]
    for block in (1, 2, 3, 4):
        policy.remove(block)
    assert list(policy.victims(0.0)) == []


@pytest.mark.parametrize("name", POLICIES)
def test_the_smallest_of_tiers_has_an_order(name: str) -> None:
    """Room for one block, of which experts may get nothing: they come to an end all the same."""
    policy = make_policy(name, 1)
    here: list[int] = []
    for now_s, block in enumerate([2, 2, 0, 2, 3]):
        policy.use(Use([block], float(now_s), 1))
        if block in here:
            continue
        for gone in here:
            assert list(policy.victims(float(now_s))) == here
            policy.remove(gone)
        policy.insert(block, None, 1)
        here = [block]


@pytest.mark.parametrize("name", POLICIES)
def test_where_less_fits_than_was_promised_the_order_is_the_policys_own(name: str) -> None:
    """A tier whose slots are larger than blocks holds less: experts then get less room too."""
    promised, fits = make_policy(name, 100), make_policy(name, 80)
    rng = random.Random(1)
    contents: list[set[int]] = [set(), set()]
    chains = [[chat * 100 + at for at in range(rng.randint(1, 8))] for chat in range(60)]
    hits = [0, 0]
    for now_s in range(3000):
        chain = chains[min(59, int(rng.expovariate(0.06)))]
        for number, policy in enumerate((promised, fits)):
            here = contents[number]
            hits[number] += sum(block in here for block in chain)
            policy.use(Use(chain, float(now_s)))
            for place, block in enumerate(chain):
                if block in here:
                    continue
                if len(here) == 80:
                    gone = next(iter(policy.victims(float(now_s))))
                    policy.remove(gone)
                    here.remove(gone)
                policy.insert(block, chain[place - 1] if place else None, 1)
                here.add(block)
    assert hits[0] >= 0.97 * hits[1]

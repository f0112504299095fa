"""Many blocks at once: a policy makes of a request what it would make of it block by block."""

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest

from kvstore.api.hint import Reuse, ReuseHint
from kvstore.policy import runs
from kvstore.policy.deferred import MOST_COST, Deferred
from kvstore.policy.policies import POLICIES, make_policy
from kvstore.policy.policy import Use

CAPACITY = 60
NEVER = 10**9


def uses(rng: random.Random, count: int) -> Iterator[Use[int]]:
    """Conversations that share beginnings, grow, and come back; some chains are odd."""
    now_s = 0.0
    chains = [[number * 1000 + at for at in range(rng.randint(2, 25))] for number in range(6)]
    for _ in range(count):
        # Often several requests come in the same moment.
        now_s += rng.choice([0.0, 0.1, 30.0])
        if rng.random() < 0.1:
            base = rng.choice(chains)
            at = rng.randint(1, len(base))
            new = rng.randrange(10**6, 10**9)
            chains[rng.randrange(6)] = base[:at] + [new + each for each in range(rng.randint(1, 9))]
        chain = list(rng.choice(chains))
        if rng.random() < 0.2:
            chain = rng.sample(chain, rng.randint(1, len(chain)))
        if rng.random() < 0.05:
            chain.append(chain[0])
        session = rng.choice([b"", b"one", b"two", b"three", b"four"])
        hint = ReuseHint(session, rng.choice(list(Reuse))) if rng.random() < 0.5 else None
        yield Use(chain, now_s, block_tokens=16, hint=hint)


class Cache:
    """A tier that writes what it was asked for and evicts as its policy says."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.here: set[int] = set()

    def use(self, use: Use[int], *, written: int) -> None:
        """One request, of which the first so many missing blocks are written."""
        self.policy.use(use)
        lacking = [block for block in dict.fromkeys(use.chain) if block not in self.here]
        for block in lacking[:written]:
            at = use.chain.index(block)
            self.policy.insert(block, use.chain[at - 1] if at else None, 1)
            self.here.add(block)
        surplus = max(0, len(self.here) - CAPACITY)
        for block in list(islice(self.policy.victims(use.now_s), surplus)):
            self.policy.remove(block)
            self.here.remove(block)


def state(tournament: Any, now_s: float) -> dict[str, Any]:
    """All that decides what comes next."""
    return {
        "victims": list(tournament.victims(now_s)),
        "leader": tournament.leader,
        "columns": [column.tobytes() for column in tournament._blocks._columns],
        "keys": list(tournament._blocks.keys),
        "experts": [
            (
                expert._bytes,
                expert._order._heap if hasattr(expert, "_order") else [],
                expert._evidence.events.tobytes() if hasattr(expert, "_evidence") else b"",
            )
            for expert in tournament._experts
        ],
    }


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "leaf-gdsf"])
def test_at_once_is_as_one_by_one(
    name: str, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same victims, leader and records after every request."""
    together, each = (Cache(make_policy(name, CAPACITY)) for _ in range(2))
    at_once = 0
    split = runs.split

    def count(*arguments: Any) -> Any:
        nonlocal at_once
        found = split(*arguments)
        at_once += len(found[1]) > 0
        return found

    for module in ("lru", "lru2", "lfuda", "s3fifo", "hazard"):
        monkeypatch.setattr(f"kvstore.policy.experts.{module}.split", count)
    for use in uses(rng, 600):
        written = rng.choice([0, 5, 100])
        monkeypatch.setattr(runs, "LEAST", 1)
        together.use(use, written=written)
        monkeypatch.setattr(runs, "LEAST", NEVER)
        each.use(use, written=written)
        assert state(together.policy, use.now_s) == state(each.policy, use.now_s)
    assert at_once > 300


@pytest.mark.parametrize("name", POLICIES)
def test_later_is_as_at_once(name: str, rng: random.Random) -> None:
    """Whoever asks, inserts or forgets meets a policy that has heard of every use before."""
    later, now = Cache(Deferred(make_policy(name, CAPACITY))), Cache(make_policy(name, CAPACITY))
    waited = 0
    for use in uses(rng, 400):
        written = rng.choice([0, 0, 5, 100])
        for cache in (later, now):
            if written:
                cache.use(use, written=written)
            else:
                cache.policy.use(use)
        waited = max(waited, len(later.policy._uses))
        if rng.random() < 0.1:
            later.policy.settle()
        if rng.random() < 0.1:
            for cache in (later, now):
                cache.policy.advise(use)
        if rng.random() < 0.2:
            assert (use.chain[0] in later.policy) == (use.chain[0] in now.policy)
        if rng.random() < 0.3:
            assert list(later.policy.victims(use.now_s)) == list(now.policy.victims(use.now_s))
        if rng.random() < 0.2:
            assert state(later.policy._told(), use.now_s) == state(now.policy, use.now_s)
    assert waited > 1


def test_what_waits_is_bounded() -> None:
    """A use without blocks costs something as well; what is too much is told, the oldest first."""
    policy: Deferred[int] = Deferred(make_policy("lru", CAPACITY))
    for start in range(0, 10 * MOST_COST, 1000):
        policy.use(Use(range(start, start + 1000), 0.0))
        assert policy.waiting <= MOST_COST
    for _ in range(2 * MOST_COST):
        policy.use(Use([], 0.0))
    assert len(policy._uses) <= MOST_COST
    while policy.settle():
        pass
    assert (policy.waiting, len(policy._uses)) == (0, 0)

"""The optimum is the optimum: against all cache contents there are, and no policy passes it."""

import random
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.policy.policies import POLICIES, make_policy
from kvstore.replay.optimum import optimum
from kvstore.replay.replay import Cache, replay
from kvstore.replay.trace import Trace, TraceBuilder

BLOCK_TOKENS = 4


def trace_of(chains: list[list[int]], tail_tokens: int = 0) -> Trace:
    """A trace with one request each second; each may end with a partial block."""
    builder = TraceBuilder("made", BLOCK_TOKENS)
    for now_s, names in enumerate(chains):
        partial = ["tail"] if tail_tokens else []
        builder.add(float(now_s), len(names) * BLOCK_TOKENS + tail_tokens, [*names, *partial])
    return builder.finish()


def best_of_all(trace: Trace, capacity: int) -> int:
    """The most blocks that any choice of contents hits: each request may keep what it likes."""
    reachable: dict[frozenset[int], int] = {frozenset(): 0}
    for request in trace.requests:
        following: dict[frozenset[int], int] = {}
        for content, hits in reachable.items():
            leading = 0
            while leading < len(request.chain) and request.chain[leading] in content:
                leading += 1
            possible = sorted(content | set(request.chain))
            for size in range(min(capacity, len(possible)) + 1):
                for kept in combinations(possible, size):
                    key = frozenset(kept)
                    following[key] = max(following.get(key, 0), hits + leading)
        reachable = following
    return max(reachable.values())


def test_no_choice_of_contents_is_better(rng: random.Random) -> None:
    """150 small traces against a search of every content after every request."""
    for _ in range(150):
        capacity = rng.randint(2, 3)
        chains = [
            [rng.randrange(2) for _ in range(rng.randint(1, 3))] for _ in range(rng.randint(5, 8))
        ]
        trace = trace_of(chains)
        hits = optimum(trace, capacity) * trace.input_tokens / BLOCK_TOKENS
        assert round(hits, 6) == best_of_all(trace, capacity), (capacity, chains)


chains = st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None)
@given(chains, st.integers(1, 12), st.sampled_from(sorted(POLICIES)), st.integers(0, 3))
def test_no_policy_passes_the_optimum(
    chains: list[list[int]], capacity: int, name: str, tail_tokens: int
) -> None:
    """Nor does the optimum pass a cache that forgets nothing."""
    trace = trace_of(chains, tail_tokens)
    best = optimum(trace, capacity)
    assert replay(trace, make_policy(name, capacity), capacity) <= best + 1e-12
    assert best <= trace.infinite_token_hit_rate + 1e-12


@settings(max_examples=40, deadline=None)
@given(chains, st.integers(1, 12), st.sampled_from(sorted(POLICIES)))
def test_a_replayed_cache_holds_only_prefixes(
    chains: list[list[int]], capacity: int, name: str
) -> None:
    """After every request: no more than fits, and no block without its parent."""
    trace = trace_of(chains)
    cache = Cache(make_policy(name, capacity), capacity, BLOCK_TOKENS)
    for request in trace.requests:
        cache.use(request)
        assert len(cache.here) <= capacity
        assert all(parent is None or parent in cache.here for parent in cache.here.values())


@pytest.mark.parametrize("name", POLICIES)
def test_with_room_for_all_every_policy_is_the_same(name: str, rng: random.Random) -> None:
    """What never has to evict has what an infinite cache of full blocks has."""
    trace = trace_of([[rng.randrange(3) for _ in range(rng.randint(0, 6))] for _ in range(100)])
    capacity = trace.unique_blocks
    found = replay(trace, make_policy(name, capacity), capacity)
    assert found == pytest.approx(trace.infinite_token_hit_rate)
    assert optimum(trace, capacity) == pytest.approx(trace.infinite_token_hit_rate)


def test_tokens_are_counted_to_the_end_of_the_prompt() -> None:
    """A hit counts whole blocks; what lies in a partial one is asked for and never had."""
    trace = trace_of([[1, 2], [1, 2], [1, 3]], tail_tokens=3)
    assert trace.input_tokens == 3 * 11
    assert replay(trace, make_policy("lru", 9), 9) == pytest.approx((8 + 4) / 33)
    assert trace.infinite_token_hit_rate == pytest.approx((11 + 4) / 33)

"""Which codec a space gets: what was measured decides, and how often it is measured is bounded."""

import random
from itertools import pairwise

import pytest

from kvstore.codec import CodecId
from kvstore.codec_choice import (
    FIRST_TRIALS,
    TIE,
    TRIAL_BLOCKS,
    TRIAL_PERIOD_S,
    UNMEASURED,
    Choice,
    Link,
    Trial,
    byte_s,
    decide,
)

RAW, LZ4, STRONG = CodecId.RAW, CodecId.BITSHUFFLE_LZ4, CodecId.PLANES_ZSTD

KV = [
    Trial(RAW, 1.0, 0.0, 1 / 8e9),
    Trial(LZ4, 1 / 1.2, 1 / 1.4e9, 1 / 2.8e9),
    Trial(STRONG, 1 / 1.5, 1 / 0.35e9, 1 / 1.0e9),
]
"""Bytes like those of a small model, at the speeds of a small machine."""
NOISE = [Trial(each.codec, 1.0, each.encode_s, each.decode_s) for each in KV]


def link_of(put_bytes_per_s: float, get_bytes_per_s: float | None = None) -> Link:
    """A link that was seen to have these speeds."""
    link = Link()
    link.moved("put", 1 << 20, (1 << 20) / put_bytes_per_s)
    if get_bytes_per_s is not None:
        link.moved("get", 1 << 20, (1 << 20) / get_bytes_per_s)
    return link


@pytest.mark.parametrize(
    ("trials", "bytes_per_s", "codec"),
    [
        (KV, 20e6, STRONG),
        (KV, 100e6, STRONG),
        (KV, 300e6, LZ4),
        (KV, 10e9, RAW),
        (NOISE, 1e6, RAW),
        (NOISE, 10e9, RAW),
    ],
    ids=["crawling", "slow", "middling", "fast", "noise, slow", "noise, fast"],
)
def test_the_link_and_the_bytes_decide(
    trials: list[Trial], bytes_per_s: float, codec: CodecId
) -> None:
    """A slow link is worth a strong codec, a fast one none; what gains nothing is left alone."""
    choice = Choice()
    assert choice.due(0.0)
    choice.learn(trials)
    assert choice.choose(link_of(bytes_per_s, bytes_per_s)) is codec


def test_what_is_chosen_is_never_much_slower_than_the_best(rng: random.Random) -> None:
    """Whatever was measured: within the tie of the soonest, and none of those stores less."""
    for _ in range(2000):
        trials = [
            Trial(codec, rng.uniform(0.2, 1), rng.expovariate(1e9), rng.expovariate(1e9))
            for codec in (RAW, LZ4, STRONG)
        ]
        link_s = rng.expovariate(1e8)
        costs = {trial.codec: byte_s(trial, link_s) for trial in trials}
        stored = {trial.codec: trial.stored for trial in trials}
        chosen = decide(trials, link_s)
        assert costs[chosen] <= TIE * min(costs.values())
        for codec, cost in costs.items():
            if cost <= TIE * min(costs.values()):
                assert round(stored[chosen], 2) <= round(stored[codec], 2)


def test_before_anything_is_known_the_cheap_codec_is_used() -> None:
    """Neither a link without trials nor trials without a link say anything."""
    choice = Choice()
    assert choice.choose(link_of(1e6)) is UNMEASURED
    choice.learn(KV)
    assert choice.choose(Link()) is UNMEASURED
    assert choice.choose(link_of(1e6)) is STRONG


def test_one_direction_stands_for_the_other_until_that_is_seen() -> None:
    """A tier that was only written to is taken to read as fast."""
    assert link_of(100.0).both_ways_s == pytest.approx(2 / 100)
    assert link_of(100.0, 50.0).both_ways_s == pytest.approx(1 / 100 + 1 / 50)
    assert Link().both_ways_s is None


def test_the_link_is_what_it_was_lately() -> None:
    """A link that got slower is known as slow after some dozens of moves."""
    link = link_of(1e9)
    for _ in range(200):
        link.moved("put", 1 << 20, (1 << 20) / 1e6)
    assert link.byte_s("put") == pytest.approx(1e-6, rel=0.05)


def test_trials_are_seldom_after_the_first(rng: random.Random) -> None:
    """At most one in `TRIAL_BLOCKS` blocks and in `TRIAL_PERIOD_S` seconds, at any rate."""
    for blocks_per_s in (0.1, 1.0, 50.0, 10_000.0):
        choice, now_s, tried = Choice(), 0.0, []
        for number in range(5000):
            now_s += rng.expovariate(blocks_per_s)
            if choice.due(now_s):
                tried.append((number, now_s))
        assert [number for number, _ in tried[:FIRST_TRIALS]] == list(range(FIRST_TRIALS))
        for (number, at_s), (later, later_s) in pairwise(tried[FIRST_TRIALS - 1 :]):
            assert later - number > TRIAL_BLOCKS
            assert later_s - at_s >= TRIAL_PERIOD_S
        assert len(tried) > FIRST_TRIALS or now_s < TRIAL_PERIOD_S


def test_a_space_that_changes_gets_another_codec() -> None:
    """Later trials outweigh earlier ones: bytes that became noise are not encoded for long."""
    choice, link = Choice(), link_of(20e6)
    choice.learn(KV)
    assert choice.choose(link) is STRONG
    for _ in range(8):
        choice.learn(NOISE)
    assert choice.choose(link) is RAW

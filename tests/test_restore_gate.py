"""Restore or recompute: what the gate lets through, given what it was told."""

import random

import pytest

from kvstore_client.match import Run
from kvstore_client.restore_gate import EXPLORE_EVERY, RestoreGate

BLOCK_TOKENS = 16
BLOCK_BYTES = 1 << 20
PREFILL_S = 0.001
"""For each token."""
BLOCK_S = BLOCK_TOKENS * PREFILL_S


def gate_of(**tiers: tuple[float, float]) -> RestoreGate:
    """A gate that knows the engine, and of each tier the seconds of a call and of a block."""
    gate = RestoreGate(BLOCK_TOKENS, BLOCK_BYTES)
    for tokens in (100, 700, 300):
        gate.computed(tokens, tokens * PREFILL_S)
    for tier, (call_s, block_s) in tiers.items():
        for blocks in (1, 8, 3, 20):
            gate.loaded([tier] * blocks, call_s + blocks * block_s)
    return gate


def run(blocks: int, tier: str) -> Run:
    return Run(blocks, tier, leased=True)


def test_what_is_unknown_is_loaded() -> None:
    """Neither the engine nor the tier was measured yet."""
    gate = RestoreGate(BLOCK_TOKENS, BLOCK_BYTES)
    assert gate.worth([run(5, "disk")]) == 5
    gate.loaded(["disk"] * 5, 1000.0)
    assert gate.worth([run(5, "disk")]) == 5
    assert gate_of().worth([run(5, "disk")]) == 5


def test_a_fast_tier_is_loaded_and_a_slow_one_computed() -> None:
    """Half as long as computing is worth it, twice as long is not."""
    gate = gate_of(memory=(0.0, BLOCK_S / 2), disk=(0.0, BLOCK_S * 2))
    assert gate.worth([run(8, "memory")]) == 8
    assert gate.worth([run(8, "disk")]) == 0
    assert gate.worth([run(8, "memory"), run(8, "disk")]) == 8


def test_a_slow_run_is_loaded_for_what_lies_behind_it() -> None:
    """A prefix has no gaps: what is lost on it may be won behind it, or not."""
    gate = gate_of(memory=(0.0, BLOCK_S / 10), disk=(0.0, BLOCK_S * 2))
    assert gate.worth([run(2, "disk"), run(8, "memory")]) == 10
    assert gate.worth([run(8, "disk"), run(2, "memory")]) == 0


def test_a_call_that_costs_much_needs_a_long_prefix() -> None:
    """The break-even point lies where what is saved makes up for the call itself."""
    gate = gate_of(disk=(20 * BLOCK_S, BLOCK_S / 2))
    assert gate.worth([run(39, "disk")]) == 0
    assert gate.worth([run(41, "disk")]) == 41


def test_what_is_held_is_not_counted() -> None:
    """The caller's own blocks cost nothing and save nothing."""
    gate = gate_of(memory=(0.0, BLOCK_S / 2), disk=(0.0, BLOCK_S * 2))
    assert gate.worth([run(3, ""), run(5, "memory")], held_blocks=3) == 5
    assert gate.worth([run(5, "memory"), run(4, "disk")], held_blocks=2) == 3
    assert gate.worth([run(3, ""), run(5, "disk")], held_blocks=3) == 0


def test_a_tier_that_recovered_is_noticed() -> None:
    """Now and then what was not worth it is loaded all the same, and measured."""
    gate = gate_of(disk=(0.0, BLOCK_S * 2))
    wanted = [gate.worth([run(8, "disk")]) for _ in range(2 * EXPLORE_EVERY)]
    assert wanted.count(8) == 2
    for _ in range(40):
        gate.loaded(["disk"] * 8, 8 * BLOCK_S / 4)
    assert gate.worth([run(8, "disk")]) == 8


def test_a_faster_engine_computes_more() -> None:
    """Its speed is what it was lately."""
    gate = gate_of(disk=(0.0, BLOCK_S / 2))
    assert gate.worth([run(8, "disk")]) == 8
    for _ in range(40):
        gate.computed(1000, 1000 * PREFILL_S / 4)
    assert gate.worth([run(8, "disk")]) == 0


def test_a_load_from_several_tiers_teaches_nothing() -> None:
    """Whose time it took nobody knows."""
    gate = gate_of(memory=(0.0, BLOCK_S / 2))
    gate.loaded(["memory", "redis"], 1000.0)
    assert gate.worth([run(8, "memory")]) == 8
    assert gate.worth([run(8, "redis")]) == 8


@pytest.mark.parametrize("turn", range(20))
def test_any_history_gives_a_length_that_exists(turn: int, rng: random.Random) -> None:
    """Measurements of any kind, zero seconds included: never more than was found."""
    gate = RestoreGate(BLOCK_TOKENS, BLOCK_BYTES)
    for _ in range(50):
        tier = rng.choice(["memory", "redis", "disk"])
        seconds = rng.choice([0.0, rng.random(), 1e-9, 1e6])
        gate.loaded([tier] * rng.randrange(1, 50), seconds)
        gate.computed(rng.randrange(0, 5000), rng.choice([0.0, rng.random(), 1e6]))
        held = rng.randrange(3)
        runs = [run(held, "")] * bool(held)
        runs += [run(rng.randrange(1, 9), rng.choice(["memory", "redis"])) for _ in range(3)]
        found = sum(each.blocks for each in runs) - held
        assert 0 <= gate.worth(runs, held_blocks=held) <= found

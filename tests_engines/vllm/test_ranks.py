"""Two ranks, through the connector and below vLLM's offloading: each stores and loads its part."""

from typing import Any

import pytest

from tests_engines.vllm.asking import (
    engine,
    full_blocks,
    generate,
    kvstore,
    prompt,
    tiered,
)
from tests_engines.vllm.models import Models
from tests_engines.vllm.report import (
    EXTERNAL,
    Engine,
    assert_nothing_restored,
    assert_restored,
    assert_same,
)
from tests_engines.vllm.rig import Node, Runner

PROMPTS = (prompt(1, 700), prompt(2, 1000))
BLOCKS = full_blocks(*PROMPTS)
WAYS = ("connector", "tier")
TWO: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
PATIENCE_S = 60.0
"""Ranks that wait for each other spin, and with fewer cores than ranks nobody else runs then."""

Runs = dict[str, Engine]


@pytest.fixture(scope="module")
def runs(runner: Runner, tiny: Models, node: Node) -> Runs:
    """A process that saves, one that loads, and after it an engine of one rank, each both ways."""
    budgets = {"match_budget_s": PATIENCE_S, "load_budget_s": PATIENCE_S}
    wanted = {
        "connector": kvstore(node.endpoint, model_revision="ranks", lease_ms=180_000, **budgets),
        "tier": tiered(node.endpoint, model_revision="ranks of the tier", **budgets),
    }
    first, again = generate("first", *PROMPTS), generate("again", *PROMPTS)

    def both(name: str, *steps: Any, **llm: Any) -> list[dict[str, Any]]:
        return [engine(f"{name} {way}", tiny["llama"], wanted[way], *steps, **llm) for way in WAYS]

    saving = runner.run(*both("saving", first, again, **TWO))
    # A block of the connector for each rank; a row of the tier has both ranks' halves.
    assert node.wait_for(2 * BLOCKS + BLOCKS) == 3 * BLOCKS
    loading = runner.run(*both("loading", first, **TWO), *both("single", first))
    return {each.name: each for each in saving + loading}


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_restore_each_its_own_half(runs: Runs, way: str) -> None:
    """What another process restores is what was computed, of both ranks, to the last bit."""
    saved, loaded = runs[f"saving {way}"], runs[f"loading {way}"]
    assert_restored(loaded, saved, blocks=2 * BLOCKS)
    assert loaded["first"].prompt_tokens(EXTERNAL) == BLOCKS * 128
    assert_same(loaded["first"], saved["again"])


@pytest.mark.parametrize("way", WAYS)
def test_the_halves_are_not_each_others(runs: Runs, way: str) -> None:
    """Each rank has computed other bytes, so none can have got its neighbour's."""
    halves = runs[f"saving {way}"].first_digests("computed")
    assert len(halves) == len(set(halves.values())) == 2 * BLOCKS


@pytest.mark.parametrize("way", WAYS)
def test_one_rank_never_finds_what_two_have_stored(runs: Runs, way: str) -> None:
    """Its blocks have other bytes under the same hashes."""
    assert_nothing_restored(runs[f"single {way}"])

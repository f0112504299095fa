"""The comparisons of these tests notice one page that is not what it was."""

import pytest

from tests_engines.vllm.asking import connector, engine, full_blocks, generate, prompt
from tests_engines.vllm.models import Models
from tests_engines.vllm.report import Engine, assert_restored, assert_same
from tests_engines.vllm.rig import Runner

PROMPTS = (prompt(1, 700), prompt(2, 1000))
BLOCKS = full_blocks(*PROMPTS)


@pytest.fixture(scope="module")
def runs(runner: Runner, tiny: Models) -> list[Engine]:
    """Pages kept in the process, and pages of which one was zeroed after the load."""
    pages = connector("LocalPages")
    steps = (generate("first", *PROMPTS), generate("again", *PROMPTS))
    return runner.run(
        engine("saved", tiny["llama"], pages, *steps),
        engine("loaded", tiny["llama"], pages, *steps),
        engine("spoiled", tiny["llama"], pages, *steps, plant="zero"),
    )


def test_pages_that_are_right_pass(runs: list[Engine]) -> None:
    """So the test below fails for one reason only."""
    saved, loaded, _ = runs
    assert_restored(loaded, saved, blocks=BLOCKS)
    assert_same(loaded["first"], saved["again"])


def test_one_zeroed_page_fails_each_comparison(runs: list[Engine]) -> None:
    """Digests see it, and so do tokens and probabilities."""
    saved, _, spoiled = runs
    with pytest.raises(AssertionError, match="differ from what was computed"):
        assert_restored(spoiled, saved, blocks=BLOCKS)
    with pytest.raises(AssertionError):
        assert_same(spoiled["again"], saved["again"])


def test_a_count_that_is_not_met_fails(runs: list[Engine]) -> None:
    """Nobody passes by restoring nothing."""
    saved, loaded, _ = runs
    with pytest.raises(AssertionError, match="0 blocks restored, not 12"):
        assert_restored(saved, loaded, blocks=BLOCKS)

"""Each kind of model: what one process has computed, another restores, bit for bit."""

from dataclasses import dataclass
from typing import Any

import pytest

from tests_engines.vllm.asking import connector, engine, generate, kvstore, prompt
from tests_engines.vllm.models import Models
from tests_engines.vllm.report import (
    COMPUTED,
    EXTERNAL,
    LOCAL,
    Engine,
    assert_restored,
    assert_same,
)
from tests_engines.vllm.rig import Node, Runner

PROMPTS = (prompt(1, 1400), prompt(2, 2000))
ALL_TOKENS = 3400


@dataclass(frozen=True)
class Kind:
    """A model, and what a load of the two prompts consists of."""

    model: str
    blocks: int
    tokens: int
    llm: dict[str, Any]


KINDS = (
    Kind("qwen3", 10 + 15, 25 * 128, {}),
    # Two groups: all blocks of the layers with full attention, of the others what the window sees.
    Kind("gemma3", 10 + 15 + 2 * 2, 25 * 128, {}),
    # A recurrent state is one block, at the end of what is restored. Its kernel wants bfloat16.
    # vLLM makes the blocks of both groups as many tokens long as a state has bytes: 640.
    Kind("qwen3-next", 2 + 3 + 2, 5 * 640, {"dtype": "bfloat16"}),
    # The kernel without AMX has blocks of 16 tokens, and vLLM keeps no prefixes for it: each of the
    # two times all comes from the store.
    Kind("deepseek-v2", 2 * (87 + 124), 211 * 16, {}),
)
NAMES = [kind.model for kind in KINDS]


def _engines(
    tiny: Models, wanted: dict[str, Any] | None, *, oracle: bool = False
) -> list[dict[str, Any]]:
    steps = (generate("first", *PROMPTS), generate("again", *PROMPTS))
    made = []
    for kind in KINDS:
        own = connector("LocalPages") if oracle and kind.model == "deepseek-v2" else wanted
        made.append(engine(kind.model, tiny[kind.model], own, *steps, **kind.llm))
    return made


def _by_name(engines: list[Engine]) -> dict[str, Engine]:
    return {each.name: each for each in engines}


@pytest.fixture(scope="module")
def first_process(runner: Runner, tiny: Models, node: Node) -> list[Engine]:
    """Engines without a store, then all of them over one node, each in spaces of its own."""
    ours = _engines(tiny, kvstore(node.endpoint))
    return runner.run(*_engines(tiny, None, oracle=True), *ours)


@pytest.fixture(scope="module")
def plain(first_process: list[Engine]) -> dict[str, Engine]:
    """Without a store; latent attention over pages that the process kept."""
    return _by_name(first_process[: len(KINDS)])


@pytest.fixture(scope="module")
def saved(first_process: list[Engine]) -> dict[str, Engine]:
    """Those that stored."""
    return _by_name(first_process[len(KINDS) :])


@pytest.fixture(scope="module")
def loaded(runner: Runner, tiny: Models, node: Node, saved: dict[str, Engine]) -> dict[str, Engine]:
    """The same in another process."""
    return _by_name(runner.run(*_engines(tiny, kvstore(node.endpoint))))


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_another_process_restores_it(
    saved: dict[str, Engine], loaded: dict[str, Engine], plain: dict[str, Engine], kind: Kind
) -> None:
    """The digests of all restored blocks are those stored; tokens and probabilities are equal."""
    mine, oracle = loaded[kind.model], plain[kind.model]
    assert_restored(mine, saved[kind.model], blocks=kind.blocks)
    assert mine.failed_blocks == 0
    assert mine["first"].prompt_tokens(EXTERNAL) == kind.tokens
    assert mine["first"].prompt_tokens(COMPUTED) == ALL_TOKENS - kind.tokens
    known = oracle["again"].prompt_tokens(LOCAL) + oracle["again"].prompt_tokens(EXTERNAL)
    assert known == kind.tokens, "the oracle must have computed as little"
    assert_same(mine["first"], oracle["again"])


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_saving_changes_nothing(
    saved: dict[str, Engine], plain: dict[str, Engine], kind: Kind
) -> None:
    """Whoever stores computes what it would without a store."""
    assert saved[kind.model]["first"].prompt_tokens(COMPUTED) == ALL_TOKENS
    assert_same(saved[kind.model]["first"], plain[kind.model]["first"])

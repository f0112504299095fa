"""What an engine is asked while its store is hurt, and what must hold of its answer."""

from pathlib import Path
from typing import Any

from tests_engines.vllm.asking import Request, ask, engine, full_blocks, generate, prompt
from tests_engines.vllm.report import EXTERNAL, Engine, assert_same

MATCH_BUDGET_S = 0.5
LOAD_BUDGET_S = 1.5
SLACK_S = 3.0
"""For threads to be woken on a busy machine. A frozen store answers after minutes: never, here."""
CLOSE = 1e-4
"""Where a part was restored before the fault, the rest is computed in a batch of another shape."""

STORED = prompt(1, 1500)
"""What every engine finds in the store, unless the store is hurt."""
AFTER = prompt(3, 600)
"""What it computes afterwards: it must go on."""
BLOCKS = full_blocks(STORED)
ALL_TOKENS = len(STORED["tokens"])
READY, OVER = "ready", "over"
STEPS: tuple[Request, ...] = (
    ask(READY),
    generate("stored", STORED),
    generate("after", AFTER),
    ask(OVER),
)
BUDGETS: dict[str, float] = {"match_budget_s": MATCH_BUDGET_S, "load_budget_s": LOAD_BUDGET_S}


def oracle(model: str, path: Path) -> dict[str, Any]:
    """Without a store: computed from the start, and over what vLLM itself kept."""
    steps = (generate("stored", STORED), generate("warm", STORED), generate("after", AFTER))
    return engine(model, path, None, *steps)


def assert_unharmed(made: Engine, oracle: Engine) -> None:
    """Both requests ended as without a store, and nobody waited longer than he may."""
    for step in made.steps.values():
        assert [output["finish_reason"] for output in step.outputs] == ["length"]
    assert_same(made["after"], oracle["after"])
    assert_output(made, oracle)
    assert made.longest_match_s < MATCH_BUDGET_S + SLACK_S
    assert made.longest_load_s < LOAD_BUDGET_S + SLACK_S
    seconds, hook = made.longest_hook_s
    assert seconds < LOAD_BUDGET_S + SLACK_S, hook


def assert_output(made: Engine, oracle: Engine) -> None:
    """Equal to the last bit where as much was restored as an oracle had; close in between."""
    step = made["stored"]
    if not made.restored_blocks:
        assert_same(step, oracle["stored"])
    elif made.failed_blocks == 0 and step.prompt_tokens(EXTERNAL) == BLOCKS * 128:
        assert_same(step, oracle["warm"])
    else:
        assert step.difference(oracle["stored"]) < CLOSE

"""What runs beside restoring: preemption, drafts, adapters, salts, two ranks. Nothing crosses."""

from pathlib import Path
from typing import Any

import pytest

from tests_engines.vllm.asking import (
    FORGET,
    engine,
    full_blocks,
    generate,
    kvstore,
    prompt,
)
from tests_engines.vllm.models import Models, make_adapter
from tests_engines.vllm.report import (
    COMPUTED,
    EXTERNAL,
    LOCAL,
    Engine,
    assert_nothing_restored,
    assert_restored,
    assert_same,
)
from tests_engines.vllm.rig import Node, Runner

PROMPTS = (prompt(1, 700), prompt(2, 1000))
BLOCKS = full_blocks(*PROMPTS)
CLOSE = 1e-4
"""Between log probabilities of float32 that were summed in batches of other shapes."""

# Preemption.

CROWD = tuple(prompt(10 + each, 700 + 20 * each) for each in range(4))
FEW_BLOCKS: dict[str, Any] = {"num_gpu_blocks_override": 25, "max_num_seqs": 4}


@pytest.fixture(scope="module")
def crowded(runner: Runner, tiny: Models, node: Node) -> dict[str, Engine]:
    """Four requests that do not fit together, with and without a store, loading either way."""
    steps = generate("first", *CROWD, together=True, max_tokens=300)
    wanted = {
        "plain": None,
        "asynchronous": kvstore(node.endpoint),
        "synchronous": kvstore(node.endpoint, load_async=False, model_revision="other"),
    }
    llama = tiny["llama"]
    made = runner.run(
        *(engine(name, llama, it, steps, **FEW_BLOCKS) for name, it in wanted.items())
    )
    return {each.name: each for each in made}


@pytest.mark.parametrize("name", ["asynchronous", "synchronous"])
def test_preempted_requests_come_back_from_the_store(crowded: dict[str, Engine], name: str) -> None:
    """vLLM took their blocks away and computed less again; the output is as without a store."""
    plain, mine = crowded["plain"]["first"], crowded[name]
    assert mine["first"].counters["vllm:num_preemptions"] > 0
    assert len(mine.restored_blocks) > 0
    computed = crowded["asynchronous"].first_digests("computed")
    assert all(computed[key] == digest for key, digest in mine.restored_blocks)
    assert [output["finish_reason"] for output in mine["first"].outputs] == ["length"] * 4
    assert mine["first"].difference(plain) < CLOSE


# Drafts of an n-gram.


def test_unverified_drafts_are_never_stored(runner: Runner, tiny: Models, node: Node) -> None:
    """With speculation on both sides: the same blocks, the same output, and drafts were taken."""
    # Repeating prompts, so that there is something to draft.
    pattern = prompt(5, 100)["tokens"]
    repeating = {"tokens": (pattern * 10)[:900]}
    speculation = {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 1,
        }
    }
    model, steps = tiny["llama-drafts"], generate("first", repeating, max_tokens=300)
    again = generate("again", repeating, max_tokens=300)
    ours = kvstore(node.endpoint)
    [saved] = runner.run(engine("saving", model, ours, steps, again, **speculation))
    [loaded] = runner.run(engine("loading", model, ours, steps, **speculation))
    drafts = "vllm:spec_decode_num_accepted_tokens"
    assert saved["first"].counters[drafts] > 0
    assert_restored(loaded, saved, blocks=full_blocks(repeating))
    assert_same(loaded["first"], saved["again"])
    longer = {"tokens": repeating["tokens"] + saved["first"].tokens[0]}
    plain, follow, oracle = runner.run(
        engine("plain", model, None, steps, again),
        engine("following", model, ours, generate("first", longer)),
        engine("oracle", model, None, generate("first", longer), generate("again", longer)),
    )
    assert loaded["first"].difference(plain["again"]) < CLOSE
    assert saved["first"].tokens == plain["first"].tokens
    # What was generated with drafts is stored as well, and only what was verified.
    assert_restored(follow, saved, blocks=full_blocks(longer))
    assert follow["first"].difference(oracle["again"]) < CLOSE


# Adapters.


@pytest.fixture(scope="module")
def adapters(home: Path, tiny: Models) -> dict[str, Path]:
    """Two, which change what the model says."""
    llama = tiny["llama"]
    return {name: make_adapter(home / name, seed, base=llama) for seed, name in enumerate("ab", 7)}


def _adapted(path: Path, name: str, number: int) -> dict[str, Any]:
    return {"adapter": {"name": name, "id": number, "path": str(path)}}


LORA: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}


def test_adapters_never_share_and_are_known_by_their_weights(
    runner: Runner, tiny: Models, node: Node, adapters: dict[str, Path], home: Path
) -> None:
    """Each restores its own; one that was replaced under its old path restores nothing."""
    llama, ours = tiny["llama"], kvstore(node.endpoint, model_revision="adapters")
    tokens = prompt(20, 700)
    a, b = (tokens | _adapted(adapters[name], name, number) for number, name in enumerate("ab", 1))
    steps = [generate(name, each) for name, each in {"a": a, "b": b, "none": tokens}.items()]
    warm = [generate(f"{name} warm", each) for name, each in {"a": a, "b": b}.items()]
    warm.append(generate("none warm", tokens))
    [saved] = runner.run(engine("saving", llama, ours, *steps, *warm, **LORA))
    assert len(saved.first_digests("computed")) == 3 * full_blocks(tokens)
    assert len({tuple(saved[name].tokens[0]) for name in ("a", "b", "none")}) == 3

    moved = make_adapter(home / "moved", 8, base=llama)
    make_adapter(adapters["a"], 9, base=llama)
    elsewhere = tokens | _adapted(moved, "elsewhere", 3)
    own, other, replaced, plain = runner.run(
        engine("own", llama, ours, generate("b", b), generate("none", tokens), **LORA),
        engine("moved", llama, ours, generate("moved", elsewhere), **LORA),
        engine("replaced", llama, ours, generate("a", a), **LORA),
        engine("plain", llama, None, generate("a", a), **LORA),
    )
    assert_restored(own, saved, blocks=2 * full_blocks(tokens))
    assert_same(own["b"], saved["b warm"])
    assert_same(own["none"], saved["none warm"])
    assert_same(other["moved"], saved["b warm"])
    assert_nothing_restored(replaced)
    assert_same(replaced["a"], plain["a"])
    assert replaced["a"].tokens != saved["a"].tokens


# Salts.


def test_salts_never_share(runner: Runner, tiny: Models, node: Node) -> None:
    """Two salts and none: each finds its own, a third nothing; within a process and across."""
    llama, ours = tiny["llama"], kvstore(node.endpoint, model_revision="salts")
    tokens = prompt(30, 700)
    blocks = full_blocks(tokens)
    salted = {name: tokens | {"salt": name} for name in ("one", "two")} | {"none": tokens}
    steps = [generate(name, each) for name, each in salted.items()]
    warm = [generate(f"{name} warm", each) for name, each in salted.items()]
    [saved] = runner.run(engine("saving", llama, ours, *steps, *warm))
    assert all(saved[name].prompt_tokens(COMPUTED) == 700 for name in salted)
    assert len(saved.first_digests("computed")) == 3 * blocks
    strange = generate("strange", tokens | {"salt": "three"})
    [loaded] = runner.run(engine("loading", llama, ours, *steps, strange))
    assert_restored(loaded, saved, blocks=3 * blocks)
    assert [loaded[name].prompt_tokens(EXTERNAL) for name in salted] == [blocks * 128] * 3
    assert loaded["strange"].prompt_tokens(EXTERNAL) == 0
    for name in salted:
        assert_same(loaded[name], saved[f"{name} warm"])


# What an engine has stored itself.


def test_a_forgotten_prefix_comes_back_within_one_process(
    runner: Runner, tiny: Models, node: Node
) -> None:
    """vLLM's own cache was emptied: what this engine has stored is its own to restore."""
    ours = kvstore(node.endpoint, model_revision="forgotten")
    steps = (generate("first", *PROMPTS), generate("again", *PROMPTS), FORGET)
    # A prompt that stores behind the step has to be through before it is asked for again.
    later = generate("later", prompt(40, 1500), max_tokens=40)
    [made] = runner.run(
        engine("one", tiny["llama"], ours, *steps, later, FORGET, generate("back", *PROMPTS))
    )
    assert made["again"].prompt_tokens(LOCAL) == BLOCKS * 128
    assert_restored(made, made, blocks=BLOCKS)
    assert_same(made["back"], made["again"])


def test_a_lease_shorter_than_a_load_may_take_is_not_asked_for_for_ever(
    runner: Runner, tiny: Models, node: Node
) -> None:
    """Whatever the settings say of leases, a request is restored or computed within its budgets."""
    short = kvstore(
        node.endpoint, model_revision="leases", lease_ms=1000, load_budget_s=2.0, match_budget_s=2.0
    )
    first = generate("first", PROMPTS[0])
    saved, loaded = runner.run(
        engine("saving", tiny["llama"], short, first, generate("again", PROMPTS[0])),
        engine("loading", tiny["llama"], short, first),
        timeout_s=120,
    )
    assert_restored(loaded, saved, blocks=full_blocks(PROMPTS[0]))
    assert_same(loaded["first"], saved["again"])

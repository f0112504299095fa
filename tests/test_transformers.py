"""`generate()` with stored prompts: bit for bit what it computes without, whatever the store does."""

import logging
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from kvstore.api.digest import block_digest
from kvstore.api.keys import chain_keys, root_key
from kvstore.api.space import SpaceDescriptor
from kvstore_client import Client, Space
from kvstore_client.restore_gate import RestoreGate
from kvstore_client.transformers import PromptCache
from kvstore_client.transformers.groups import layer_groups
from kvstore_client.transformers.versions import SUPPORTED, check_versions
from tests.node_process import NodeProcess
from tests.tiny_models import CHUNK, FAMILIES, WINDOW, prompt, tiny_model

NEW_TOKENS = 6
PATIENCE_S = 60.0
PATIENT = {"match_budget_s": 30.0, "load_budget_s": 30.0, "store_budget_s": 30.0}
SLIDING = [name for name in FAMILIES if "sliding" in name or name.startswith(("gemma2", "gemma3"))]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A node that all tests share: each has weights, or a salt, of its own."""
    node = NodeProcess(tmp_path_factory.mktemp("node"))
    yield node.start()
    node.kill()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    """A node that a test may stop, kill and start again."""
    node = NodeProcess(tmp_path)
    node.start()
    yield node
    node.kill()


@pytest.fixture
def salt(request: pytest.FixtureRequest) -> bytes:
    """One for each test."""
    return request.node.nodeid.encode()


@pytest.fixture(scope="module")
def llama() -> Any:
    """A model that nobody changes."""
    return tiny_model("llama", seed=1)


def patient(model: Any, endpoint: str, **options: Any) -> PromptCache:
    """Small chunks, and budgets that a busy machine can keep; loads whatever is there."""
    values = {"chunk_tokens": CHUNK, "restore_gate": False, **PATIENT, **options}
    return PromptCache(model, endpoint, **values)


def answer(model: Any, **inputs: Any) -> tuple[list[list[int]], torch.Tensor]:
    """New tokens, and the logits of each step, [step, row, token]."""
    output = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    length = inputs["input_ids"].shape[1]
    return output.sequences[:, length:].tolist(), torch.stack(output.logits)


def plain(model: Any, tokens: torch.Tensor) -> tuple[list[list[int]], torch.Tensor]:
    """The same without any of ours, in the same cut."""
    mask = torch.ones_like(tokens)
    return answer(model, input_ids=tokens, attention_mask=mask, prefill_chunk_size=CHUNK)


def assert_same(
    one: tuple[list[list[int]], torch.Tensor], other: tuple[list[list[int]], torch.Tensor]
) -> None:
    """Equal tokens, and logits without any difference."""
    assert one[0] == other[0]
    assert (one[1] - other[1]).abs().max().item() == 0.0


def ask(
    cache: PromptCache, model: Any, tokens: torch.Tensor, **options: Any
) -> tuple[int, Counter[str]]:
    """How much was restored, and from which tiers; the answer is that of a plain `generate`."""
    with cache.session(tokens, **options) as session:
        assert_same(answer(model, **session.inputs), plain(model, tokens))
    assert cache.drain(PATIENCE_S)
    return session.restored_tokens, Counter(session.restored_from)


@torch.no_grad()
def computed(
    model: Any, tokens: torch.Tensor, length: int
) -> tuple[DynamicCache, list[list[tuple[torch.Tensor, torch.Tensor]]]]:
    """The cache after `length` tokens in chunks, and of each chunk every layer's keys and values."""
    cache = DynamicCache(config=model.config)
    chunks = []
    for start in range(0, length, CHUNK):
        model(tokens[:, start : start + CHUNK], past_key_values=cache, use_cache=True)
        chunks.append(
            [(layer.keys[:, :, -CHUNK:], layer.values[:, :, -CHUNK:]) for layer in cache.layers]
        )
    return cache, chunks


def assert_equal_caches(one: DynamicCache, other: DynamicCache) -> None:
    """Bit for bit, and so is all that the layers know of what they have dropped."""
    assert len(one.layers) == len(other.layers)
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert type(mine) is type(theirs)
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)
        assert mine.get_seq_length() == theirs.get_seq_length()
        assert mine.get_mask_sizes(3) == theirs.get_mask_sizes(3)
        assert (mine.dtype, mine.device) == (theirs.dtype, theirs.device)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_restored_prompt_is_the_computed_one_bit_for_bit(family: str, endpoint: str) -> None:
    """Cache, tokens and logits; also where only the beginning is shared, and past the window."""
    model = tiny_model(family, seed=2)
    long = prompt(6 * CHUNK + 3)
    fork = torch.cat([long[:, : 4 * CHUNK + 2], prompt(9, seed=1)], dim=1)
    assert 4 * CHUNK > WINDOW
    with patient(model, endpoint) as cache:
        assert ask(cache, model, long) == (0, Counter())
        with cache.session(long) as session:
            assert session.restored_tokens == 6 * CHUNK
            reference, _ = computed(model, long, 6 * CHUNK)
            assert_equal_caches(session.past_key_values, reference)
            assert_same(answer(model, **session.inputs), plain(model, long))
        assert ask(cache, model, fork)[0] == 4 * CHUNK
        short = long[:, : 2 * CHUNK]
        assert ask(cache, model, short)[0] == CHUNK, "one token at least is left to compute"


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3_text"])
def test_every_block_is_stored_as_it_was_computed(family: str, endpoint: str) -> None:
    """Under its key, in its space, with its digest: layer, key and value, head, token, value."""
    model = tiny_model(family, seed=3)
    tokens = prompt(5 * CHUNK)
    with patient(model, endpoint) as cache:
        ask(cache, model, tokens)
        spaces = cache._prompts(tokens, b"", None).spaces
        layers = [group.layers for group in cache._groups]
        assert cache.counters["held_blocks"] == 5 * len(layers)
    _, chunks = computed(model, tokens, 5 * CHUNK)
    keys = chain_keys(root_key(), tokens[0].tolist(), CHUNK)
    with Client(endpoint) as client:
        for space, indexes in zip(spaces, layers, strict=True):
            buffers = [bytearray(space.block_bytes) for _ in keys]
            loaded = client.load(space, keys, buffers, budget_s=PATIENCE_S)
            assert len(loaded) == len(keys)
            for key, chunk, buffer, answered in zip(keys, chunks, buffers, loaded, strict=True):
                halves = [half[0] for index in indexes for half in chunk[index]]
                expected = torch.stack(halves).numpy().tobytes()
                assert answered.digest == block_digest(space.space_id, key, expected)
                assert buffer == expected


def test_groups_have_a_rule_each() -> None:
    """Full attention needs all blocks; a window those that hold what a layer keeps."""
    model = tiny_model("gemma2")
    full, sliding = layer_groups(model.config, torch.bfloat16, CHUNK)
    assert (full.layers, sliding.layers) == ((1, 3), (0, 2))
    assert full.block_bytes == sliding.block_bytes == 2 * 2 * 2 * CHUNK * 16 * 2
    assert [list(full.needed(5)), list(sliding.needed(5))] == [[0, 1, 2, 3, 4], [2, 3, 4]]
    assert list(sliding.needed(2)) == [0, 1]
    assert sliding.trailing_blocks * CHUNK >= WINDOW - 1 > (sliding.trailing_blocks - 1) * CHUNK


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_prompts_are_warm_after_a_restart(family: str, node: NodeProcess) -> None:
    """With memory empty, from disk, and by a process that comes new."""
    model = tiny_model(family)
    tokens = prompt(5 * CHUNK + 1)
    with patient(model, node.endpoint) as cache:
        ask(cache, model, tokens)
    node.stop()
    node.start()
    with patient(tiny_model(family), node.endpoint) as cache:
        restored, tiers = ask(cache, model=model, tokens=tokens)
    assert restored == 5 * CHUNK
    assert set(tiers) == {"disk"}

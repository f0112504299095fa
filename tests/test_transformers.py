"""`generate()` with stored prompts: bit for bit what it computes without them."""

import logging
from collections import Counter
from typing import Any

import pytest
import torch

from kvstore.api.digest import block_digest
from kvstore.api.keys import chain_keys, root_key
from kvstore_client import Client
from kvstore_client.transformers.groups import layer_groups
from tests.node_process import NodeProcess
from tests.tiny_models import CHUNK, FAMILIES, WINDOW, prompt, tiny_model
from tests.transformers_rig import (
    PATIENCE_S,
    answer,
    ask,
    assert_equal_caches,
    assert_same,
    computed,
    patient,
    plain,
)

pytest_plugins = ["tests.transformers_fixtures"]


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
            assert_equal_caches(session.cache, reference)
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
        spaces = cache._prompts(tokens, b"", None, cache._look()).spaces
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


def test_a_conversation_goes_on_where_it_was(endpoint: str, llama: Any, salt: bytes) -> None:
    """The next prompt begins with the last one and its answer: what was a prompt is restored.

    The answer was computed token by token, which rounds otherwise, so it is computed again.
    """
    tokens = prompt(3 * CHUNK + 2)
    with patient(llama, endpoint) as cache:
        with cache.session(tokens, salt=salt) as session:
            said, _ = answer(llama, **session.inputs)
        assert cache.drain(PATIENCE_S)
        assert cache.counters["held_blocks"] == 3
        longer = torch.cat([tokens, torch.tensor(said), prompt(CHUNK, seed=1)], dim=1)
        assert ask(cache, llama, longer, salt=salt)[0] == 3 * CHUNK
        assert ask(cache, llama, longer, salt=salt)[0] == 4 * CHUNK


def test_sessions_may_overlap(endpoint: str, llama: Any, salt: bytes) -> None:
    """Each follows its own cache."""
    first, second = prompt(2 * CHUNK + 1), prompt(3 * CHUNK + 1, seed=1)
    with patient(llama, endpoint) as cache:
        with cache.session(first, salt=salt) as one, cache.session(second, salt=salt) as other:
            assert_same(answer(llama, **other.inputs), plain(llama, second))
            assert_same(answer(llama, **one.inputs), plain(llama, first))
        assert cache.drain(PATIENCE_S)
        assert cache.counters["held_blocks"] == 2 + 3
        assert ask(cache, llama, first, salt=salt)[0] == 2 * CHUNK
        assert ask(cache, llama, second, salt=salt)[0] == 3 * CHUNK


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_batch_is_restored_at_its_shortest_match(family: str, endpoint: str) -> None:
    """All rows of a cache are equally long; what a window needs at that length is there."""
    model = tiny_model(family, seed=4)
    rows = prompt(5 * CHUNK + 1, rows=3)
    with patient(model, endpoint) as cache:
        assert ask(cache, model, rows)[0] == 0
        assert ask(cache, model, rows)[0] == 5 * CHUNK
        mixed = rows.clone()
        mixed[1, 3 * CHUNK + 2 :] = prompt(2 * CHUNK - 1, seed=1)
        assert ask(cache, model, mixed)[0] == 3 * CHUNK
        assert ask(cache, model, mixed)[0] == 5 * CHUNK
        assert ask(cache, model, rows[:2])[0] == 0, "two rows may round otherwise than three"


def test_a_batch_is_matched_again_where_a_window_lacks_a_block(endpoint: str) -> None:
    """One row could be restored at 6 chunks or at 2, the other at 4: together they are at 2."""
    model = tiny_model("gemma2", seed=6)
    rows = prompt(6 * CHUNK + 1, rows=2)
    with patient(model, endpoint) as cache:
        ask(cache, model, rows)
        prompts = cache._prompts(rows, b"", None, cache._look())
        with Client(endpoint) as client:
            assert client.discard(prompts.spaces[1], [prompts.keys[0][2]]) > 0
        assert cache.session(rows).restored_tokens == 6 * CHUNK
        rows[1, 4 * CHUNK + 2 :] = prompt(2 * CHUNK - 1, seed=1)
        assert ask(cache, model, rows)[0] == 2 * CHUNK


def test_salts_and_scopes_never_meet(endpoint: str, llama: Any, salt: bytes) -> None:
    """The same tokens under another salt, or in another scope, are other blocks."""
    tokens = prompt(2 * CHUNK + 1)
    with patient(llama, endpoint) as cache, patient(llama, endpoint, scope="shared") as shared:
        assert ask(cache, llama, tokens, salt=salt + b"a")[0] == 0
        assert ask(cache, llama, tokens, salt=salt + b"b")[0] == 0
        assert ask(cache, llama, tokens)[0] == 0
        assert ask(cache, llama, tokens, salt=salt + b"a")[0] == 2 * CHUNK
        assert ask(shared, llama, tokens, salt=salt + b"a")[0] == 0
        assert ask(shared, llama, tokens, salt=salt + b"a")[0] == 2 * CHUNK


@pytest.mark.parametrize("chunk_tokens", [1, WINDOW - 1])
def test_chunks_may_be_as_short_as_a_token_and_as_long_as_what_a_window_keeps(
    chunk_tokens: int, endpoint: str
) -> None:
    """One more token would be gone before it could be stored, so that is refused."""
    model = tiny_model("gemma3_text", seed=5)
    tokens = prompt(4 * WINDOW)
    with patient(model, endpoint, chunk_tokens=chunk_tokens) as cache:
        for restored in (0, (4 * WINDOW - 1) // chunk_tokens * chunk_tokens):
            with cache.session(tokens) as session:
                assert session.restored_tokens == restored
                got = answer(model, **session.inputs)
            assert cache.drain(PATIENCE_S)
            whole = torch.ones_like(tokens)
            expected = answer(
                model, input_ids=tokens, attention_mask=whole, prefill_chunk_size=chunk_tokens
            )
            assert_same(got, expected)
    with pytest.raises(ValueError, match=r"chunk_tokens: at most sliding_window - 1 = 19"):
        patient(model, endpoint, chunk_tokens=WINDOW)


def test_another_cut_is_not_stored(
    endpoint: str, llama: Any, salt: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A prompt in one piece rounds otherwise: it is answered, and the log says why it is not kept.

    What was restored before it stays right, and so does what comes in the right cut again.
    """
    tokens = prompt(4 * CHUNK + 1)
    with patient(llama, endpoint) as cache:
        with cache.session(tokens, salt=salt) as session, caplog.at_level(logging.WARNING):
            inputs = session.inputs | {"prefill_chunk_size": None}
            answer(llama, **inputs)
        assert cache.drain(PATIENCE_S)
        assert cache.counters["held_blocks"] == 0
        assert cache.counters["uncut_tokens"] == 4 * CHUNK
        assert "prefill_chunk_size" in caplog.text
        assert ask(cache, llama, tokens, salt=salt)[0] == 0
        assert ask(cache, llama, tokens, salt=salt)[0] == 4 * CHUNK


def test_a_cache_that_is_cropped_and_used_again_stores_nothing_wrong(
    endpoint: str, llama: Any, salt: bytes
) -> None:
    """Each chunk is taken once, in order: what comes twice is not the prompt any more."""
    tokens = prompt(3 * CHUNK)
    with patient(llama, endpoint) as cache:
        with cache.session(tokens, salt=salt) as session, torch.no_grad():
            past = session.cache
            llama(tokens[:, :CHUNK], past_key_values=past)
            past.crop(-CHUNK)
            llama(tokens[:, :CHUNK], past_key_values=past)
            llama(tokens[:, CHUNK : 2 * CHUNK], past_key_values=past)
        assert cache.drain(PATIENCE_S)
        assert cache.counters["held_blocks"] == 1
        assert cache.counters["uncut_tokens"] == 2 * CHUNK
        assert ask(cache, llama, tokens, salt=salt)[0] == CHUNK

"""What callers do with a session's tokens, its cache, and the session itself."""

import gc
import logging
import weakref
from typing import Any

import pytest
import torch

from tests.tiny_models import CHUNK, prompt, tiny_model
from tests.transformers_rig import PATIENCE_S, answer, ask, assert_same, patient, plain

pytest_plugins = ["tests.transformers_fixtures"]

TOKENS = prompt(4 * CHUNK + 1)


def test_a_session_has_the_tokens_that_it_began_with(
    endpoint: str, llama: Any, salt: bytes
) -> None:
    """The caller fills his own tensor with the next prompt before this one is computed."""
    buffer = TOKENS.clone()
    with patient(llama, endpoint) as cache:
        for restored in (0, 4 * CHUNK):
            buffer.copy_(TOKENS)
            with cache.session(buffer, salt=salt) as session:
                buffer.copy_(prompt(4 * CHUNK + 1, seed=5))
                assert session.restored_tokens == restored
                assert_same(answer(llama, **session.inputs), plain(llama, TOKENS))
            assert cache.drain(PATIENCE_S)
        with cache.session(TOKENS, salt=salt + b"2") as session:
            session.inputs["input_ids"] += 1
            with pytest.raises(ValueError, match="input_ids: other tokens"):
                answer(llama, **session.inputs)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("passes", [0, 1])
def test_rows_that_change_places_are_not_stored(family: str, passes: int, endpoint: str) -> None:
    """Restored ones and computed ones: what follows belongs to the other row."""
    model = tiny_model(family, seed=20 + passes)
    rows = prompt(4 * CHUNK + 1, rows=2)
    begun = rows[:, : 2 * CHUNK + 1]
    with patient(model, endpoint) as cache:
        assert ask(cache, model, begun)[0] == 0
        held = cache.counters["held_blocks"]
        with cache.session(rows) as session, torch.no_grad():
            assert session.restored_tokens == 2 * CHUNK
            for start in range(2 * CHUNK, 4 * CHUNK, CHUNK):
                if start == (2 + passes) * CHUNK:
                    session.cache.reorder_cache(torch.tensor([1, 0]))
                model(rows[:, start : start + CHUNK], past_key_values=session.cache)
        assert cache.drain(PATIENCE_S)
        assert cache.counters["uncut_tokens"] == 2 * (2 - passes) * CHUNK
        assert cache.counters["held_blocks"] - held == 2 * passes * len(cache._groups)
        assert ask(cache, model, rows)[0] == (2 + passes) * CHUNK
        assert ask(cache, model, rows)[0] == 4 * CHUNK


def test_a_session_that_is_dropped_leaves_nothing_behind(
    endpoint: str, salt: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Its cache goes with it, its hooks with the next pass of the model, which says so."""
    model = tiny_model("llama", seed=1)
    with patient(model, endpoint) as cache:
        ask(cache, model, TOKENS, salt=salt)
        session = cache.session(TOKENS, salt=salt)
        keys = weakref.ref(session.cache.layers[0].keys)
        del session
        gc.collect()
        assert keys() is None
        with caplog.at_level(logging.WARNING):
            plain(model, TOKENS)
        assert caplog.text.count("dropped without being closed") == 1
        assert not model._forward_hooks
        assert not model._forward_pre_hooks


def test_a_session_that_was_closed_says_nothing(
    endpoint: str, llama: Any, salt: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """It is gone, and its hooks with it."""
    with patient(llama, endpoint) as cache, caplog.at_level(logging.WARNING):
        ask(cache, llama, TOKENS, salt=salt)
        plain(llama, TOKENS)
    assert not caplog.text
    assert not llama._forward_hooks

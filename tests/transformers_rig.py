"""What the tests of the transformers adapter share: answers, and how they are compared."""

from collections import Counter
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from kvstore_client.transformers import PromptCache
from tests.tiny_models import CHUNK

NEW_TOKENS = 6
PATIENCE_S = 60.0
PATIENT = {"match_budget_s": 30.0, "load_budget_s": 30.0, "store_budget_s": 30.0}


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
    """The cache after `length` tokens in chunks; of each chunk the keys and values by layer."""
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
        assert vars(mine).keys() == vars(theirs).keys()
        for name, value in vars(mine).items():
            expected = vars(theirs)[name]
            if isinstance(value, torch.Tensor):
                assert value.device == expected.device
                assert torch.equal(value, expected), name
            else:
                assert value == expected, name
        assert mine.get_mask_sizes(3) == theirs.get_mask_sizes(3)

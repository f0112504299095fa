"""The textbook comparison: generating with a KV cache, and computing everything for each token."""

from collections.abc import Callable, Sequence

from kvstore_workers.request import Completion, Request

Generate = Callable[[Sequence[Request]], list[Completion]]

PROMPT_TOKENS = 64
NEW_TOKENS = 300


def decode_speedup(
    generate: Generate, tenant: str, prompt: Sequence[int], advance: Callable[[], None]
) -> float:
    """How many times faster 300 tokens come with their keys and values kept than without.

    Without means: one pass over the whole sequence so far for each token. Both runs follow the
    same tokens. `advance` is called once for each token of the slow run.
    """
    begun = list(prompt[:PROMPT_TOKENS])
    [kept] = generate([_request(begun, NEW_TOKENS, tenant)])
    recomputed_s = 0.0
    for length in range(NEW_TOKENS):
        sequence = begun + list(kept.tokens[:length])
        [one] = generate([_request(sequence, 1, tenant)])
        recomputed_s += one.total_s
        advance()
    return recomputed_s / kept.total_s


def _request(prompt: Sequence[int], new_tokens: int, tenant: str) -> Request:
    return Request(prompt, new_tokens, ignore_eos=True, tenant=tenant, use_cache=False)

"""Stored prompts for people who run `generate()` of transformers themselves.

    with PromptCache(model, "127.0.0.1:7070") as prompt_cache:
        with prompt_cache.session(input_ids) as session:
            output = model.generate(**session.inputs, max_new_tokens=100)

A session loads what is stored of a prompt into a cache, `generate` computes the rest, and what was
computed is stored while it goes on. Without a node all is computed, with the same result, bit for
bit. docs/transformers.md says what is stored, what is exact, and what is refused.
"""

from kvstore_client.transformers.versions import check_versions

check_versions()

from kvstore_client.transformers.groups import check_layers  # noqa: E402
from kvstore_client.transformers.prompt_cache import PromptCache  # noqa: E402
from kvstore_client.transformers.session import Session  # noqa: E402

check_layers()

__all__ = ["PromptCache", "Session"]

"""One request on its way through the engine."""

from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from kvstore_workers.request import Completion, Request, RestoredBlock
from kvstore_workers.sampler import Sampler
from kvstore_workers.spill import CacheKey


@dataclass(slots=True, eq=False)
class Generation:
    """The state of one request. Its first `len(tiers)` blocks were restored, the rest is computed.

    The engine alone changes it.
    """

    request_id: int
    request: Request
    keys: list[CacheKey]
    """Of its canonical blocks: those in full chunks. Empty where the cache is not used."""
    sampler: Sampler
    blocks: list[int] = field(default_factory=list)
    """In VRAM, for the whole context that it can reach; one reference to each."""
    table: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """The same on the device; int64."""
    tiers: list[str] = field(default_factory=list)
    """Where each restored block came from."""
    restoring: Future[list[str]] | None = None
    computed_tokens: int = 0
    """Of the prompt: those whose keys and values are in VRAM, restored or computed."""
    tokens: list[int] = field(default_factory=list)
    """New tokens so far."""
    logits: list[bytes] = field(default_factory=list)
    """Of the leading new tokens, as far as they are part of the answer."""
    patience_end_s: float | None = None
    """When spilling has to make way for it; None: it is not waiting for VRAM."""
    started_s: float = 0.0
    filling_s: float | None = None
    """When its first chunk was begun; None: not yet."""
    filled_from: int = 0
    """How much of the prompt needed no computing."""
    first_token_s: float = 0.0

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.request.prompt) + len(self.tokens)

    @property
    def wants_logits(self) -> bool:
        """True if the next token's logits are part of the answer."""
        return len(self.logits) < self.request.logits_tokens

    def add(self, token: int, logits: torch.Tensor | None) -> None:
        """Appends a new token, and its logits (float32, on the CPU) where the answer wants them."""
        if logits is not None and self.wants_logits:
            self.logits.append(logits.numpy().astype("<f4", copy=False).tobytes())
        self.tokens.append(token)

    def ended(self, eos_tokens: frozenset[int]) -> bool:
        """True if no token follows the last one."""
        if len(self.tokens) >= self.request.max_new_tokens:
            return True
        return not self.request.ignore_eos and self.tokens[-1] in eos_tokens

    def complete(
        self, ended_s: float, block_tokens: int, digests: tuple[RestoredBlock, ...]
    ) -> Completion:
        """The answer."""
        restored = {tier: count * block_tokens for tier, count in Counter(self.tiers).items()}
        prompt_tokens = len(self.request.prompt)
        return Completion(
            request_id=self.request_id,
            tokens=tuple(self.tokens),
            prompt_tokens=prompt_tokens,
            computed_tokens=prompt_tokens - sum(restored.values()),
            restored_tokens=restored,
            ttft_s=self.first_token_s - self.started_s,
            total_s=ended_s - self.started_s,
            logits=tuple(self.logits),
            restored_digests=digests,
        )

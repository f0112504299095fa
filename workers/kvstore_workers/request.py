"""What a worker is asked, and what it answers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.api.errors import InvalidArgument
from kvstore.api.hint import ReuseHint

MAX_SALT_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue. Raises `InvalidArgument`, naming the field that is out of range."""

    prompt: Sequence[int]
    """Tokens; at least one."""
    max_new_tokens: int
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability are drawn from."""
    seed: int = 0
    """Of the draws; the same seed draws the same tokens."""
    ignore_eos: bool = False
    """True: goes on to `max_new_tokens` whatever comes."""
    tenant: str = ""
    """Whose request it is. Tenants never see each other's blocks, in VRAM or in the store."""
    salt: bytes = b""
    """Separates callers of one tenant who must not share; at most 1024 bytes."""
    hint: ReuseHint | None = None
    use_cache: bool = True
    """False: computes everything and publishes nothing, as if no cache existed."""
    logits_tokens: int = 0
    """Of how many leading new tokens the logits are kept in the answer."""
    record_digests: bool = False
    """True: the answer holds the SHA-256 of every restored block as it lies in VRAM."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InvalidArgument("request.prompt: at least one token is needed")
        if self.max_new_tokens < 1:
            raise InvalidArgument(
                f"request.max_new_tokens: must be 1 or more, got {self.max_new_tokens}"
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidArgument(f"request.temperature: must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InvalidArgument(f"request.top_p: must lie above 0 and up to 1, got {self.top_p}")
        if len(self.salt) > MAX_SALT_BYTES:
            raise InvalidArgument(
                f"request.salt: at most {MAX_SALT_BYTES} bytes, got {len(self.salt)}"
            )
        if self.logits_tokens < 0:
            raise InvalidArgument(
                f"request.logits_tokens: must be 0 or more, got {self.logits_tokens}"
            )


class RestoredBlock(NamedTuple):
    """A block that was not computed for this request."""

    key: bytes
    sha256: bytes
    """Of the bytes that lay in VRAM after the restore."""
    tier: str


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one request, and how it came about."""

    request_id: int
    """In the order of submission, from 0."""
    tokens: tuple[int, ...]
    """The new tokens; ends with the token that ended the answer, if one did."""
    prompt_tokens: int
    computed_tokens: int
    """Of the prompt; together with the restored ones all of it."""
    restored_tokens: Mapping[str, int]
    """By the tier they came from: "vram", "memory", "redis", "disk", …"""
    ttft_s: float
    """From the start of processing to the first token; matching and loading count, queueing not."""
    total_s: float
    """From the start of processing to the last token."""
    logits: tuple[bytes, ...] = ()
    """Of the leading new tokens, as asked: little-endian float32, one per vocabulary entry."""
    restored_digests: tuple[RestoredBlock, ...] = field(default=(), repr=False)
    """In the order of the chain, if asked."""

    @property
    def first_logits(self) -> bytes | None:
        """The logits that the first token was chosen from; None if not asked for."""
        return self.logits[0] if self.logits else None

"""Whether a restored request is the one that would have been computed, to the last bit."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvstore_workers.request import Completion


@dataclass(frozen=True, slots=True)
class Proof:
    """What was compared with a run without cache whose prefill was cut at the same boundaries."""

    blocks_equal: bool
    """The SHA-256 of each restored block is that of the bytes which its producer stored."""
    tokens_equal: bool
    logits_equal: bool
    """The logits of the first token are equal to the bit: a difference of 0.0."""

    @property
    def identical(self) -> bool:
        """All three."""
        return self.blocks_equal and self.tokens_equal and self.logits_equal


def prove(cached: Completion, reference: Completion, produced: Mapping[bytes, bytes]) -> Proof:
    """Compares a request with its reference; `produced` maps a block's key to its SHA-256.

    Both must have been asked for first logits, and `cached` for the digests of restored blocks.
    """
    restored = {block.key: block.sha256 for block in cached.restored_digests}
    complete = sum(cached.restored_tokens.values()) == 0 or bool(restored)
    blocks = all(produced.get(key) == sha256 for key, sha256 in restored.items())
    logits = cached.first_logits
    return Proof(
        blocks_equal=complete and blocks,
        tokens_equal=cached.tokens == reference.tokens,
        logits_equal=logits is not None and logits == reference.first_logits,
    )

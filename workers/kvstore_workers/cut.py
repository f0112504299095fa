"""How prompts are cut: into blocks that are kept, and chunks that are computed together."""

from dataclasses import dataclass

from kvstore.api.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The arithmetic of one worker's cut. Raises `ConfigError`, naming the field."""

    block_tokens: int
    chunk_tokens: int
    """Tokens of a prefill chunk; whole blocks."""

    def __post_init__(self) -> None:
        if self.block_tokens < 1:
            raise ConfigError(f"block_tokens: must be 1 or more, got {self.block_tokens}")
        if self.chunk_tokens < 1 or self.chunk_tokens % self.block_tokens:
            raise ConfigError(
                f"chunk_tokens: must be a multiple of block_tokens, got {self.chunk_tokens}"
            )

    @property
    def chunk_blocks(self) -> int:
        """Blocks of one chunk."""
        return self.chunk_tokens // self.block_tokens

    def blocks(self, tokens: int) -> int:
        """Blocks that hold so many tokens; the last may be partial."""
        return -(-tokens // self.block_tokens)

    def whole_chunks(self, blocks: int) -> int:
        """The largest number of blocks up to `blocks` that ends where a chunk ends."""
        return blocks - blocks % self.chunk_blocks

    def canonical_tokens(self, prompt_tokens: int) -> int:
        """Leading tokens of a prompt in full chunks: whoever computes them computes the same."""
        return prompt_tokens - prompt_tokens % self.chunk_tokens

    def restorable_blocks(self, prompt_tokens: int) -> int:
        """Leading blocks that may be restored: the last token of a prompt is always computed."""
        return self.canonical_tokens(prompt_tokens - 1) // self.block_tokens

"""Spaces: all that a block's bytes depend on beside its tokens."""

import hashlib
from dataclasses import dataclass, fields
from enum import Enum

from kvstore.api.errors import InvalidArgument

SPACE_ID_BYTES = 32
MAX_BLOCK_BYTES = 2**30
MAX_BLOCK_TOKENS = 2**16

_LABEL = b"kvstore space 1"
_REQUIRED_TEXT = {"model": 256, "revision": 256, "dtype": 32, "layout": 256}
_OPTIONAL_TEXT = {"layer_group": 256, "rope_scaling": 1024, "quantization": 256, "numerics": 256}


class MatchRule(Enum):
    """Which prefix lengths of a chain can be restored in a space."""

    ALL = 0
    """Full attention: every block up to the length."""
    TRAILING = 1
    """Sliding window: the last `trailing_blocks` blocks before the length."""
    BOUNDARY = 2
    """Recurrent state: the block that ends at the length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceDescriptor:
    """What identifies a space; one changed field is another space.

    Raises `InvalidArgument`, naming the field, for a value out of range.
    """

    model: str
    revision: str
    """Of the weights; for a local checkpoint a digest of them."""
    dtype: str
    layout: str
    """Order of the axes inside a block, as the engine calls it."""
    block_tokens: int
    block_bytes: int
    format_version: int = 1
    layer_group: str = ""
    tp_rank: int = 0
    tp_size: int = 1
    rope_scaling: str = ""
    quantization: str = ""
    numerics: str = ""
    """What else decides the last bit, where an engine wants it: prefill cut, kernel, device."""
    match_rule: MatchRule = MatchRule.ALL
    trailing_blocks: int = 0

    def __post_init__(self) -> None:
        for name, limit in _REQUIRED_TEXT.items():
            _check_range(name, len(getattr(self, name)), 1, limit, "characters")
        for name, limit in _OPTIONAL_TEXT.items():
            _check_range(name, len(getattr(self, name)), 0, limit, "characters")
        _check_range("format_version", self.format_version, 1, 2**16)
        _check_range("block_tokens", self.block_tokens, 1, MAX_BLOCK_TOKENS)
        _check_range("block_bytes", self.block_bytes, 1, MAX_BLOCK_BYTES)
        _check_range("tp_size", self.tp_size, 1, 2**16)
        _check_range("tp_rank", self.tp_rank, 0, self.tp_size - 1)
        trailing = self.match_rule is MatchRule.TRAILING
        _check_range("trailing_blocks", self.trailing_blocks, int(trailing), 2**16 * trailing)

    @property
    def needs_parents(self) -> bool:
        """Whether a block is useless without the blocks before it.

        A window or a recurrent state is restored without them: its blocks are stored, kept and
        dropped each for itself.
        """
        return self.match_rule is MatchRule.ALL

    @property
    def space_id(self) -> bytes:
        """The SHA-256 of the canonical form: every field, sorted by name, length-prefixed."""
        digest = hashlib.sha256(_LABEL)
        for name in sorted(field.name for field in fields(self)):
            value = getattr(self, name)
            text = str(value.value if isinstance(value, Enum) else value).encode()
            for part in (name.encode(), text):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
        return digest.digest()


def _check_range(field: str, value: int, low: int, high: int, unit: str = "") -> None:
    if not low <= value <= high:
        what = f"{value} {unit}".rstrip()
        raise InvalidArgument(f"descriptor.{field}: must lie in {low} … {high}, got {what}")

"""Chained keys: a 32-byte name for a whole prefix.

`key = SHA-256(parent key ‖ tokens of this block)`, each token as four little-endian bytes. The
root of the chain is keyed by the salt and by the content that tokens do not name (an adapter's
weights, media), never by the space: all ranks and groups of a prompt share one chain.
"""

import hashlib
import sys
from array import array
from collections.abc import Sequence

KEY_BYTES = 32
MAX_TOKEN = 2**32 - 1

_ROOT_LABEL = b"kvstore root 1"


def root_key(salt: bytes = b"", content: bytes = b"") -> bytes:
    """The 32-byte key above a chain's first block.

    `salt` separates callers who must not share (vLLM's `cache_salt`); `content` is a digest of
    what the block depends on beside tokens and space.
    """
    root = hashlib.sha256(_ROOT_LABEL)
    for part in (salt, content):
        root.update(len(part).to_bytes(8, "little"))
        root.update(part)
    return root.digest()


def chain_keys(root: bytes, tokens: Sequence[int], block_tokens: int) -> list[bytes]:
    """The keys of all full blocks of `tokens`, parents first; a partial tail has no key.

    Raises ValueError for a token outside 0 … 2^32 - 1 or a root that is not 32 bytes long.
    """
    if len(root) != KEY_BYTES:
        raise ValueError(f"root: a key has {KEY_BYTES} bytes, got {len(root)}")
    if block_tokens < 1:
        raise ValueError(f"block_tokens: must be 1 or more, got {block_tokens}")
    packed = _pack(tokens)
    step = 4 * block_tokens
    keys: list[bytes] = []
    parent = root
    for start in range(0, len(packed) - step + 1, step):
        parent = hashlib.sha256(parent + packed[start : start + step]).digest()
        keys.append(parent)
    return keys


def _pack(tokens: Sequence[int]) -> bytes:
    try:
        packed = array("I", tokens)
    except OverflowError:
        raise ValueError(f"tokens: each must lie in 0 … {MAX_TOKEN}") from None
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()

"""Checks of what a caller hands in. His mistakes raise ValueError at once, before any call."""

from collections.abc import Sequence

from kvstore.api.keys import KEY_BYTES
from kvstore.api.wire import MAX_KEYS
from kvstore_client.space import Space

MAX_SPACES = 64
MAX_REQUEST_ID_BYTES = 32
MAX_LEASE_MS = 2**32 - 1

Buffers = Sequence[bytearray | memoryview]
"""Where blocks go: one writable buffer for each key."""
Blocks = Sequence[bytes | bytearray | memoryview]
"""Where blocks come from: one for each key."""


def check_keys(keys: Sequence[bytes], field: str = "keys") -> None:
    """Raises ValueError unless each key is 32 bytes long and one call can carry them all."""
    if len(keys) > MAX_KEYS:
        raise ValueError(f"{field}: at most {MAX_KEYS} in one call, got {len(keys)}")
    if set(map(len, keys)) <= {KEY_BYTES}:  # There are many of them.
        return
    for index, key in enumerate(keys):
        if len(key) != KEY_BYTES:
            raise ValueError(f"{field}[{index}]: {KEY_BYTES} bytes are needed, got {len(key)}")


def check_scopes(scopes: Sequence[str]) -> None:
    """Raises ValueError for a bare text, which would be taken for a list of letters."""
    if isinstance(scopes, str):
        raise ValueError(f"scopes: a list of scopes is needed, got the text {scopes!r}")


def check_match(
    spaces: Sequence[Space],
    keys: Sequence[bytes],
    lease_ms: int,
    request_id: bytes,
    held_blocks: int,
) -> None:
    """Raises ValueError for a match that no node could accept."""
    check_keys(keys)
    if not 1 <= len(spaces) <= MAX_SPACES:
        raise ValueError(f"spaces: 1 … {MAX_SPACES} are needed, got {len(spaces)}")
    if not 0 <= lease_ms <= MAX_LEASE_MS:
        raise ValueError(f"lease_ms: must lie in 0 … {MAX_LEASE_MS}, got {lease_ms}")
    if len(request_id) > MAX_REQUEST_ID_BYTES:
        raise ValueError(f"request_id: at most {MAX_REQUEST_ID_BYTES} bytes, got {len(request_id)}")
    if not 0 <= held_blocks <= len(keys):
        raise ValueError(f"held_blocks: must lie in 0 … {len(keys)}, got {held_blocks}")


def block_views(
    blocks: Blocks, field: str, keys: int, block_bytes: int, *, writable: bool
) -> list[memoryview]:
    """The blocks as flat bytes, without a copy.

    Raises ValueError unless there is one for each key, each exactly as long as a block,
    contiguous, and writable if asked.
    """
    if len(blocks) != keys:
        raise ValueError(f"{field}: one for each key is needed, got {len(blocks)} for {keys} keys")
    views = []
    for index, block in enumerate(blocks):
        view = memoryview(block)
        if not view.c_contiguous:
            raise ValueError(f"{field}[{index}]: must be contiguous")
        if writable and view.readonly:
            raise ValueError(f"{field}[{index}]: must be writable")
        if view.nbytes != block_bytes:
            raise ValueError(
                f"{field}[{index}]: the space's blocks have {block_bytes} bytes, got {view.nbytes}"
            )
        views.append(view.cast("B"))
    return views

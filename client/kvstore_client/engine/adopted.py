"""Keys for blocks that an engine names itself, by a chain hash of its own."""

import hashlib

_LABEL = b"kvstore adopted 1"


def adopted_key(engine_hash: bytes, content: bytes = b"") -> bytes:
    """Our 32-byte key of the block that the engine calls `engine_hash`.

    `content` completes a name that lacks something: the digest of an adapter's weights, say,
    where the engine knows the adapter by its path. The hash must name the whole prefix and be
    hard to collide with (SHA-256), for the key is no better than it.
    """
    digest = hashlib.sha256(_LABEL)
    for part in (content, engine_hash):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()

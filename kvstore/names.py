"""Whose a block is, as bytes: namespaces, and the names that leave memory.

`namespace = HMAC(cluster secret, tenant ‖ scope ‖ space)`. Redis, files and peers know a block as
`HMAC(namespace, key)`: equal prompts of two tenants have unrelated names, and a name can neither
be guessed nor turned back (HMAC: RFC 2104, here with SHA-256).
"""

import hmac

from kvstore.api.tier import BlockRef

NAME_BYTES = 32
TAG_BYTES = 16
SECRET_BYTES = 32


def namespace(secret: bytes, tenant: str, scope: str, space_id: bytes) -> bytes:
    """32 bytes that only a holder of the cluster secret can compute."""
    parts = (tenant.encode(), scope.encode(), space_id)
    message = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return hmac.digest(secret, b"kvstore namespace 1" + message, "sha256")


def block_name(ref: BlockRef) -> bytes:
    """The 32-byte name of a block outside memory."""
    return hmac.digest(ref.namespace, ref.key, "sha256")


def namespace_tag(namespace: bytes) -> bytes:
    """16 bytes that group the blocks of a namespace outside memory, without revealing it."""
    return hmac.digest(namespace, b"kvstore tag 1", "sha256")[:TAG_BYTES]

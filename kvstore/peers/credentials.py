"""How nodes of a cluster know each other: by what each derives from the cluster's secret.

What a node shows is good at one node and one endpoint alone: who puts an endpoint of his own into
the directory is shown nothing that would open another's.
"""

import hmac

from kvstore.api.errors import Unauthenticated
from kvstore.tenants import Tenant

PEERS = Tenant("(peers)")
"""In whose name nodes call. No tenant can be called so."""
LEAST_NONCE_BYTES, MOST_NONCE_BYTES = 16, 64
_SCHEME = "Peer"


class Credentials:
    """What this node shows to others, and what others have to show to it."""

    def __init__(self, secret: bytes, node_id: str, endpoint: str) -> None:
        """For the node of this id, which others find at `endpoint`."""
        self._key = hmac.digest(secret, b"kvstore peers 1", "sha256")
        self._expected = self.shown_to(node_id, endpoint).encode()

    def shown_to(self, node_id: str, endpoint: str) -> str:
        """The `authorization` of calls to another node."""
        parts = (node_id.encode(), endpoint.encode())
        message = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        return f"{_SCHEME} {hmac.digest(self._key, b'calls' + message, 'sha256').hex()}"

    def authenticate(self, authorization: str | None) -> Tenant:
        """`PEERS`, for an `authorization` that was meant for this node. Raises Unauthenticated."""
        shown = (authorization or "").encode(errors="replace")
        if not hmac.compare_digest(shown, self._expected):
            raise Unauthenticated("authorization: no node of this cluster shows this")
        return PEERS

    def proof(self, nonce: bytes, ticket: bytes) -> bytes:
        """What only a node of the cluster can answer to `nonce`, with the ticket that it gives."""
        return hmac.digest(self._key, b"proof" + nonce + ticket, "sha256")

    def proves(self, proof: bytes, nonce: bytes, ticket: bytes) -> bool:
        """Whether an answer is that of a node of the cluster."""
        return hmac.compare_digest(proof, self.proof(nonce, ticket))

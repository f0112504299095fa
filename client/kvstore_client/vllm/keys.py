"""The chain of keys of one request, adopted from vLLM's own block hashes.

vLLM's hash of a block covers the tokens of the whole prefix, its salt and its media. It knows an
adapter by name and path alone; the digest of the adapter's weights completes it.
"""

from collections.abc import Sequence

from kvstore_client.engine.adopted import adopted_key


class Chain:
    """Invariant: `keys[i]` names the first `(i + 1) * hashes_per_unit` hashes of the request."""

    def __init__(self, hashes_per_unit: int, content: bytes = b"") -> None:
        self.keys: list[bytes] = []
        self._hashes_per_unit = hashes_per_unit
        self._content = content

    def grow(self, hashes: Sequence[bytes]) -> int:
        """Takes in the hashes that have come since; how many keys there are now."""
        step = self._hashes_per_unit
        for index in range(len(self.keys), len(hashes) // step):
            self.keys.append(adopted_key(hashes[(index + 1) * step - 1], self._content))
        return len(self.keys)

    def before(self, index: int) -> bytes:
        """The key of the parent of block `index`; empty for the first."""
        return self.keys[index - 1] if index else b""

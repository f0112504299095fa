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
        self._adopted: list[bytes] = []
        """The hash that each of them was made from."""
        self._hashes_per_unit = hashes_per_unit
        self._content = content

    def follow(self, hashes: Sequence[bytes]) -> int:
        """Takes over what has come since; how many of the old keys still hold.

        All do, but for a session whose last answer gives way to its next question.
        """
        step = self._hashes_per_unit
        kept = min(len(self.keys), len(hashes) // step)
        while kept and hashes[kept * step - 1] != self._adopted[kept - 1]:
            kept -= 1
        del self.keys[kept:], self._adopted[kept:]
        for index in range(kept, len(hashes) // step):
            adopted = hashes[(index + 1) * step - 1]
            self._adopted.append(adopted)
            self.keys.append(adopted_key(adopted, self._content))
        return kept

    def before(self, index: int) -> bytes:
        """The key of the parent of block `index`; empty for the first."""
        return self.keys[index - 1] if index else b""

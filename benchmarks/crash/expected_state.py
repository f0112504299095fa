"""What a store may hold after a kill: an expected-state file, written while it is loaded.

Every block may hold any content that was offered since it was last forgotten for certain. What
was acknowledged may be lost (memory was, in the kill); what was never offered, or was forgotten,
must not be there.
"""

import json
from pathlib import Path
from typing import IO


class ExpectedState:
    """The contents that each block may have, by chain and place.

    Invariant: what is in the file says the same, so that a broken round can be looked at later.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] = path.open("w")
        self._contents: dict[tuple[str, int], set[int]] = {}
        self._lengths: dict[str, int] = {}

    @property
    def chains(self) -> list[str]:
        """Every chain of which something was ever offered."""
        return list(self._lengths)

    def length(self, chain: str) -> int:
        """How many blocks of a chain were ever offered."""
        return self._lengths.get(chain, 0)

    def may_hold(self, chain: str, place: int) -> set[int]:
        """The contents that a block may have now."""
        return self._contents.get((chain, place), set())

    def offered(self, chain: str, first: int, last: int, variant: int) -> None:
        """Blocks `first` … `last - 1` are about to be stored."""
        self._note("offered", chain, first, last, variant)
        self._lengths[chain] = max(self.length(chain), last)
        for place in range(first, last):
            self._contents.setdefault((chain, place), set()).add(variant)

    def forgotten(self, chain: str, first: int, last: int) -> None:
        """The node said that blocks `first` … `last - 1` are forgotten."""
        self._note("forgotten", chain, first, last)
        for place in range(first, last):
            self._contents.pop((chain, place), None)

    def happened(self, what: str) -> None:
        """Something else that helps to understand the file."""
        self._note(what)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _note(self, *words: object) -> None:
        self._file.write(json.dumps(words) + "\n")
        self._file.flush()

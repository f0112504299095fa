"""LoRA adapters by their weights: vLLM's hash knows one by its name and path only.

Who replaces the files behind a path would get the KV of the old weights back.
"""

import hashlib
import threading
from collections import OrderedDict
from pathlib import Path

from kvstore_client.engine.weights import Identity, checkpoint_digest, weights_identity

MAX_ADAPTERS = 4096


class Adapter:
    """What one request adds to the base model; without a path it adds nothing.

    Made when the request comes, before the engine can load the files for it, and cheaply. The
    weights are read when their name is first needed, which takes a while.
    """

    def __init__(self, path: str = "", extra: bytes = b"") -> None:
        self._path = Path(path) if path else None
        self._extra = extra
        self._identity: Identity | None = None
        if self._path is not None:
            try:
                self._identity = weights_identity(self._path)
            except (OSError, ValueError):
                self._identity = None

    def content(self) -> bytes:
        """What completes the names of this request's blocks; empty without an adapter.

        Raises ValueError if nobody can say which weights the engine has.
        """
        if self._path is None:
            return b""
        try:
            digest = checkpoint_digest(self._path)
            is_same = self._identity == weights_identity(self._path)
        except OSError as error:
            raise ValueError(f"{self._path}: {error}") from None
        if not is_same:
            raise ValueError(f"{self._path}: changed since the engine first used it")
        return hashlib.sha256(bytes.fromhex(digest) + self._extra).digest()


class Adapters:
    """The adapters that an engine has used: each is what it was when it was first seen.

    Files that change later leave it open which weights the engine has in memory, so requests that
    use them are neither stored nor restored from then on. Any thread may ask.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str, int], Adapter] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, name: str, path: str, number: int, extra: bytes, *, renewed: bool) -> Adapter:
        """The adapter of a request; `renewed`: the engine is told to load it again."""
        with self._lock:
            known = self._known.get((name, path, number))
            if known is None or renewed:
                known = self._known[name, path, number] = Adapter(path, extra)
                if len(self._known) > MAX_ADAPTERS:
                    self._known.popitem(last=False)
            self._known.move_to_end((name, path, number))
            return known

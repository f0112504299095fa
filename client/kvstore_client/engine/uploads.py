"""Stores behind an engine's back: a queue, bounded in bytes, and a thread that empties it."""

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.api.hint import ReuseHint
from kvstore_client.arguments import Blocks
from kvstore_client.client import Client
from kvstore_client.space import Space

OnDone = Callable[[list[bool]], None]
"""Hears which blocks the node holds; the buffers are the caller's again."""

_log = logging.getLogger("kvstore.engine.uploads")


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    space: Space
    keys: Sequence[bytes]
    blocks: Blocks
    parent_key: bytes
    hint: ReuseHint | None
    on_done: OnDone | None

    @property
    def size_bytes(self) -> int:
        return len(self.keys) * self.space.block_bytes


class Uploads:
    """Invariant: each block that is offered is counted once, as held, failed or dropped, and the
    `on_done` of each run that was taken is called once.

    `client` is the caller's, and is closed after this.
    """

    def __init__(self, client: Client, max_bytes: int, *, scope: str = "") -> None:
        self.counters: Counter[str] = Counter()
        """Blocks: held (the node has them), failed, dropped (never tried: no room)."""
        self._client = client
        self._max_bytes = max_bytes
        self._scope = scope
        # All below is guarded by the condition.
        self._changed = threading.Condition()
        self._queue: deque[_Run] = deque()
        self._bytes = 0
        """Of what waits and of what is under way."""
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="kvstore-uploads", daemon=True)
        self._thread.start()

    def room_bytes(self) -> int:
        """How much may be offered now: worth asking before blocks are copied."""
        with self._changed:
            return 0 if self._closing else self._max_bytes - self._bytes

    def offer(
        self,
        space: Space,
        keys: Sequence[bytes],
        blocks: Blocks,
        *,
        parent_key: bytes = b"",
        hint: ReuseHint | None = None,
        on_done: OnDone | None = None,
    ) -> bool:
        """True if this run of a chain will be stored; never blocks.

        The blocks must stay as they are until `on_done`, which is called in another thread and
        must neither wait nor raise. After False they are the caller's, and count as dropped.
        """
        run = _Run(space, keys, blocks, parent_key, hint, on_done)
        with self._changed:
            taken = not self._closing and self._bytes + run.size_bytes <= self._max_bytes
            if taken:
                self._queue.append(run)
                self._bytes += run.size_bytes
                self._changed.notify_all()
            else:
                self.counters["dropped"] += len(keys)
        return taken

    def drain(self, timeout_s: float) -> bool:
        """Waits until all that was taken is stored or has failed; False if it was not in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._bytes, timeout_s)

    def close(self, timeout_s: float = 0.0) -> None:
        """Drops what is still waiting after `timeout_s` and waits for the store under way, which
        its budget bounds. Idempotent."""
        self.drain(timeout_s)
        with self._changed:
            self._closing = True
            dropped = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        for run in dropped:
            self._done(run, "dropped", [False] * len(run.keys))
        self._thread.join()

    def _work(self) -> None:
        while (run := self._next()) is not None:
            held: list[bool] = [False] * len(run.keys)
            try:
                held = self._client.store(
                    run.space,
                    run.keys,
                    run.blocks,
                    parent_key=run.parent_key,
                    hint=run.hint,
                    scope=self._scope,
                    parent_scope=self._scope,
                )
            except ValueError:
                # The adapter's mistake: these blocks are lost, the engine goes on.
                _log.exception("a run of %d blocks is not one that can be stored", len(run.keys))
            self._done(run, "failed", held)

    def _next(self) -> _Run | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            return self._queue.popleft() if self._queue else None

    def _done(self, run: _Run, otherwise: str, held: list[bool]) -> None:
        if run.on_done is not None:
            run.on_done(held)
        with self._changed:
            self.counters["held"] += sum(held)
            self.counters[otherwise] += len(held) - sum(held)
            self._bytes -= run.size_bytes
            self._changed.notify_all()

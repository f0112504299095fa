"""Memory of nodes that the GPU itself copies from and to, once CUDA has registered it."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from kvstore_client.arena import ArenaMemory

PIECE_BYTES = 64 << 20
"""At least so much is registered at a time; the driver launches no kernel meanwhile."""

_log = logging.getLogger("kvstore.worker.pinned")


class PinnedArenas:
    """The arenas of some owners, one of each. A thread of its own registers them.

    Registering takes some 50 ms for a GiB, in which the driver does nothing else. So it goes in
    pieces of whole slabs, with as long a pause after each, and nobody waits for all of it.
    Invariant: what is registered stays mapped, because it is kept here.
    """

    def __init__(
        self, device: torch.device, copies: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        """Enters `copies` while memory is let go of that the GPU may be copying from or to."""
        self._device = device
        self._copies = copies
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvstore-pin")
        self._closing = threading.Event()
        self.starts: frozenset[int] = frozenset()
        """The addresses at which what is registered begins: no copy may lie across one."""
        # Both below are guarded by the lock.
        self._lock = threading.Lock()
        self._asked: dict[object, ArenaMemory] = {}
        self._pinned: dict[object, ArenaMemory] = {}

    def __len__(self) -> int:
        """How many are pinned now."""
        return len(self._pinned)

    def has(self, owner: object, arena: ArenaMemory | None) -> bool:
        """Whether an owner's arena is pinned by now; the first asking begins it.

        The one that he had before, None says the last one, is let go of. Where the driver refuses,
        it never is.
        """
        with self._lock:
            if not _same(arena, self._asked.get(owner)):
                self._ask_locked(owner, arena)
            return arena is not None and _same(arena, self._pinned.get(owner))

    def settle(self) -> None:
        """Returns when all that was asked for until now is done, or refused."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Lets go of all of them. Idempotent."""
        self._closing.set()
        self._thread.shutdown()
        with self._lock:
            pinned, self._pinned = self._pinned, {}
        for arena in pinned.values():
            self._let_go(_pieces(arena))

    def _ask_locked(self, owner: object, arena: ArenaMemory | None) -> None:
        self._asked.pop(owner, None)
        if arena is not None:
            self._asked[owner] = arena
        self._thread.submit(self._change, owner, self._pinned.pop(owner, None), arena)

    def _change(self, owner: object, before: ArenaMemory | None, arena: ArenaMemory | None) -> None:
        if before is not None:
            self._let_go(_pieces(before))
        if arena is None or not self._register(arena):
            return
        _log.info("%d MiB of the node's memory are pinned", len(arena.memory) >> 20)
        with self._lock:
            self._pinned[owner] = arena

    def _register(self, arena: ArenaMemory) -> bool:
        """True if all of it is pinned; else nothing is."""
        done: list[tuple[int, int]] = []
        self.starts |= {address for address, _ in _pieces(arena)}
        for address, size in _pieces(arena):
            if self._closing.is_set():
                break
            started_s = time.monotonic()
            with torch.cuda.device(self._device):
                status = int(_cuda().cudaHostRegister(address, size, 0))
            if status:
                _log.warning("the node's memory cannot be pinned: CUDA error %d", status)
                break
            done.append((address, size))
            self._closing.wait(time.monotonic() - started_s)
        else:
            return True
        self._let_go(done)
        return False

    def _let_go(self, pieces: Iterable[tuple[int, int]]) -> None:
        for address, _ in pieces:
            started_s = time.monotonic()
            with self._copies(), torch.cuda.device(self._device):
                _cuda().cudaHostUnregister(address)
            self._closing.wait(time.monotonic() - started_s)
            self.starts -= {address}


def address_of(memory: memoryview) -> int:
    """Where it begins; read-only memory, too."""
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def _pieces(arena: ArenaMemory) -> Iterator[tuple[int, int]]:
    """Address and size of each: whole slabs, because no block lies across two of those."""
    start, total = address_of(arena.memory), len(arena.memory)
    slab_bytes = arena.slab_bytes or total
    step = max(slab_bytes, PIECE_BYTES // slab_bytes * slab_bytes)
    for offset in range(0, total, step):
        yield start + offset, min(step, total - offset)


def _same(one: ArenaMemory | None, other: ArenaMemory | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.memory is other.memory or (
        len(one.memory) == len(other.memory) and address_of(one.memory) == address_of(other.memory)
    )


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]

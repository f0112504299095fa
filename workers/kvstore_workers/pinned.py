"""Memory of nodes that the GPU itself copies from and to, once CUDA has registered it."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

_log = logging.getLogger("kvstore.worker.pinned")


class PinnedArenas:
    """The arenas of some owners, one of each. A thread of its own registers them.

    Pinning takes the driver a good part of a second for some GiB, and nobody waits for it.
    Invariant: what is registered stays mapped, because it is kept here.
    """

    def __init__(
        self, device: torch.device, copies: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        """Enters `copies` while memory is let go of that the GPU may be copying from or to."""
        self._device = device
        self._copies = copies
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvstore-pin")
        # Both below are guarded by the lock.
        self._lock = threading.Lock()
        self._asked: dict[object, memoryview] = {}
        self._pinned: dict[object, memoryview] = {}

    def has(self, owner: object, arena: memoryview | None) -> bool:
        """Whether an owner's arena is pinned by now; the first asking begins it.

        The one that he had before, None says the last one, is let go of. Where the driver refuses,
        it never is.
        """
        with self._lock:
            if not _same(arena, self._asked.get(owner)):
                self._ask_locked(owner, arena)
            return arena is not None and _same(arena, self._pinned.get(owner))

    def __len__(self) -> int:
        """How many are pinned now."""
        return len(self._pinned)

    def close(self) -> None:
        """Lets go of all of them, when what is under way has ended. Idempotent."""
        self._thread.shutdown()
        with self._lock:
            pinned, self._pinned = self._pinned, {}
        for arena in pinned.values():
            self._let_go(arena)

    def _ask_locked(self, owner: object, arena: memoryview | None) -> None:
        self._asked.pop(owner, None)
        if arena is not None:
            self._asked[owner] = arena
        self._thread.submit(self._change, owner, self._pinned.pop(owner, None), arena)

    def _change(self, owner: object, before: memoryview | None, arena: memoryview | None) -> None:
        if before is not None:
            self._let_go(before)
        if arena is None:
            return
        started_s = time.monotonic()
        with torch.cuda.device(self._device):
            status = int(_cuda().cudaHostRegister(address_of(arena), len(arena), 0))
        if status:
            _log.warning("the node's memory cannot be pinned: CUDA error %d", status)
            return
        seconds = time.monotonic() - started_s
        _log.info("%d MiB of the node's memory pinned in %.2f s", len(arena) >> 20, seconds)
        with self._lock:
            self._pinned[owner] = arena

    def _let_go(self, arena: memoryview) -> None:
        with self._copies(), torch.cuda.device(self._device):
            _cuda().cudaHostUnregister(address_of(arena))


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def address_of(memory: memoryview) -> int:
    """Where it begins; read-only memory, too."""
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def _same(one: memoryview | None, other: memoryview | None) -> bool:
    if one is None or other is None:
        return one is other
    return len(one) == len(other) and address_of(one) == address_of(other)

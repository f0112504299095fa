"""Copies of whole blocks between the VRAM pool and host memory; the only file with CUDA streams.

Host memory is the node's arena, where this process has it mapped, or staging memory of our own.

    compute stream ──mark()──┐ event
    down stream (spill)      └─wait─► copy ─► event ─► to_host returns
    up stream (restore)      └─wait─► copy ─► event ─► to_device returns

Both calls return when their copies are finished, so no caller ever sees a half-copied block, and
kernels launched after `to_device` read what it brought. What `begin_…` returns has to be waited for
instead; `one_ahead` does it for a run of steps, whose next one is asked for while copies run.
"""

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import numpy as np
import torch

from kvstore_client.arena import ArenaMemory
from kvstore_workers.pinned import PinnedArenas, address_of
from kvstore_workers.vram import VramPool

Mark = torch.cuda.Event | None
"""A moment of the compute stream; None where there are no streams."""


Step = TypeVar("Step")


class Copies:
    """Copies under way. Until `wait` has returned nobody else may touch what they read or write."""

    def __init__(self, finished: Mark, places: Sequence[memoryview]) -> None:
        self._finished = finished
        self._places = places
        """Kept, so that they stay mapped."""

    def wait(self) -> None:
        """Returns when the bytes are there. Any thread, as often as it likes."""
        if self._finished is not None:
            self._finished.synchronize()


class Staging:
    """Host memory for some blocks, pinned if a GPU copies from and to it.

    One thread at a time uses it. `views` are writable and valid as long as the staging lives.
    """

    def __init__(self, blocks: int, block_bytes: int, *, pinned: bool) -> None:
        self.tensor = torch.empty((blocks, block_bytes), dtype=torch.uint8, pin_memory=pinned)
        self.views = [memoryview(row) for row in self.tensor.numpy()]

    @property
    def blocks(self) -> int:
        """How many blocks fit."""
        return len(self.views)


class Copier:
    """Moves blocks between one VRAM pool and host memory, beside the running computation.

    Thread-safe as long as no two threads use one place or one block at once; copies down and
    copies up have streams of their own and do not wait for each other.
    """

    def __init__(self, vram: VramPool) -> None:
        self._vram = vram
        self._cuda = vram.device.type == "cuda"
        self._host_array = None if self._cuda else vram.bytes.numpy()
        self._arenas = PinnedArenas(vram.device, self._still) if self._cuda else None
        self._going_down, self._going_up = threading.Lock(), threading.Lock()
        """Held while copies there begin."""
        if self._cuda:
            self._down = torch.cuda.Stream(vram.device)  # type: ignore[no-untyped-call]
            self._up = torch.cuda.Stream(vram.device)  # type: ignore[no-untyped-call]

    def staging(self, blocks: int) -> Staging:
        """Fresh host memory for `blocks` blocks, pinned on CUDA."""
        return Staging(blocks, self._vram.layout.block_bytes, pinned=self._cuda)

    @property
    def _bounds(self) -> frozenset[int]:
        return self._arenas.starts if self._arenas is not None else frozenset()

    @contextmanager
    def _still(self) -> Iterator[None]:
        """No copy is under way meanwhile, and none begins."""
        with self._going_down, self._going_up:
            self._down.synchronize()
            self._up.synchronize()
            yield

    def mark(self) -> Mark:
        """Everything that the calling thread has launched on its compute stream so far."""
        if not self._cuda:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._vram.device))
        return event

    def pinned(self, owner: object, arena: ArenaMemory | None) -> bool:
        """Whether copies from and to an owner's arena need no memory of ours in between, by now.

        Always so on a CPU; on a GPU once it is pinned, which the first asking begins. An owner has
        one arena; the one before, None says the last one, is let go of.
        """
        return self._arenas is None or self._arenas.has(owner, arena)

    @property
    def arenas_pinned(self) -> int:
        """How many owners' arenas the GPU copies from and to by itself now."""
        return len(self._arenas) if self._arenas is not None else 0

    def settle(self) -> None:
        """Returns when the arenas that were asked about until now are pinned, or refused."""
        if self._arenas is not None:
            self._arenas.settle()

    def close(self) -> None:
        """Lets go of all arenas. Nothing may be copied any more. Idempotent."""
        if self._arenas is not None:
            self._arenas.close()

    def to_host(self, blocks: Sequence[int], places: Sequence[memoryview], *, after: Mark) -> None:
        """Fills places with the bytes of `blocks`, in order; they are in host memory.

        Reads a block only after the mark, which must cover the kernels that wrote it.
        """
        self.begin_to_host(blocks, places, after=after).wait()

    def begin_to_host(
        self, blocks: Sequence[int], places: Sequence[memoryview], *, after: Mark
    ) -> Copies:
        """As `to_host`, which does not return before they are finished. At once on a CPU."""
        if self._host_array is not None:
            for place, block in zip(places, blocks, strict=True):
                np.copyto(np.frombuffer(place, np.uint8), self._host_array[block])
            return Copies(None, ())
        stretches = _stretches(places, blocks, self._bounds)
        with self._going_down, self._on(self._down, after):
            for host, rows in stretches:
                host.copy_(self._vram.bytes[rows], non_blocking=True)
            return Copies(self._down.record_event(), places)

    def to_device(
        self, places: Sequence[memoryview], blocks: Sequence[int], *, after: Mark
    ) -> None:
        """Fills `blocks` from places in host memory, in order.

        Writes only after the mark, which must cover the kernels that still read what an evicted
        block held before.
        """
        self.begin_to_device(places, blocks, after=after).wait()

    def begin_to_device(
        self, places: Sequence[memoryview], blocks: Sequence[int], *, after: Mark
    ) -> Copies:
        """As `to_device`, which does not return before they are finished. At once on a CPU."""
        if self._host_array is not None:
            for place, block in zip(places, blocks, strict=True):
                np.copyto(self._host_array[block], np.frombuffer(place, np.uint8))
            return Copies(None, ())
        stretches = _stretches(places, blocks, self._bounds)
        with self._going_up, self._on(self._up, after):
            for host, rows in stretches:
                self._vram.bytes[rows].copy_(host, non_blocking=True)
            return Copies(self._up.record_event(), places)

    @contextmanager
    def _on(self, stream: torch.cuda.Stream, after: Mark) -> Iterator[None]:
        """Copies go by this stream, after the mark; when one cannot begin, none is left running."""
        with torch.cuda.device(self._vram.device), torch.cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            try:
                yield
            except BaseException:
                stream.synchronize()
                raise


def one_ahead(
    steps: Iterable[Sequence[Step]], begin: Callable[[Sequence[Step]], Copies | None]
) -> Generator[Sequence[Step], None, None]:
    """Each step of a `trailing` write or read once its copies, which `begin` begins, are finished.

    The next step is asked for while they run. Ends early where `begin` returns None. Close it
    before the steps: it waits for what is still being copied.
    """
    running: deque[tuple[Sequence[Step], Copies]] = deque()
    try:
        for step in steps:
            if step:
                copies = begin(step)
                if copies is None:
                    return
                running.append((step, copies))
            while len(running) > bool(step):
                running[0][1].wait()
                yield running.popleft()[0]
    finally:
        with ExitStack() as waiting:  # One that fails does not spare the other.
            for _, copies in running:
                waiting.callback(copies.wait)


def _stretches(
    places: Sequence[memoryview], blocks: Sequence[int], bounds: Container[int]
) -> Iterator[tuple[torch.Tensor, slice]]:
    """Host memory and the blocks that belong to it; neighbours on both sides go in one copy.

    But not across an address of `bounds`.
    """
    size = len(places[0]) if places else 0
    addresses = list(map(address_of, places))
    start = 0
    for at in range(1, len(places) + 1):
        count = at - start
        if (
            at == len(places)
            or addresses[at] != addresses[start] + count * size
            or addresses[at] in bounds
            or blocks[at] != blocks[start] + count
        ):
            yield (
                _as_tensor(addresses[start], count, size),
                slice(blocks[start], blocks[start] + count),
            )
            start = at


def _as_tensor(address: int, blocks: int, block_bytes: int) -> torch.Tensor:
    """Memory as [blocks, block_bytes]. By its address: torch warns of what may only be read."""
    there = (ctypes.c_uint8 * (blocks * block_bytes)).from_address(address)
    return torch.frombuffer(there, dtype=torch.uint8).view(blocks, block_bytes)

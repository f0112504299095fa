"""Copies of whole blocks between the VRAM pool and host memory; the only file with CUDA streams.

Host memory is the node's arena, where this process has it mapped, or staging memory of our own.

    compute stream ──mark()──┐ event
    down stream (spill)      └─wait─► copy ─► event ─► to_host returns
    up stream (restore)      └─wait─► copy ─► event ─► to_device returns

Both calls return when their copies are finished, so no caller ever sees a half-copied block, and
kernels launched after `to_device` read what it brought.
"""

import ctypes
import logging
import threading
from collections.abc import Sequence

import numpy as np
import torch

from kvstore_workers.vram import VramPool

_log = logging.getLogger("kvstore.worker.transfer")

Mark = torch.cuda.Event | None
"""A moment of the compute stream; None where there are no streams."""


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
        self._arenas: dict[object, memoryview] = {}
        self._going_down, self._going_up = threading.Lock(), threading.Lock()
        """Held while bytes go there; both, while memory that they may use is let go of."""
        if self._cuda:
            self._down = torch.cuda.Stream(vram.device)  # type: ignore[no-untyped-call]
            self._up = torch.cuda.Stream(vram.device)  # type: ignore[no-untyped-call]

    def staging(self, blocks: int) -> Staging:
        """Fresh host memory for `blocks` blocks, pinned on CUDA."""
        return Staging(blocks, self._vram.layout.block_bytes, pinned=self._cuda)

    def mark(self) -> Mark:
        """Everything that the calling thread has launched on its compute stream so far."""
        if not self._cuda:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._vram.device))
        return event

    def pin(self, owner: object, arena: memoryview | None) -> None:
        """Makes an owner's arena memory that the GPU itself copies from and to.

        An owner has one; the one before, None says the last one, is let go of. Where the driver
        refuses, copies go through memory of its own.
        """
        if not self._cuda:
            return
        with self._going_down, self._going_up:
            before = self._arenas.get(owner)
            if before is not None and arena is not None and _address(before) == _address(arena):
                return
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            if before is not None:
                runtime.cudaHostUnregister(_address(before))
                del self._arenas[owner]
            if arena is not None:
                status = int(runtime.cudaHostRegister(_address(arena), len(arena), 0))
                if status:
                    _log.warning("the node's memory cannot be pinned: CUDA error %d", status)
                self._arenas[owner] = arena

    def to_host(self, blocks: Sequence[int], places: Sequence[memoryview], *, after: Mark) -> None:
        """Fills places with the bytes of `blocks`, in order; they are in host memory.

        Reads a block only after the mark, which must cover the kernels that wrote it.
        """
        if self._host_array is not None:
            for place, block in zip(places, blocks, strict=True):
                np.copyto(np.frombuffer(place, np.uint8), self._host_array[block])
            return
        device = torch.cuda.device(self._vram.device)
        with self._going_down, device, torch.cuda.stream(self._down):
            _wait(self._down, after)
            for place, block in zip(places, blocks, strict=True):
                _as_tensor(place).copy_(self._vram.bytes[block], non_blocking=True)
            self._down.record_event().synchronize()

    def to_device(
        self, places: Sequence[memoryview], blocks: Sequence[int], *, after: Mark
    ) -> None:
        """Fills `blocks` from places in host memory, in order.

        Writes only after the mark, which must cover the kernels that still read what an evicted
        block held before.
        """
        if self._host_array is not None:
            for place, block in zip(places, blocks, strict=True):
                np.copyto(self._host_array[block], np.frombuffer(place, np.uint8))
            return
        device = torch.cuda.device(self._vram.device)
        with self._going_up, device, torch.cuda.stream(self._up):
            _wait(self._up, after)
            for place, block in zip(places, blocks, strict=True):
                self._vram.bytes[block].copy_(_as_tensor(place), non_blocking=True)
            self._up.record_event().synchronize()


def _address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def _as_tensor(memory: memoryview) -> torch.Tensor:
    """The same bytes. By their address: torch warns of memory that may only be read."""
    there = (ctypes.c_uint8 * len(memory)).from_address(_address(memory))
    return torch.frombuffer(there, dtype=torch.uint8)


def _wait(stream: torch.cuda.Stream, mark: Mark) -> None:
    if mark is not None:
        stream.wait_event(mark)

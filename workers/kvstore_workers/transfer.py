"""Copies of whole blocks between the VRAM pool and host memory; the only file with CUDA streams.

    compute stream ──mark()──┐ event
    down stream (spill)      └─wait─► copy ─► event ─► to_host returns
    up stream (restore)      └─wait─► copy ─► event ─► to_device returns

Both calls return when their copies are finished, so no caller ever sees a half-copied block, and
kernels launched after `to_device` read what it brought.
"""

from collections.abc import Sequence

import numpy as np
import torch

from kvstore_workers.vram import VramPool

Mark = torch.cuda.Event | None
"""A moment of the compute stream; None where there are no streams."""


class Staging:
    """Host memory for some blocks, pinned if a GPU copies from and to it.

    One thread at a time uses it. `views` are writable and valid as long as the staging lives.
    """

    def __init__(self, blocks: int, block_bytes: int, *, pinned: bool) -> None:
        self.tensor = torch.empty((blocks, block_bytes), dtype=torch.uint8, pin_memory=pinned)
        self.array = self.tensor.numpy()
        self.views = [memoryview(row) for row in self.array]

    @property
    def blocks(self) -> int:
        """How many blocks fit."""
        return len(self.views)


class Copier:
    """Moves blocks between one VRAM pool and staging memory, beside the running computation.

    Thread-safe as long as no two threads use one staging or one block at once; copies down and
    copies up have streams of their own and do not wait for each other.
    """

    def __init__(self, vram: VramPool) -> None:
        self._vram = vram
        self._cuda = vram.device.type == "cuda"
        self._host_array = None if self._cuda else vram.bytes.numpy()
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

    def to_host(self, blocks: Sequence[int], staging: Staging, *, after: Mark) -> None:
        """Fills the staging's first rows with the bytes of `blocks`, in order.

        Reads a block only after the mark, which must cover the kernels that wrote it.
        """
        if self._host_array is not None:
            for row, block in enumerate(blocks):
                np.copyto(staging.array[row], self._host_array[block])
            return
        with torch.cuda.device(self._vram.device), torch.cuda.stream(self._down):
            _wait(self._down, after)
            for row, block in enumerate(blocks):
                staging.tensor[row].copy_(self._vram.bytes[block], non_blocking=True)
            self._down.record_event().synchronize()

    def to_device(
        self, staging: Staging, blocks: Sequence[int], *, after: Mark, first_row: int = 0
    ) -> None:
        """Fills `blocks` from the staging's rows from `first_row` on, in order.

        Writes only after the mark, which must cover the kernels that still read what an evicted
        block held before.
        """
        if self._host_array is not None:
            for row, block in enumerate(blocks, first_row):
                np.copyto(self._host_array[block], staging.array[row])
            return
        with torch.cuda.device(self._vram.device), torch.cuda.stream(self._up):
            _wait(self._up, after)
            for row, block in enumerate(blocks, first_row):
                self._vram.bytes[block].copy_(staging.tensor[row], non_blocking=True)
            self._up.record_event().synchronize()


def _wait(stream: torch.cuda.Stream, mark: Mark) -> None:
    if mark is not None:
        stream.wait_event(mark)

"""Stores the chunks of a session's prompts as they are computed, beside the computing."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache

from kvstore_client.engine.uploads import Uploads
from kvstore_client.restore_gate import RestoreGate
from kvstore_client.transformers.groups import LayerGroup, block_views
from kvstore_client.transformers.restore import Prompts

_log = logging.getLogger("kvstore.transformers.saving")


@dataclass(frozen=True, slots=True, eq=False)
class _Copied:
    """A chunk on its way to host memory."""

    chunk: int
    sources: Sequence[torch.Tensor]
    """Kept as long as they are copied from."""
    blocks: Sequence[torch.Tensor]
    """Of each group: [row, *block_shape], in host memory."""
    copied: torch.cuda.Event | None
    """None: they are there."""

    @property
    def done(self) -> bool:
        return self.copied is None or bool(self.copied.query())  # type: ignore[no-untyped-call]


class Saving:
    """Takes the chunks of one session, each once and in order, and offers them to be stored.

    Invariant: a chunk is taken only behind the one before it, or behind what was restored; once
    one is missing there are no more.
    """

    def __init__(
        self,
        prompts: Prompts,
        groups: Sequence[LayerGroup],
        uploads: Uploads,
        restored_blocks: int,
        *,
        counters: Counter[str],
        gate: RestoreGate | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._prompts = prompts
        self._groups = groups
        self._uploads = uploads
        self._counters = counters
        self._gate = gate
        self._monotonic_s = monotonic_s
        self._chunk_tokens = groups[0].chunk_tokens
        self._blocks = len(prompts.keys[0])
        self._next = restored_blocks
        self._copying: deque[_Copied] = deque()
        self._bytes = 0
        """Copied, or being copied, and not offered yet."""
        self._last_s: float | None = None
        """When the chunk before was computed."""

    @property
    def complete(self) -> bool:
        """Whether there is nothing more to be taken."""
        return self._next >= self._blocks

    def computed(self, start: int, tokens: int, cache: DynamicCache) -> None:
        """A forward pass has put tokens from `start` on into the cache. Never raises."""
        if self.complete:
            return
        cut = start == self._next * self._chunk_tokens and tokens == self._chunk_tokens
        if not cut:
            self._stop("uncut")
            _log.warning(
                "tokens %d … %d came in one piece; only pieces of %d are stored. Pass what "
                "session.inputs holds to generate, prefill_chunk_size with it",
                start, start + tokens - 1, self._chunk_tokens,
            )  # fmt: skip
            return
        try:
            self._measure()
            self._take(cache)
        except Exception:  # noqa: BLE001  the store's edge: a lost chunk is no lost answer
            _log.exception("chunk %d of a prompt is not stored", self._next)
            self._stop("failed")

    def disturbed(self) -> None:
        """What the passes so far put into the cache was moved, or replaced, between two of them."""
        if not self.complete:
            self._stop("uncut")
            _log.warning(
                "a cache was changed between two pieces of its prompt; the rest is not stored"
            )

    def stop(self) -> None:
        """Takes no more chunks."""
        self._next = self._blocks

    def finish(self) -> None:
        """Offers what is still being copied. Never raises."""
        try:
            self._offer(wait=True)
        except Exception:  # noqa: BLE001  the store's edge
            _log.exception("the end of a prompt is not stored")
        self._copying.clear()
        self.stop()

    def _stop(self, why: str) -> None:
        rows = len(self._prompts.keys)
        self._counters[why] += (self._blocks - self._next) * self._chunk_tokens * rows
        self.stop()

    def _measure(self) -> None:
        now_s, last_s = self._monotonic_s(), self._last_s
        self._last_s = now_s
        if self._gate is not None and last_s is not None:
            rows = len(self._prompts.keys)
            self._gate.computed(self._chunk_tokens * rows, now_s - last_s)

    @torch.no_grad()
    def _take(self, cache: DynamicCache) -> None:
        rows = len(self._prompts.keys)
        size_bytes = rows * sum(group.block_bytes for group in self._groups)
        self._offer()
        if self._bytes + size_bytes > self._uploads.room_bytes():
            self._stop("dropped")
            return
        sources = [group.gather(cache, rows) for group in self._groups]
        self._copying.append(_copy_down(self._next, sources))
        self._bytes += size_bytes
        self._next += 1
        self._offer()

    def _offer(self, *, wait: bool = False) -> None:
        while self._copying and (wait or self._copying[0].done):
            copied = self._copying.popleft()
            if copied.copied is not None:
                copied.copied.synchronize()
            self._bytes -= sum(blocks.nbytes for blocks in copied.blocks)
            if not self._offer_chunk(copied):
                self._stop("dropped")
                self._copying.clear()
                self._bytes = 0

    def _offer_chunk(self, copied: _Copied) -> bool:
        for space, blocks in zip(self._prompts.spaces, copied.blocks, strict=True):
            for keys, view in zip(self._prompts.keys, block_views(blocks), strict=True):
                taken = self._uploads.offer(
                    space,
                    [keys[copied.chunk]],
                    [view],
                    parent_key=keys[copied.chunk - 1] if copied.chunk else b"",
                    hint=self._prompts.hint,
                )
                if not taken:
                    return False
        return True


def _copy_down(chunk: int, sources: Sequence[torch.Tensor]) -> _Copied:
    """Begins to copy blocks into host memory; on CUDA beside what is computed next."""
    device = sources[0].device
    if device.type == "cpu":
        return _Copied(chunk, (), sources, None)
    if device.type != "cuda":
        return _Copied(chunk, (), [source.cpu() for source in sources], None)
    beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        blocks = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in sources]
        for block, source in zip(blocks, sources, strict=True):
            block.copy_(source, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(beside)
    return _Copied(chunk, sources, blocks, copied)

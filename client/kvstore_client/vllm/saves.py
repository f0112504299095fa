"""Saves: pages are copied out within the step that completes them, and stored from the copy.

So a block may be freed, preempted and used again at once: on a CPU the copy is made when `save`
returns, on a GPU nothing that the engine enqueues after `fence` runs before it.
"""

import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvstore.api.clock import Clock
from kvstore.api.hint import ReuseHint
from kvstore_client.client import Client
from kvstore_client.engine.uploads import Uploads
from kvstore_client.space import Space
from kvstore_client.vllm.device import Side, engine_mark, engine_waits
from kvstore_client.vllm.held import Held
from kvstore_client.vllm.metadata import Run, Save
from kvstore_client.vllm.options import ConnectorOptions
from kvstore_client.vllm.pages import GroupPages
from kvstore_client.vllm.staging import Staging, as_memory
from kvstore_client.vllm.stats import Tally

_log = logging.getLogger("kvstore.vllm.saves")


@dataclass(frozen=True, slots=True)
class _Copy:
    """Consecutive blocks that were copied out, or will have been after `made`."""

    space: Space
    keys: tuple[bytes, ...]
    buffers: list[torch.Tensor]
    parent_key: bytes
    hint: ReuseHint | None
    made: Any


class Saves:
    """Invariant: the copies that wait to be stored take at most `max_saving_bytes`; a block that
    finds no room is counted and not saved.

    One thread, the engine's, calls all but `close`.
    """

    def __init__(
        self,
        client: Client,
        groups: Sequence[GroupPages],
        options: ConnectorOptions,
        clock: Clock,
        tally: Tally,
    ) -> None:
        self._groups = groups
        self._tally = tally
        self._device = groups[0].device
        self._side = Side(self._device)
        self._staging = Staging(options.max_saving_bytes, clock, pinned=self._device.type == "cuda")
        # The staging bounds what is offered; a block that is larger than the bound is taken alone.
        largest = max(options.max_saving_bytes, 1 << 30)
        self._uploads = Uploads(client, largest, scope=options.scope)
        self._held = Held(clock)
        self._unfenced: Any = None
        self._made: queue.SimpleQueue[_Copy | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if self._device.type == "cuda":
            self._thread = threading.Thread(
                target=self._offer_made, name="kvstore-saves", daemon=True
            )
            self._thread.start()

    def save(self, saves: Sequence[Save], spaces: Sequence[Space]) -> None:
        """Copies out what the node may lack and there is room for, and has it stored."""
        if not saves:
            return
        self._side.after(engine_mark(self._device))
        try:
            for save in saves:
                for run in save.runs:
                    self._save_run(run, spaces[run.group], save.hint)
        finally:
            self._unfenced = self._side.mark()

    def fence(self) -> None:
        """What the engine enqueues from now on runs after the copies."""
        engine_waits(self._device, self._unfenced)
        self._unfenced = None

    def known(self, space_id: bytes, keys: Sequence[bytes]) -> None:
        """The node has just given these, so it need not be given them. Any thread may call."""
        self._held.ended(space_id, keys, [True] * len(keys))

    def forget(self) -> None:
        """The node may have lost what it held."""
        self._held.clear()

    def close(self, timeout_s: float) -> None:
        """Stores what is still waiting, for so long at most. Idempotent."""
        if self._thread is not None:
            self._made.put(None)
            self._thread.join(timeout_s)
        self._uploads.close(timeout_s)
        self._staging.close()

    def drain(self, timeout_s: float) -> bool:
        """Waits until all that was offered is stored or has failed; False if it was not in time."""
        return self._uploads.drain(timeout_s)

    def _save_run(self, run: Run, space: Space, hint: ReuseHint | None) -> None:
        wanted = self._held.lacking(space.space_id, run.keys)
        first = 0
        while first < len(wanted):
            end = first
            while end < len(wanted) and wanted[end] == wanted[first]:
                end += 1
            if wanted[first]:
                self._copy_out(run, first, end, space, hint)
            first = end

    def _copy_out(
        self, run: Run, first: int, end: int, space: Space, hint: ReuseHint | None
    ) -> None:
        while first < end:
            buffers = self._staging.take(space.block_bytes, end - first)
            if not buffers:
                self._tally.add("unsaved_blocks", end - first, "dropped")
                return
            last = first + len(buffers)
            try:
                with self._side.entered():
                    self._groups[run.group].gather(run.pages[first:last], buffers)
                    made = self._side.mark()
            except BaseException:
                self._side.finish()
                self._staging.give(buffers)
                raise
            parent = run.keys[first - 1] if first else run.parent_key
            keys = run.keys[first:last]
            self._held.begun(space.space_id, keys)
            copy = _Copy(space, keys, buffers, parent, hint, made)
            if self._thread is None:
                self._offer(copy)
            else:
                self._made.put(copy)
            first = last

    def _offer_made(self) -> None:
        while (copy := self._made.get()) is not None:
            try:
                copy.made.synchronize()
            except Exception:  # noqa: BLE001  the thread's edge: a lost copy is not saved
                self._tally.add("errors", label="copy")
                self._ended(copy, [False] * len(copy.keys))
            else:
                self._offer(copy)

    def _offer(self, copy: _Copy) -> None:
        def done(held: list[bool]) -> None:
            self._ended(copy, held)

        taken = self._uploads.offer(
            copy.space,
            copy.keys,
            [as_memory(buffer) for buffer in copy.buffers],
            parent_key=copy.parent_key,
            hint=copy.hint,
            on_done=done,
        )
        if not taken:
            self._ended(copy, [False] * len(copy.keys))

    def _ended(self, copy: _Copy, held: list[bool]) -> None:
        self._held.ended(copy.space.space_id, copy.keys, held)
        self._staging.give(copy.buffers)
        count = sum(held)
        if count:
            self._tally.add("saved_blocks", count)
            self._tally.add("saved_bytes", count * copy.space.block_bytes)
        if count < len(held):
            self._tally.add("unsaved_blocks", len(held) - count, "failed")

"""Blocks between VRAM and a node's memory, beside the copy from pinned memory alone."""

import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine.store_node import StoreNode
from benchmarks.proof import Claim, Finding, Proof, Setting, main, not_run, passed
from kvstore.api.errors import Unavailable
from kvstore.api.keys import chain_keys, root_key
from kvstore.api.space import SpaceDescriptor
from kvstore_client import Space
from kvstore_client.in_place import EmptySlot, GivenBlock
from kvstore_workers.layout import KVLayout
from kvstore_workers.transfer import Copier, Copies, one_ahead
from kvstore_workers.vram import VramPool, choose_device

LAYERS = {256 << 10: 2, 2 << 20: 16, 16 << 20: 128}
"""Of a model whose blocks have so many bytes: 8 KV heads of 128, 32 tokens to a block, bf16."""
BATCH = 32
ROTATION_BYTES = 1 << 30
LEAST_RATIO = 0.9
SLAB_BYTES = 64 << 20
NODE_BYTES = 2 * ROTATION_BYTES
PIN_S = 60.0
PATIENCE_S = 60.0
OPS = PUT, GET = "put", "get"
AT_ONCE = "get at once"
"""Of what was put a moment ago: its digest may still be missing."""


@dataclass(slots=True)
class Times:
    """Seconds of each call of one operation, and of the copies alone."""

    ours: list[float] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)
    one_copy: list[float] = field(default_factory=list)
    """The same bytes as a single copy."""


class PinnedCopies:
    """The floor: as many blocks in VRAM and in pinned memory, and cudaMemcpyAsync between them."""

    def __init__(self, blocks: int, block_bytes: int, device: torch.device) -> None:
        shape = (blocks, block_bytes)
        self._host = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
        self._vram = torch.zeros(shape, dtype=torch.uint8, device=device)

    def copy(self, op: str, batch: range, step: int) -> None:
        """`step` blocks at a time, and one wait at the end."""
        source, target = (self._vram, self._host) if op == PUT else (self._host, self._vram)
        for start in range(batch.start, batch.stop, step):
            target[start : start + step].copy_(source[start : start + step], non_blocking=True)
        torch.cuda.synchronize()


class Rotation:
    """Blocks in VRAM that go round, and a node with room for them."""

    def __init__(self, layout: KVLayout, node: StoreNode) -> None:
        size = layout.block_bytes
        self.blocks = ROTATION_BYTES // size
        self._vram = VramPool(layout, self.blocks, choose_device())
        self._beside = PinnedCopies(self.blocks, size, self._vram.device)
        self._copier = Copier(self._vram)
        descriptor = SpaceDescriptor(
            model="vram", revision="1", dtype=layout.dtype, layout=layout.name,
            block_tokens=layout.block_tokens, block_bytes=size,
        )  # fmt: skip
        self._client = node.connect("shm", descriptor)
        self._space = Space.of(descriptor)
        tokens = list(range(self.blocks * layout.block_tokens))
        self._keys = chain_keys(root_key(b""), tokens, layout.block_tokens)
        self._wait_pinned()

    def measure(self, repeats: int, times: Mapping[str, Times]) -> int:
        """Puts and gets all blocks so often; how many came back with other bytes."""
        wrong = 0
        for repeat in range(repeats + 1):
            self._vram.bytes.random_(0, 256)
            wanted = self._vram.bytes.clone()
            # What is done for the first time is slow.
            kept = times if repeat else {op: Times() for op in (*OPS, AT_ONCE)}
            self._turn(PUT, self._put, kept[PUT])
            self._vram.bytes.zero_()
            kept[AT_ONCE].ours.extend(self._each_batch(self._get))
            self._vram.bytes.zero_()
            self._turn(GET, self._get, kept[GET])
            wrong += int((self._vram.bytes != wanted).any(dim=1).sum())
            self._client.discard(self._space, self._keys)
        return wrong

    def close(self) -> None:
        """Lets go of the node and its memory."""
        self._copier.close()
        self._client.close()

    def _turn(self, op: str, ours: Callable[[range], None], times: Times) -> None:
        torch.cuda.synchronize()
        for start in range(0, self.blocks - BATCH + 1, BATCH):
            batch = range(start, start + BATCH)
            times.floor.append(_seconds(self._beside.copy, op, batch, 1))
            times.one_copy.append(_seconds(self._beside.copy, op, batch, BATCH))
            times.ours.append(_seconds(ours, batch))

    def _each_batch(self, work: Callable[[range], None]) -> list[float]:
        """Seconds of each call. The node's digests of what was put have to be waited for."""
        batches = range(0, self.blocks - BATCH + 1, BATCH)
        return [_seconds(work, range(start, start + BATCH)) for start in batches]

    def _put(self, batch: range) -> None:
        held: list[bool] = [False] * len(batch)
        parent = self._keys[batch.start - 1] if batch.start else b""
        keys = self._keys[batch.start : batch.stop]
        steps = self._client.write_in_place(
            self._space, keys, held, parent_key=parent, budget_s=PATIENCE_S, trailing=True
        )

        def begin(slots: Sequence[EmptySlot]) -> Copies:
            blocks = [batch[slot.place] for slot in slots]
            return self._copier.begin_to_host(blocks, [slot.view for slot in slots], after=None)

        deque(one_ahead(steps, begin), maxlen=0)
        if not all(held):
            raise Unavailable(f"the node took {sum(held)} of {len(held)} blocks")

    def _get(self, batch: range) -> None:
        keys, places = self._keys[batch.start : batch.stop], iter(batch)
        steps = self._client.read_in_place(self._space, keys, budget_s=PATIENCE_S, trailing=True)

        def begin(given: Sequence[GivenBlock]) -> Copies:
            blocks = list(islice(places, len(given)))
            return self._copier.begin_to_device([block.view for block in given], blocks, after=None)

        came = sum(map(len, one_ahead(steps, begin)))
        if came < len(batch):
            raise Unavailable(f"{came} of {len(batch)} blocks came")

    def _wait_pinned(self) -> None:
        until_s = time.monotonic() + PIN_S
        while not self._copier.pinned(self._client, self._client.arena):
            if time.monotonic() > until_s:
                raise Unavailable(f"the node's memory is not pinned within {PIN_S:g} s")
            time.sleep(0.01)


def _name(size: int) -> str:
    return f"{size >> 20} MiB" if size >> 20 else f"{size >> 10} KiB"


def _seconds(work: Callable[..., None], *arguments: Any) -> float:
    started_s = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started_s


def finding(size: int, op: str, times: Mapping[str, Times], gpu: str) -> Finding:
    """The ratio of the medians; what both are in GB/s stands beside it."""
    batch_gb, these = BATCH * size / 1e9, times[op]
    ours, floor, one_copy = map(statistics.median, (these.ours, these.floor, these.one_copy))
    details = {
        "gpu": gpu, "block_bytes": size, "batch": BATCH,
        "gb_per_s": round(batch_gb / ours, 2), "floor": round(batch_gb / floor, 2),
        "one_copy_of_all": round(batch_gb / one_copy, 2),
        "beside_the_copies_ms": round(1e3 * (ours - floor), 3),
    }  # fmt: skip
    if op == GET:
        at_once = statistics.median(times[AT_ONCE].ours)
        details["gb_per_s_at_once_behind_the_put"] = round(batch_gb / at_once, 2)
    ratio = floor / ours
    return Finding(round(ratio, 3), ratio >= LEAST_RATIO, len(these.ours), details=details)


def run(setting: Setting) -> list[Finding]:
    """Measures, and says what follows."""
    if not torch.cuda.is_available():
        return [not_run("torch sees no CUDA device")] * len(PROOF.claims)
    gpu = torch.cuda.get_device_name()
    ratios: list[Finding] = []
    wrong = blocks = 0
    for size, layers in LAYERS.items():
        times = {op: Times() for op in (*OPS, AT_ONCE)}
        layout = KVLayout(layers=layers, kv_heads=8, head_dim=128, block_tokens=32)
        with (
            tempfile.TemporaryDirectory(prefix="kvstore-vram-") as home,
            StoreNode(Path(home), memory_bytes=NODE_BYTES, slab_bytes=SLAB_BYTES) as node,
            closing(Rotation(layout, node)) as rotation,
        ):
            wrong += rotation.measure(setting.trials, times)
            blocks += (setting.trials + 1) * rotation.blocks
        ratios += [finding(size, op, times, gpu) for op in OPS]
    setting.tick(setting.trials)
    return [passed(wrong, blocks), *ratios]


PROOF = Proof(
    module="vram",
    about="Blocks from VRAM into a node's memory and back, by its worker's own copies, beside "
    f"cudaMemcpyAsync from and to pinned memory, block by block. {BATCH} blocks a call, calls to "
    "the node included. Trials are turns through all blocks.",
    claims=(
        Claim("blocks that came back to VRAM with other bytes", "blocks", "0"),
        *(
            Claim(f"{op} of {BATCH} blocks of {_name(size)}", "of cudaMemcpy", f">= {LEAST_RATIO}")
            for size in LAYERS
            for op in OPS
        ),
    ),
    trials={"test": 1, "short": 5, "long": 20},
    run=run,
)

if __name__ == "__main__":
    main(PROOF)

"""A disk tier behind a link of a known speed: how long blocks take to go there and back."""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from kvstore.api.clock import SystemClock
from kvstore.api.tier import Block, BlockRef, Load
from kvstore.codec import NO_LOSS
from kvstore.files import DirectoryFiles
from kvstore.metrics import Metrics
from kvstore.runner import ThreadRunner
from kvstore.spaces import Spaces
from kvstore.tier_codec import TierCodec
from kvstore.tiers.disk import DiskTier

SEGMENT_BYTES = 32 << 20
SYNC_AFTER_S = 3600.0
CLOSE_S = 5.0
WARM_BLOCKS = 8
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where files are memory, on most machines; else in the place for temporary ones."""
_NAMESPACE = hashlib.sha256(b"one tenant").digest()


class SlowFiles(DirectoryFiles):
    """Files in memory, of which `bytes_per_s` are read or written; 0: as fast as memory is."""

    def __init__(self, home: Path, bytes_per_s: float) -> None:
        super().__init__(home, direct=False)
        self._bytes_per_s = bytes_per_s

    def read_into(self, handle: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._wait(buffers)
        return super().read_into(handle, buffers, offset)

    def write(self, handle: int, buffers: Sequence[memoryview], offset: int) -> None:
        self._wait(buffers)
        super().write(handle, buffers, offset)

    def _wait(self, buffers: Sequence[memoryview]) -> None:
        if self._bytes_per_s:
            time.sleep(sum(map(len, buffers)) / self._bytes_per_s)


async def put_and_get_s(codec: str, blocks: Sequence[bytes], bytes_per_s: float) -> float:
    """How long it takes to store blocks and load them again, one by one, once the codec is chosen.

    The first `WARM_BLOCKS` of them are moved before, for whoever measures.
    """
    metrics, spaces = Metrics(), Spaces()
    spaces.learn(_NAMESPACE, bytes(32), "bfloat16")
    chosen = TierCodec(DiskTier.name, codec, NO_LOSS, spaces, SystemClock(), metrics)
    with TemporaryDirectory(dir=MEMORY) as home:
        return await _timed(SlowFiles(Path(home), bytes_per_s), chosen, blocks, metrics)


async def _timed(
    files: SlowFiles, codec: TierCodec, blocks: Sequence[bytes], metrics: Metrics
) -> float:
    runner = ThreadRunner(1)
    tier = await DiskTier.open(
        files, codec, runner, SystemClock(), metrics,
        capacity_bytes=2 * sum(map(len, blocks)) + 8 * SEGMENT_BYTES, segment_bytes=SEGMENT_BYTES,
        sync_after_s=SYNC_AFTER_S, on_sealed=lambda *sealed: None,
    )  # fmt: skip
    try:
        await _move(tier, blocks[:WARM_BLOCKS], "warm")
        started = time.perf_counter()
        await _move(tier, blocks, "timed")
        return time.perf_counter() - started
    finally:
        await tier.close()
        await runner.close(CLOSE_S)
        files.shut()


async def _move(tier: DiskTier, blocks: Sequence[bytes], word: str) -> None:
    into = memoryview(bytearray(len(blocks[0])))
    for number, data in enumerate(blocks):
        ref = BlockRef(_NAMESPACE, hashlib.sha256(f"{word} {number}".encode()).digest())
        assert await tier.store([Block(ref, None, bytes(16), memoryview(data))]) == [True]
        assert await tier.load([Load(ref, into)]) != [None]
        assert into == data

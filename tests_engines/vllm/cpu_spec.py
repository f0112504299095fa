"""Offloading on a CPU, for tests only. The copies are ours: vLLM's own engine needs a GPU.

vLLM refuses `TieringOffloadingSpec` on the CPU platform, because its worker copies by CUDA or XPU.
Everything else in it does not care: the connector, the scheduler's half, the primary tier, the
tiers below. So this spec replaces the worker, and nothing else, by one that copies with numpy
between the pages of the KV cache and the rows of the primary tier. It says nothing about how fast
vLLM offloads.
"""

import numpy as np
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CPUWorker(OffloadingWorker):
    """Copies at once, in the worker's own thread."""

    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        self._region = region
        self._pages = [
            tensor.tensor.view(tensor.tensor.shape[0], -1).numpy().view(np.int8)
            for tensor in kv_caches.tensors
        ]
        self._rows = [
            region.create_next_worker_view(tensor.page_size_bytes).numpy()
            for tensor in kv_caches.tensors
        ]
        self._refs = kv_caches.group_data_refs
        self._finished: list[TransferResult] = []

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        """From the KV cache to the primary tier."""
        return self._copy(job_id, src_spec, dst_spec, is_store=True)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        """From the primary tier to the KV cache."""
        return self._copy(job_id, dst_spec, src_spec, is_store=False)

    def get_finished(self) -> list[TransferResult]:
        """All that was submitted since the last time."""
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever under way."""

    def shutdown(self) -> None:
        """Lets go of the primary tier."""
        self._rows.clear()
        self._region.cleanup()

    def _copy(
        self, job_id: int, blocks: GPULoadStoreSpec, chunks: LoadStoreSpec, *, is_store: bool
    ) -> bool:
        assert isinstance(chunks, CPULoadStoreSpec)
        assert len(blocks.block_ids) == len(chunks.chunk_ids), "one block is one chunk here"
        start = size = 0
        for count, refs in zip(blocks.group_sizes, self._refs, strict=True):
            pairs = zip(
                blocks.block_ids[start : start + count],
                chunks.chunk_ids[start : start + count],
                strict=True,
            )
            for block, chunk in pairs:
                for ref in refs:
                    page = self._pages[ref.tensor_idx][block, : ref.page_size_bytes]
                    row = self._rows[ref.tensor_idx][chunk, : ref.page_size_bytes]
                    if is_store:
                        row[:] = page
                    else:
                        page[:] = row
                    size += ref.page_size_bytes
            start += count
        self._finished.append(TransferResult(job_id, True, size, 1e-6))
        return True


class CPUTieringSpec(TieringOffloadingSpec):
    """`TieringOffloadingSpec` whose worker copies with the CPU."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """A worker that copies with numpy; chunks are single blocks."""
        assert self.blocks_per_chunk == 1, "blocks_per_chunk: only 1 on a CPU"
        assert not self.config.canonical_layout, "canonical_layout: not on a CPU"
        region = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return CPUWorker(kv_caches, region)

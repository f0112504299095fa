"""The pages of one KV cache group as bytes, and copies between them and whole blocks.

Torch is the engine's own. On a CPU numpy copies (it drops the interpreter's lock and spreads no
small copy over threads); on a GPU the copies are enqueued on the current stream.
"""

from collections.abc import Sequence
from typing import Any

import torch

from kvstore_client.vllm.metadata import Pages


class GroupPages:
    """Pages of `page_bytes`, in one or more runs of memory each.

    `layers` is, for each layer, a view of its pages as bytes: one row for each page, the bytes of
    a row adjacent. Layers whose rows follow each other in memory are copied as one.
    """

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        self._runs = _merged(layers)
        self.page_bytes = sum(run.shape[1] for run in self._runs)
        self.page_count = int(layers[0].shape[0])
        self.device = layers[0].device
        self._arrays: list[Any] = (
            [run.numpy() for run in self._runs] if self.device.type == "cpu" else []
        )

    @property
    def runs(self) -> int:
        """How many copies a page takes."""
        return len(self._runs)

    def gather(self, blocks: Sequence[Pages], buffers: Sequence[torch.Tensor]) -> None:
        """Copies each block's pages into its buffer, zeros for a page that is not there.

        On a GPU the copies have only been enqueued when this returns.
        """
        for pages, buffer in zip(blocks, buffers, strict=True):
            out = buffer.view(len(pages), self.page_bytes)
            if self._arrays:
                self._gather_here(pages, out.numpy())
            else:
                self._gather_device(pages, out)

    def scatter(self, buffers: Sequence[torch.Tensor], blocks: Sequence[Pages]) -> None:
        """Copies each buffer into its block's pages, but for those that are not there.

        On a GPU the copies have only been enqueued when this returns.
        """
        for pages, buffer in zip(blocks, buffers, strict=True):
            rows = buffer.view(len(pages), self.page_bytes)
            if self._arrays:
                self._scatter_here(rows.numpy(), pages)
            else:
                self._scatter_device(rows, pages)

    def _gather_here(self, pages: Pages, out: Any) -> None:
        for row, page in enumerate(pages):
            start = 0
            for array in self._arrays:
                end = start + array.shape[1]
                out[row, start:end] = array[page] if page else 0
                start = end

    def _scatter_here(self, rows: Any, pages: Pages) -> None:
        for row, page in enumerate(pages):
            start = 0
            for array in self._arrays:
                end = start + array.shape[1]
                if page:
                    array[page] = rows[row, start:end]
                start = end

    def _gather_device(self, pages: Pages, out: torch.Tensor) -> None:
        if len(self._runs) == 1:
            for row, page in enumerate(pages):
                if page:
                    out[row].copy_(self._runs[0][page], non_blocking=True)
        else:
            here = torch.empty(out.shape, dtype=torch.uint8, device=self.device)
            index = self._index(pages)
            start = 0
            for run in self._runs:
                end = start + run.shape[1]
                here[:, start:end] = run.index_select(0, index)
                start = end
            out.copy_(here, non_blocking=True)
        for row in (row for row, page in enumerate(pages) if not page):
            out[row].copy_(torch.zeros_like(out[row], device=self.device), non_blocking=True)

    def _scatter_device(self, rows: torch.Tensor, pages: Pages) -> None:
        present = [row for row, page in enumerate(pages) if page]
        if len(self._runs) == 1:
            for row in present:
                self._runs[0][pages[row]].copy_(rows[row], non_blocking=True)
        elif present:
            here = rows.to(self.device, non_blocking=True).index_select(0, self._index(present))
            index = self._index([pages[row] for row in present])
            start = 0
            for run in self._runs:
                end = start + run.shape[1]
                run.index_copy_(0, index, here[:, start:end])
                start = end

    def _index(self, values: Sequence[int]) -> torch.Tensor:
        # From pinned memory: any other copy would wait for all that is enqueued before it.
        index = torch.tensor(values, pin_memory=self.device.type == "cuda")
        return index.to(self.device, non_blocking=True)


def page_views(cache: torch.Tensor, page_count: int, page_bytes: int) -> torch.Tensor:
    """The pages of one layer's cache as rows of bytes. Raises ValueError if they are not that.

    `cache` has one or more kernel blocks for each page, as its first axis.
    """
    if cache.shape[0] % page_count:
        raise ValueError(f"{cache.shape[0]} kernel blocks for {page_count} pages")
    kernel_blocks = cache.shape[0] // page_count
    item = cache.element_size()
    stride = cache.stride(0) * item * kernel_blocks
    split = kernel_blocks > 1 and stride != page_bytes
    if split or stride < page_bytes or (cache.dim() > 2 and not _dense(cache[0])):
        raise ValueError(
            "a page is not one run of bytes; set VLLM_KV_CACHE_LAYOUT to a layout whose outer "
            "axes are layer and block (BLHNC, BLNHC, LBHNC, LBNHC)"
        )
    rows = torch.empty(0, dtype=torch.uint8, device=cache.device)
    return rows.set_(
        cache.untyped_storage(),
        cache.storage_offset() * item,
        (page_count, page_bytes),
        (stride, 1),
    )


def _dense(page: torch.Tensor) -> bool:
    """Whether the elements fill one run of memory, in whatever order."""
    axes = sorted(
        (stride, size) for stride, size in zip(page.stride(), page.shape, strict=True) if size > 1
    )
    expected = 1
    for stride, size in axes:
        if stride != expected:
            return False
        expected *= size
    return True


def _merged(layers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The layers' rows, those joined that lie side by side."""
    runs = [layers[0]]
    for layer in layers[1:]:
        if _adjoins(runs[-1], layer):
            width = runs[-1].shape[1] + layer.shape[1]
            runs[-1] = runs[-1].as_strided((layer.shape[0], width), (layer.stride(0), 1))
        else:
            runs.append(layer)
    return runs


def _adjoins(run: torch.Tensor, layer: torch.Tensor) -> bool:
    return (
        run.untyped_storage().data_ptr() == layer.untyped_storage().data_ptr()
        and run.stride(0) == layer.stride(0)
        and run.storage_offset() + run.shape[1] == layer.storage_offset()
        and run.shape[1] + layer.shape[1] <= layer.stride(0)
    )

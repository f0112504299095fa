"""Pages of SGLang's host pool, as the bytes that make up a block.

A page's K and V, or in some layouts those of each layer, lie apart in the pool. A block is a whole
page, one part after the other, so that no half of one is ever stored, found or lost:

    pool    │ K of page 0 │ K of page 1 │ …  │ V of page 0 │ V of page 1 │ …
    block   │ K of page 0 │ V of page 0 │
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Parts = list[Bytes]
"""Where the bytes of one block lie, in its order."""

_SHAPE = ("head_num", "head_dim", "v_head_dim", "kv_lora_rank", "qk_rope_head_dim", "kv_cache_dim")


class HostPages:
    """The pages of one host pool, which outlives whatever is read or written through here."""

    def __init__(self, pool: Any, cuts: int = 1) -> None:
        """`cuts`: into how many ranges of heads a page is cut, each of them a block.

        Raises ValueError for a pool whose pages cannot be kept.
        """
        self._pool = pool
        self.cuts = cuts
        self.page_tokens: int = getattr(pool, "logical_page_size", pool.page_size)
        self.dtype = str(pool.dtype).removeprefix("torch.")
        self.layout = f"{type(pool).__name__} {pool.layout}"
        self.layers = f"{pool.start_layer}-{pool.end_layer} of {pool.layer_num}"
        self.shape = _shape(pool, cuts)
        self.has_draft_layers = pool.layer_num != getattr(pool, "target_layer_num", pool.layer_num)
        try:
            samples = self.blocks(torch.arange(self.page_tokens))
        except (
            NotImplementedError,
            TypeError,
            AttributeError,
            ValueError,
            AssertionError,
        ) as error:
            raise ValueError(f"{self.layout}: its pages cannot be stored ({error})") from None
        self.block_bytes = sum(part.nbytes for part in samples[0][0])
        """Of one page, or of one of its cuts, which are alike."""

    def blocks(self, indices: torch.Tensor) -> list[list[Parts]]:
        """For each cut the blocks of the pages whose tokens lie at these indices of the pool."""
        addresses, sizes = self._addresses(indices)
        pages = len(indices) // self.page_tokens
        each = len(addresses) // pages
        if len(sizes) != len(addresses) or each * pages != len(addresses) or each % self.cuts:
            raise ValueError(f"{len(addresses)} parts and {len(sizes)} sizes of {pages} pages")
        parts = [bytes_at(*place) for place in zip(addresses, sizes, strict=True)]
        wide = each // self.cuts
        order = self._order(wide)
        return [
            [
                [parts[first + place] for place in order]
                for first in range(cut * wide, len(parts), each)
            ]
            for cut in range(self.cuts)
        ]

    def _addresses(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        if self.cuts > 1:
            found = self._pool.get_split_heads_page_buffer_meta(indices, self.cuts)
        else:
            found = self._pool.get_page_buffer_meta(indices)
        addresses, sizes = found
        return list(addresses), list(sizes)

    def _order(self, parts: int) -> Sequence[int]:
        """SGLang alternates K and V layer by layer; in its flat pages all of K comes first."""
        if self._pool.layout == "layer_first" and parts == 2 * self._pool.layer_num:
            return [*range(0, parts, 2), *range(1, parts, 2)]
        return range(parts)


def _shape(pool: Any, cuts: int) -> str:
    """What the order of the bytes depends on beside the layout, for one cut."""
    shape = {name: getattr(pool, name) for name in _SHAPE if hasattr(pool, name)}
    if cuts > 1:
        shape["head_num"] //= cuts
    return " ".join(f"{name} {size}" for name, size in shape.items())


def bytes_at(address: int, size: int) -> Bytes:
    """Memory of the caller's, without a copy and without a hold on it."""
    return np.frombuffer(memoryview((ctypes.c_ubyte * size).from_address(address)), np.uint8)


def bytes_of(page: torch.Tensor) -> Bytes:
    """A flat page's memory, without a copy. Raises ValueError unless it lies in one piece here."""
    if not page.is_contiguous() or page.device.type != "cpu":
        raise ValueError("page: contiguous host memory is needed")
    return bytes_at(page.data_ptr(), page.nbytes)


def gather(parts: Parts, block: Bytes) -> None:
    """Fills a block from a page. The interpreter's lock is dropped during large copies."""
    at = 0
    for part in parts:
        block[at : at + part.nbytes] = part
        at += part.nbytes


def scatter(block: Bytes, parts: Parts) -> None:
    """Fills a page from a block."""
    at = 0
    for part in parts:
        part[:] = block[at : at + part.nbytes]
        at += part.nbytes

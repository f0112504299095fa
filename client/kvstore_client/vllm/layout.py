"""How vLLM's KV cache groups become spaces: one chain, one unit, one match rule for each group."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
from vllm.v1.kv_cache_interface import (
    KVCacheSpecKind,
    get_kv_cache_spec_kind,
    iter_layer_specs,
)

from kvstore.api.space import MatchRule
from kvstore_client.vllm.metadata import Pages

_ALL = {
    KVCacheSpecKind.FULL_ATTENTION,
    KVCacheSpecKind.MLA_ATTENTION,
    KVCacheSpecKind.SINK_FULL_ATTENTION,
}
_WINDOW = {KVCacheSpecKind.SLIDING_WINDOW, KVCacheSpecKind.SLIDING_WINDOW_MLA}


@dataclass(frozen=True, slots=True)
class Group:
    """One KV cache group of the engine, as a space sees it."""

    group_id: int
    """vLLM's number of it."""
    layers: tuple[str, ...]
    rule: MatchRule
    trailing_blocks: int
    pages: int
    """Pages in one of our blocks."""
    spare_pages: int
    """Of these the first, which no hit needs: they lie before the window."""
    stride: int
    """Pages of the group's block table in one unit."""
    offered: bool = False
    """States are where the engine offers them, and nowhere else."""
    spec: str = ""
    """All that vLLM says of the group's pages: heads, sizes, element types."""

    def block_pages(self, table: Sequence[int], index: int) -> Pages:
        """The pages of block `index` in a request's block table, those behind its end as 0."""
        end = (index + 1) * self.stride
        pages = tuple(table[end - self.pages : end])
        return pages + (0,) * (self.pages - len(pages))

    def complete(self, pages: Pages) -> bool:
        """Whether all that a hit could need of a block is there."""
        return all(pages[self.spare_pages :])


@dataclass(frozen=True, slots=True)
class Layout:
    """The groups whose blocks are stored, all over one chain of keys."""

    unit_tokens: int
    """Tokens in a block of the chain: the least that all groups' pages fit into."""
    hashes_per_unit: int
    """Block hashes of vLLM in one unit."""
    groups: tuple[Group, ...]
    outputs: bool
    """Whether an answer's KV depends on its chain alone."""
    single: bool
    """Whether vLLM can be told of single pages that failed to load: it has one group in all."""

    @property
    def divisible(self) -> bool:
        """Whether every shorter hit is a hit as well."""
        return all(group.rule is MatchRule.ALL for group in self.groups)


def layout_of(vllm_config: Any, kv_cache_config: Any) -> Layout:
    """The layout of an engine's KV cache; the same in its scheduler and in its workers.

    Raises ValueError for groups that cannot be stored.
    """
    unit_tokens, hash_tokens = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
    if unit_tokens % hash_tokens:
        raise ValueError(f"blocks of {unit_tokens} tokens, hashes of {hash_tokens}")
    groups = tuple(
        _group(number, kv_cache_config.kv_cache_groups[number], unit_tokens)
        for number in kv_cache_config.prefix_cacheable_group_ids
    )
    if not groups:
        raise ValueError("this model has no KV cache group that could be stored")
    single = len(kv_cache_config.kv_cache_groups) == 1
    # Where generated tokens see the prompt and a window (R-SWA) it matters where the prompt ended.
    outputs = not any(
        hasattr(spec, "rswa_window")
        for number in kv_cache_config.prefix_cacheable_group_ids
        for spec in iter_layer_specs(kv_cache_config.kv_cache_groups[number].kv_cache_spec)
    )
    return Layout(unit_tokens, unit_tokens // hash_tokens, groups, outputs, single)


def _group(number: int, group: Any, unit_tokens: int) -> Group:
    spec = next(iter(iter_layer_specs(group.kv_cache_spec)))
    kind = get_kv_cache_spec_kind(group.kv_cache_spec)
    page_tokens = spec.block_size
    if unit_tokens % page_tokens:
        raise ValueError(f"group {number}: pages of {page_tokens} tokens in {unit_tokens}")
    stride = unit_tokens // page_tokens
    layers = tuple(group.layer_names)
    if kind in _ALL:
        return Group(number, layers, MatchRule.ALL, 0, stride, 0, stride, spec=repr(spec))
    if kind is KVCacheSpecKind.MAMBA:
        if spec.mamba_cache_mode == "none":
            raise ValueError(
                "recurrent states are kept at block boundaries only with prefix caching: "
                "add --enable-prefix-caching (enable_prefix_caching=True)"
            )
        offered = spec.mamba_cache_mode == "align"
        return Group(number, layers, MatchRule.BOUNDARY, 0, 1, 0, stride, offered, repr(spec))
    if kind in _WINDOW:
        reach = spec.sliding_window - 1 + spec.extra_retained_tokens
    elif kind is KVCacheSpecKind.CHUNKED_LOCAL_ATTENTION:
        reach = spec.attention_chunk_size
    else:
        raise ValueError(f"group {number}: KV caches of kind {kind.value} are not supported")
    reach = max(1, reach)
    needed = math.ceil(min(reach, unit_tokens) / page_tokens)
    trailing = math.ceil(reach / unit_tokens)
    spare = stride - needed
    return Group(
        number, layers, MatchRule.TRAILING, trailing, stride, spare, stride, spec=repr(spec)
    )

"""Attention over the VRAM pool, for every Llama-like model of transformers.

A forward call carries a `Plan` down to each attention layer. The layer writes the call's new keys
(after RoPE) and values into the plan's slots and then reads each row's own blocks. Rows are
computed one by one and at their exact length, so that no row's result depends on its neighbours.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

from kvstore_workers.vram import VramPool

NAME = "kvstore_paged"
"""For `attn_implementation`. No mask is registered under it, so transformers builds none."""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """What one row of the batch reads."""

    table: torch.Tensor
    """The blocks of its context in order; int64 [ceil(length / block_tokens)]."""
    length: int
    """Tokens of its context, the new ones included."""
    mask: torch.Tensor | None
    """Added to the scores; [groups * new tokens, length]. None: each new token sees all that is
    before it, and itself."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Where one forward call writes and what it reads. Rows behind the listed ones are padding."""

    vram: VramPool
    write_blocks: torch.Tensor
    """The block of each new token, row by row; int64 [rows * new tokens]."""
    write_slots: torch.Tensor
    """Its place inside the block; int64, same shape."""
    rows: tuple[Row, ...]


def register() -> None:
    """Makes the attention known to transformers, whose registry is global. Idempotent."""
    AttentionInterface.register(NAME, paged_attention)


def causal_mask(
    start: int, end: int, groups: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """The mask of tokens `start` … `end` over their prefix and themselves; None where none is used.

    Shape [groups * (end - start), end], 0 or -inf: the query heads that share a KV head stand
    below each other, which spares copying keys and values for each of them. A GPU has kernels
    that know both by themselves and never write the scores down.
    """
    if device.type == "cuda":
        return None
    hidden = torch.ones((end - start, end), dtype=torch.bool, device=device).triu(start + 1)
    mask = torch.zeros((end - start, end), dtype=dtype, device=device)
    return mask.masked_fill_(hidden, float("-inf")).repeat(groups, 1)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    plan: Plan,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention output, [batch, new tokens, heads, head_dim]; zeros in padded rows.

    `query` is [batch, heads, new tokens, head_dim], `key` and `value` the same with kv_heads.
    """
    assert attention_mask is None, "the plan alone says what a token may see"
    layer = plan.vram.layer(int(module.layer_idx))  # type: ignore[arg-type]
    _write(layer, key, value, plan)
    by_block = layer.permute(1, 2, 0, 3, 4)
    output = query.new_zeros(query.shape).transpose(1, 2).contiguous()
    for index, row in enumerate(plan.rows):
        output[index] = _attend(query[index], by_block, row, scaling)
    return output, None


def _write(layer: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan) -> None:
    live = len(plan.rows)
    new = torch.stack((key[:live], value[:live]), dim=1)  # [rows, 2, kv_heads, tokens, head_dim]
    new = new.permute(0, 3, 1, 2, 4).flatten(0, 1)
    layer[plan.write_blocks, :, :, plan.write_slots] = new


def _attend(query: torch.Tensor, by_block: torch.Tensor, row: Row, scaling: float) -> torch.Tensor:
    heads, tokens, head_dim = query.shape
    context = by_block.index_select(2, row.table).flatten(2, 3)[:, :, : row.length]
    keys, values = context
    if row.mask is None and tokens > 1:
        causal = causal_lower_right(tokens, row.length)
        output = functional.scaled_dot_product_attention(
            query[None], keys[None], values[None], causal, scale=scaling, enable_gqa=True
        )
        return output[0].transpose(0, 1)
    grouped = query.reshape(1, keys.shape[0], -1, head_dim)
    output = functional.scaled_dot_product_attention(
        grouped, keys[None], values[None], attn_mask=row.mask, scale=scaling
    )
    return output.reshape(heads, tokens, head_dim).transpose(0, 1)

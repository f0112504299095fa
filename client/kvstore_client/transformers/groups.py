"""Layers that share blocks: those of full attention, and those of each sliding window.

A block holds a chunk of tokens for all layers of its group, as [layer, key or value, head, token,
value], so that it is one piece of memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvstore.api.space import MatchRule, SpaceDescriptor

LAYOUT = "layer,kv,head,token,dim"


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """What the blocks of one group look like, and which of them a cache needs.

    Invariant: blocks are at most as long as what a layer keeps, so that each chunk can be read
    out of the cache when it has been computed.
    """

    layers: tuple[int, ...]
    window: int
    """Tokens that a token of these layers sees, itself included; 0: all."""
    heads: int
    head_dim: int
    chunk_tokens: int
    dtype: torch.dtype

    @property
    def block_shape(self) -> tuple[int, ...]:
        """[layer, key or value, head, token, value]."""
        return (len(self.layers), 2, self.heads, self.chunk_tokens, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return prod(self.block_shape) * self.dtype.itemsize

    @property
    def trailing_blocks(self) -> int:
        """How many last blocks hold what a sliding layer keeps; 0: all are needed."""
        return ceil((self.window - 1) / self.chunk_tokens) if self.window else 0

    def needed(self, blocks: int) -> range:
        """The blocks that a cache of so many blocks' tokens is made of."""
        return range(max(0, blocks - self.trailing_blocks) if self.window else 0, blocks)

    def describe(self, **common: Any) -> SpaceDescriptor:
        """The space of these layers; `common` is what all groups of a model share."""
        sliding = self.window > 0
        return SpaceDescriptor(
            dtype=str(self.dtype).removeprefix("torch."),
            layout=LAYOUT,
            block_tokens=self.chunk_tokens,
            block_bytes=self.block_bytes,
            layer_group=f"window {self.window}" if sliding else "full",
            match_rule=MatchRule.TRAILING if sliding else MatchRule.ALL,
            trailing_blocks=self.trailing_blocks,
            **common,
        )

    def gather(self, cache: DynamicCache, rows: int) -> torch.Tensor:
        """The newest chunk of each row as a block, [row, *block_shape], on the cache's device.

        Raises ValueError if the cache holds other tensors than the space was made for.
        """
        blocks: torch.Tensor | None = None
        for place, index in enumerate(self.layers):
            for half, whole in enumerate((cache.layers[index].keys, cache.layers[index].values)):
                chunk = whole[:, :, -self.chunk_tokens :]
                expected = (rows, self.heads, self.chunk_tokens, self.head_dim)
                if chunk.shape != expected or chunk.dtype != self.dtype:
                    raise ValueError(
                        f"layer {index}: {self.dtype} {expected} was expected, "
                        f"got {chunk.dtype} {tuple(chunk.shape)}"
                    )
                if blocks is None:
                    shape = (rows, *self.block_shape)
                    blocks = torch.empty(shape, dtype=self.dtype, device=chunk.device)
                blocks[:, place, half].copy_(chunk)
        if blocks is None:
            raise ValueError("a group without layers")
        return blocks


class Filling:
    """The keys and values of one group's layers, while blocks arrive for them."""

    def __init__(self, group: LayerGroup, rows: int, blocks: int, device: torch.device) -> None:
        """For a cache of so many blocks' tokens."""
        self.group = group
        self.places = group.needed(blocks)
        tokens = len(self.places) * group.chunk_tokens
        self._whole = torch.empty(
            (len(group.layers), 2, rows, group.heads, tokens, group.head_dim),
            dtype=group.dtype,
            device=device,
        )

    def staging(self, size_bytes: int) -> torch.Tensor:
        """Host memory for a few blocks on their way, at least for one."""
        count = min(max(1, size_bytes // self.group.block_bytes), len(self.places))
        shape = (count, *self.group.block_shape)
        return torch.empty(shape, dtype=self.group.dtype, pin_memory=self._whole.is_cuda)

    def put(self, row: int, first: int, blocks: torch.Tensor) -> None:
        """Consecutive blocks of one row, [block, *block_shape]; `first` counts from `places`."""
        count, layers, halves, heads, tokens, dim = blocks.shape
        whole = blocks.to(self._whole.device).permute(1, 2, 3, 0, 4, 5)
        begin = first * tokens
        self._whole[:, :, row, :, begin : begin + count * tokens] = whole.reshape(
            layers, halves, heads, count * tokens, dim
        )

    def install(self, cache: DynamicCache, blocks: int) -> None:
        """Brings the layers into the state that they have after so many blocks' tokens."""
        tokens = blocks * self.group.chunk_tokens
        kept = (blocks - self.places.start) * self.group.chunk_tokens
        for place, index in enumerate(self.group.layers):
            keys, values = self._whole[place, :, :, :, :kept]
            layer = cache.layers[index]
            layer.lazy_initialization(keys, values)
            if self.group.window:
                keys = keys[:, :, -self.group.window + 1 :]
                values = values[:, :, -self.group.window + 1 :]
                layer.cumulative_length = tokens
            layer.keys, layer.values = keys, values


def block_views(blocks: torch.Tensor) -> list[memoryview]:
    """The bytes of each block of a contiguous tensor in host memory, without a copy."""
    rows = blocks.reshape(len(blocks), -1).view(torch.uint8).numpy()
    return [memoryview(row) for row in rows]


def layer_groups(config: Any, dtype: torch.dtype, chunk_tokens: int) -> tuple[LayerGroup, ...]:
    """The groups of a model's layers, that of full attention first, then the wider windows.

    Raises ValueError, naming what it is, for a layer whose cache is another one, and for chunks
    that are longer than what a sliding layer keeps.
    """
    text = config.get_text_config(decoder=True)
    windows: dict[int, list[int]] = {}
    for index, layer in enumerate(DynamicCache(config=config).layers):
        windows.setdefault(_window(index, layer, text), []).append(index)
    for window in windows:
        if window and chunk_tokens > window - 1:
            raise ValueError(
                f"chunk_tokens: at most sliding_window - 1 = {window - 1} for this model, whose "
                f"cache keeps no more tokens; got {chunk_tokens}"
            )
    heads = text.num_key_value_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return tuple(
        LayerGroup(tuple(windows[window]), window, heads, head_dim, chunk_tokens, dtype)
        for window in sorted(windows, key=_full_first)
    )


def _full_first(window: int) -> tuple[bool, int]:
    return window != 0, -window


def _window(index: int, layer: Any, text: Any) -> int:
    types: Sequence[str] | None = getattr(text, "layer_types", None)
    kind = types[index] if types is not None else "full_attention or sliding_attention"
    if kind in ("full_attention", "sliding_attention", "full_attention or sliding_attention"):
        if type(layer) is DynamicLayer:
            return 0
        if type(layer) is DynamicSlidingWindowLayer:
            return int(layer.sliding_window)
    raise ValueError(
        f"model: layer {index} ({kind}, {type(layer).__name__}) is not one of full or "
        "sliding-window attention, and no others are supported"
    )


def check_layers(layers: Sequence[Any] | None = None) -> None:
    """Raises ImportError unless layers that blocks were installed in are as computed ones are.

    It tries that with a layer of each kind: another version of transformers may keep more, or
    keep it otherwise.
    """
    chunk_tokens, chunks = 2, 3
    for layer in layers or (DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=4)):
        window = getattr(layer, "sliding_window", 0)
        group = LayerGroup((0,), window, 1, 1, chunk_tokens, torch.float32)
        computed = DynamicCache()
        computed.layers.append(layer)
        filling = Filling(group, 1, chunks, torch.device("cpu"))
        for chunk in range(chunks):
            tokens = torch.arange(chunk_tokens, dtype=torch.float32) + chunk * chunk_tokens
            computed.update(tokens.reshape(1, 1, -1, 1), -tokens.reshape(1, 1, -1, 1), 0)
            if chunk in filling.places:
                filling.put(0, chunk - filling.places.start, group.gather(computed, 1))
        installed = DynamicCache()
        installed.layers.append(type(layer)(**({"sliding_window": window} if window else {})))
        filling.install(installed, chunks)
        _check_same(vars(computed.layers[0]), vars(installed.layers[0]), type(layer).__name__)


def _check_same(computed: dict[str, Any], installed: dict[str, Any], layer: str) -> None:
    for name in computed.keys() | installed.keys():
        one, other = computed.get(name), installed.get(name)
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            same = torch.equal(one, other)
        else:
            same = one is other or one == other
        if not same:
            raise ImportError(
                f"transformers: this version's {layer} keeps {name} otherwise than this adapter "
                "knows; use a version that it was tried with (docs/transformers.md)"
            )

"""The shape of a model's KV blocks, and the space that a checkpoint's blocks live in.

block = [layers, 2 (K, V), kv_heads, block_tokens, head_dim], contiguous
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.api.errors import ConfigError
from kvstore.api.space import SpaceDescriptor

DTYPE_BYTES: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}

_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """The geometry of one block. Raises `ConfigError`, naming the field that is out of range."""

    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for field in ("layers", "kv_heads", "head_dim", "block_tokens"):
            if getattr(self, field) < 1:
                raise ConfigError(f"layout.{field}: must be 1 or more, got {getattr(self, field)}")
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"layout.dtype: one of {', '.join(DTYPE_BYTES)}, got {self.dtype!r}")

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """The axes of one block: layers, K and V, KV heads, tokens, head dimension."""
        return self.layers, 2, self.kv_heads, self.block_tokens, self.head_dim

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        elements = 2 * self.layers * self.kv_heads * self.block_tokens * self.head_dim
        return elements * DTYPE_BYTES[self.dtype]

    @property
    def name(self) -> str:
        """What the axes and their sizes are called in a space's descriptor."""
        return (
            f"layer{self.layers}.kv2.head{self.kv_heads}.token{self.block_tokens}"
            f".dim{self.head_dim}"
        )


def read_layout(checkpoint: Path, block_tokens: int, dtype: str) -> KVLayout:
    """The layout of the KV of a Hugging Face checkpoint directory.

    Raises `ConfigError` where config.json is missing or lacks what the layout needs.
    """
    config = _read_config(checkpoint)
    try:
        heads = config["num_attention_heads"]
        return KVLayout(
            layers=config["num_hidden_layers"],
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            block_tokens=block_tokens,
            dtype=dtype,
        )
    except KeyError as error:
        raise ConfigError(f"checkpoint: {checkpoint}/config.json lacks {error}") from None


def describe_space(
    checkpoint: Path, layout: KVLayout, *, numerics: str, model: str = ""
) -> SpaceDescriptor:
    """The descriptor of the space that this checkpoint's blocks live in.

    `model` is the directory's name unless given. Reads all weights once, for the revision.
    """
    return SpaceDescriptor(
        model=model or checkpoint.resolve().name,
        revision=digest_weights(checkpoint),
        dtype=layout.dtype,
        layout=layout.name,
        block_tokens=layout.block_tokens,
        block_bytes=layout.block_bytes,
        rope_scaling=_rope_scaling(_read_config(checkpoint)),
        numerics=numerics,
    )


def digest_weights(checkpoint: Path) -> str:
    """The SHA-256, in hex, over config.json and all *.safetensors, in the order of their names.

    Each file counts with its name and length. Raises `ConfigError` where there are no weights.
    """
    weights = sorted(checkpoint.glob("*.safetensors"), key=lambda path: path.name)
    if not weights:
        raise ConfigError(f"checkpoint: no *.safetensors in {checkpoint}")
    digest = hashlib.sha256()
    for path in [checkpoint / "config.json", *weights]:
        name = path.name.encode()
        digest.update(len(name).to_bytes(8, "little") + name)
        digest.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while piece := file.read(_READ_BYTES):
                digest.update(piece)
    return digest.hexdigest()


def _read_config(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"checkpoint: cannot read {path}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"checkpoint: {path} is not a JSON object")
    return config


def _rope_scaling(config: Mapping[str, Any]) -> str:
    # transformers 5 writes `rope_parameters`, older checkpoints `rope_scaling`; plain RoPE of
    # any base is told apart by the revision, which covers config.json.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return ""
    return json.dumps(rope, sort_keys=True, separators=(",", ":"))

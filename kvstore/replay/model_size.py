"""How many bytes of KV a token takes in a model, from its Hugging Face configuration."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}
_NO_KV = ("linear_attention", "mamba", "recurrent")
"""Kinds of layers that keep a state of fixed size instead of keys and values."""


class ModelError(ValueError):
    """When a configuration does not say what is needed; names the file and the field."""


def kv_bytes_per_token(path: Path) -> int:
    """Bytes of keys and values, all layers together, in the model's own dtype.

    Latent attention (MLA: `kv_lora_rank`) keeps one latent and one rotary key per layer instead.
    """
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: is no JSON object")
    # Of a model that also sees, the part that reads text is described apart.
    text: Mapping[str, Any] = config.get("text_config") or config
    layers = _number(path, text, "num_hidden_layers")
    kinds = text.get("layer_types")
    if isinstance(kinds, list):
        layers = sum(kind not in _NO_KV for kind in kinds)
    return layers * _values_per_layer(path, text) * _value_bytes(path, text, config)


def _values_per_layer(path: Path, text: Mapping[str, Any]) -> int:
    if text.get("kv_lora_rank"):
        return _number(path, text, "kv_lora_rank") + _number(path, text, "qk_rope_head_dim")
    heads = _number(path, text, "num_attention_heads")
    kv_heads = (
        _number(path, text, "num_key_value_heads") if "num_key_value_heads" in text else heads
    )
    head_size = (
        _number(path, text, "head_dim")
        if text.get("head_dim")
        else _number(path, text, "hidden_size") // heads
    )
    return 2 * kv_heads * head_size


def _value_bytes(path: Path, text: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    for field in ("dtype", "torch_dtype"):
        dtype = text.get(field) or config.get(field)
        if dtype is not None:
            if str(dtype) not in _BYTES:
                raise ModelError(f"{path}: {field}: {dtype!r} is none of {', '.join(_BYTES)}")
            return _BYTES[str(dtype)]
    return _BYTES["bfloat16"]


def _number(path: Path, text: Mapping[str, Any], field: str) -> int:
    value = text.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(
            f"{path}: {field}: {'is missing' if value is None else f'is {value!r}'}; "
            "expected a whole number of 1 or more, or give --kv-bytes-per-token instead"
        )
    return value

"""How many bytes of KV a token takes in a model, from its Hugging Face configuration."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}

_FULL = "full_attention"
_GROWING = (_FULL, "attention", "hybrid")
"""Kinds of layers that keep keys and values of the whole prompt."""
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""Kinds that keep those of the last tokens only, each with the field that says of how many."""
_SHARED = "that use those of earlier layers"
_FIXED = ("linear_attention", "mamba", "mamba2", "recurrent", "conv", "mlp", "moe", _SHARED)
"""Kinds without keys and values of their own: a state of fixed size, or nothing."""

_PATTERN = {"*": _FULL, "M": "mamba", "-": "mlp", "E": "moe"}
"""Signs of `hybrid_override_pattern`."""
_LISTS = ("layer_types", "layers_block_type")
_EVERY = {
    "full_attention_interval": "linear_attention",
    "sliding_window_pattern": "sliding_attention",
}
"""Fields that say how many layers there are to one with full attention, with the others' kind."""
_UNREAD = ("attn_layer_period", "attn_layer_indices", "block_types")
"""Fields that say which layers have attention in ways that are not read here."""


class ModelError(ValueError):
    """When a configuration does not say what is needed; names the file and the field."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a token takes."""

    bytes_per_token: int
    """Of what grows with the prompt, all layers together."""
    counted: str
    """What that is made of and what was left out: a sentence or two."""


def model_size(path: Path) -> ModelSize:
    """Bytes of keys and values for each token, in the model's own dtype.

    Latent attention (MLA: `kv_lora_rank`) keeps one latent and one rotary key per layer instead.
    Layers with a window or a state of fixed size are left out: what they keep does not grow with
    the prompt.
    """
    config = _read(path)
    # Of a model that also sees, the part that reads text is described apart.
    text: Mapping[str, Any] = config.get("text_config") or config
    if not isinstance(text, dict):
        raise ModelError(f"{path}: text_config: is no JSON object")
    kinds = _kinds(path, text)
    growing = sum(kind in _GROWING for kind in kinds)
    if not growing:
        raise _unusable(path, "layers", "none of them keeps keys and values of the whole prompt")
    per_layer = _values_per_layer(path, text) * _value_bytes(path, text, config)
    total = growing * per_layer
    return ModelSize(total, _counted(path.name, text, kinds, growing, per_layer))


def _read(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: is no JSON object")
    return config


def _kinds(path: Path, text: Mapping[str, Any]) -> Sequence[str]:
    """The kind of each layer."""
    kinds = _named_kinds(path, text)
    # The last layers of some models use the keys and values of earlier ones.
    shared = _number(path, text, "num_kv_shared_layers") if text.get("num_kv_shared_layers") else 0
    return [*kinds[: max(0, len(kinds) - shared)], *[_SHARED] * min(shared, len(kinds))]


def _named_kinds(path: Path, text: Mapping[str, Any]) -> Sequence[str]:
    for field in _LISTS:
        if isinstance(kinds := text.get(field), list):
            return _known(path, field, kinds)
    if (pattern := text.get("hybrid_override_pattern")) is not None:
        if not isinstance(pattern, str) or not set(pattern) <= _PATTERN.keys():
            raise _unusable(path, "hybrid_override_pattern", f"is {pattern!r}, which is not known")
        return [_PATTERN[sign] for sign in pattern]
    layers = _number(path, text, "num_hidden_layers")
    for field, other in _EVERY.items():
        if text.get(field) is not None:
            every = _number(path, text, field)
            return [other if at % every else _FULL for at in range(1, layers + 1)]
    for field in _UNREAD:
        if text.get(field) is not None:
            raise _unusable(path, field, "without layer_types does not tell the kinds of layers")
    return [_FULL] * layers


def _known(path: Path, field: str, kinds: list[Any]) -> Sequence[str]:
    for kind in kinds:
        if kind not in (*_GROWING, *_WINDOWS, *_FIXED):
            raise _unusable(path, field, f"holds {kind!r}, which is not known")
    return kinds


def _counted(
    name: str, text: Mapping[str, Any], kinds: Sequence[str], growing: int, per_layer: int
) -> str:
    what = "latents" if text.get("kv_lora_rank") else "keys and values"
    layers = f"all {growing}" if growing == len(kinds) else f"{growing} of {len(kinds)}"
    said = f"{name}: {growing * per_layer:,} bytes per token: {what} of {layers} layers."
    others = Counter(kind for kind in kinds if kind not in _GROWING)
    if others:
        left = [_left_out(text, kind, count, per_layer) for kind, count in others.items()]
        said += f" Left out, because it does not grow with the prompt: {'; '.join(left)}."
    elif text.get("sliding_window") and text.get("use_sliding_window", True):
        said += (
            f" Its sliding_window of {text['sliding_window']} tokens is not considered, because it "
            "does not say which layers have it (layer_types); they would take less."
        )
    return said


def _left_out(text: Mapping[str, Any], kind: str, count: int, per_layer: int) -> str:
    window = text.get(_WINDOWS.get(kind, ""))
    if isinstance(window, int):
        most = f"{count * window * per_layer:,} bytes for each prompt"
        return f"{count} {kind}, the last {window:,} tokens, at most {most}"
    return f"{count} {kind}"


def _values_per_layer(path: Path, text: Mapping[str, Any]) -> int:
    if text.get("kv_lora_rank"):
        return _number(path, text, "kv_lora_rank") + _number(path, text, "qk_rope_head_dim")
    heads = _number(path, text, "num_attention_heads")
    # Null is how configurations say: as many as there are heads.
    grouped = text.get("num_key_value_heads") is not None
    kv_heads = _number(path, text, "num_key_value_heads") if grouped else heads
    for field in ("head_dim", "attention_head_dim"):
        if text.get(field):
            return 2 * kv_heads * _number(path, text, field)
    hidden = _number(path, text, "hidden_size")
    if hidden < heads:
        raise _unusable(path, "hidden_size", f"is {hidden} for {heads} heads")
    return 2 * kv_heads * (hidden // heads)


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
        problem = "is missing" if value is None else f"is {value!r}"
        raise _unusable(path, field, f"{problem}; expected a whole number of 1 or more")
    return value


def _unusable(path: Path, field: str, problem: str) -> ModelError:
    return ModelError(f"{path}: {field}: {problem}; give --kv-bytes-per-token instead")

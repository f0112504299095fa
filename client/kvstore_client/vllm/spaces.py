"""The spaces of an engine: all that the bytes of its KV cache depend on beside the tokens."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvstore.api.space import SpaceDescriptor
from kvstore_client.engine.process import started_ns
from kvstore_client.engine.weights import model_revision, weights_changed_ns
from kvstore_client.vllm.layout import Group, Layout
from kvstore_client.vllm.metadata import Handshake

_NAMES = {"_name_or_path", "transformers_version"}
"""Fields of a model's configuration that say where it came from and not what it computes."""
_WITHOUT_PAGES = {"ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator"}
"""Ways to guess the next tokens without a KV cache."""
_MEDIA = (
    "media_io_kwargs", "mm_processor_kwargs", "mm_device_do_normalize", "mm_encoder_attn_dtype",
    "mm_encoder_fp8_scale_path", "video_pruning_rate", "video_pruning_method",
)  # fmt: skip
"""Settings that decide what a model sees of media."""
_MAX_TEXT = {"layout": 256, "rope_scaling": 1024, "numerics": 256, "quantization": 256}


def revision_of(vllm_config: Any, given: str) -> str:
    """What names all weights that write to the KV cache. Reads a local checkpoint whole.

    Raises ValueError if they have no name.
    """
    model = vllm_config.model_config
    if not given and str(vllm_config.load_config.load_format) == "dummy":
        raise ValueError("load_format dummy: these weights have no name; set model_revision")
    revision = given or _as_loaded(model)
    draft = _draft_model(vllm_config)
    if draft is not None and draft.model != model.model:
        revision = _digest(revision, _as_loaded(draft))
    return revision


def _as_loaded(model: Any) -> str:
    """What names the weights that this process has loaded; the files are read after it did."""
    revision, path = model_revision(model.model, model.revision), Path(model.model)
    if path.exists() and weights_changed_ns(path) > started_ns():
        raise ValueError(
            f"{path}: its files were changed after the engine's process began, so the weights that "
            "it has loaded have no certain name; start it again, or set model_revision"
        )
    return revision


def spaces_of(
    vllm_config: Any, layout: Layout, handshake: Handshake, revision: str, ranks: int
) -> tuple[SpaceDescriptor, ...]:
    """The descriptor of each group's space, of the first of `ranks` different ones."""
    common = _common(vllm_config, handshake, revision)
    return tuple(
        SpaceDescriptor(
            **common,
            block_tokens=layout.unit_tokens,
            block_bytes=block_bytes,
            layer_group=_layer_group(group),
            match_rule=group.rule,
            trailing_blocks=group.trailing_blocks,
            tp_size=ranks,
        )
        for group, block_bytes in zip(layout.groups, handshake.block_bytes, strict=True)
    )


def of_rank(descriptor: SpaceDescriptor, rank: int) -> SpaceDescriptor:
    """The same space of another rank."""
    return replace(descriptor, tp_rank=rank)


def _common(vllm_config: Any, handshake: Handshake, revision: str) -> dict[str, Any]:
    model, cache = vllm_config.model_config, vllm_config.cache_config
    computed = str(model.dtype).removeprefix("torch.")
    stored = computed if cache.cache_dtype == "auto" else str(cache.cache_dtype)
    config = _config(model)
    rope = {name: value for name, value in config.items() if "rope" in name and value is not None}
    return {
        "model": _model_name(str(model.model)),
        "revision": revision,
        "dtype": stored,
        "layout": _short("layout", handshake.layout),
        "rope_scaling": _short("rope_scaling", _json(rope | _rope_length(rope, model))),
        "quantization": _short("quantization", str(model.quantization or "")),
        "numerics": _short(
            "numerics",
            f"{computed} {cache.prefix_caching_hash_algo} "
            f"{_digest(_json(config), _json(_changes(vllm_config)))[:32]}",
        ),
    }


def _changes(vllm_config: Any) -> dict[str, Any]:
    """What the command line says of layers and media that the model's configuration does not."""
    model, media = vllm_config.model_config, vllm_config.model_config.multimodal_config
    said = {
        "quantization_config": model.quantization_config,
        "skipped": sorted(map(str, vllm_config.cache_config.kv_cache_dtype_skip_layers)),
    }
    # A request's hashes cover its media and its own settings, not how the engine reads them.
    said |= {name: getattr(media, name) for name in _MEDIA} if media is not None else {}
    return {name: value for name, value in said.items() if value}


def _rope_length(rope: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """LongRoPE has other factors where the engine may go beyond the length of training."""
    long = any(name in _json(rope) for name in ("longrope", '"su"'))
    return {"max_model_len": model.max_model_len} if long else {}


def _model_name(model: str) -> str:
    """A path says where a checkpoint lies; what it is, its revision says."""
    return (Path(model).resolve().name if Path(model).exists() else model)[-256:] or "model"


def _config(model: Any) -> Mapping[str, Any]:
    """What the model's configuration says, overrides of the command line included."""
    values = model.hf_text_config.to_dict()
    return {name: value for name, value in values.items() if name not in _NAMES}


def _layer_group(group: Group) -> str:
    return f"{len(group.layers)} layers {_digest(group.spec, *group.layers)[:32]}"


def has_draft_model(vllm_config: Any) -> bool:
    """Whether another model writes to the KV cache as well."""
    return _draft_model(vllm_config) is not None


def _draft_model(vllm_config: Any) -> Any:
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method in _WITHOUT_PAGES:
        return None
    return speculative.draft_model_config


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=str) if values else ""


def _short(field: str, text: str) -> str:
    limit = _MAX_TEXT[field]
    return text if len(text) <= limit else f"sha256:{_digest(text)}"


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part.encode()).to_bytes(8, "little"))
        digest.update(part.encode())
    return digest.hexdigest()

"""What the tier has to know of the engine that it serves, and what it refuses to serve.

vLLM hands a tier a part of its settings only; the rest decides what the KV is, or how sound the
names of its chunks are.
"""

import hashlib
import json
import platform
import sys
from contextvars import ContextVar
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.version import __version__, __version_tuple__

from kvstore.api.space import SpaceDescriptor
from kvstore_client.engine.weights import model_revision
from kvstore_client.space import Space
from kvstore_client.vllm_tier.groups import Group
from kvstore_client.vllm_tier.options import TierOptions

SUPPORTED = (0, 32)
SOUND_HASHES = ("sha256", "sha256_cbor")
_SAYS_NOTHING = {"_name_or_path", "transformers_version", "architectures"}
"""Of a model's configuration: where it lies and who wrote it down."""

connector_settings: ContextVar[VllmConfig | None] = ContextVar("kvstore_tier_settings")
"""Set while a `KVStoreOffloadingConnector` builds its tiers: it also tells them of adapters."""


def check_version() -> None:
    """Raises RuntimeError for a vLLM whose interfaces are not known to be those used here."""
    if tuple(__version_tuple__[:2]) != SUPPORTED:
        wanted = ".".join(map(str, SUPPORTED))
        raise RuntimeError(
            f"KVStoreTier works with vLLM {wanted}, this is {__version__}; "
            f"install another version of kvstore-llm, or vllm=={wanted}.*"
        )


def engine_settings() -> VllmConfig:
    """The settings of the engine that is building the tier.

    They are not among what a tier is given, but its callers have them. Raises RuntimeError where
    that is not so.
    """
    settings = connector_settings.get(None)
    frame = sys._getframe(1)
    while settings is None and frame is not None:
        found = frame.f_locals.get("vllm_config")
        settings = found if isinstance(found, VllmConfig) else None
        frame = frame.f_back  # type: ignore[assignment]
    if settings is None:
        raise RuntimeError(
            "KVStoreTier has to know the engine's settings and finds them nowhere; use "
            '"kv_connector": "KVStoreOffloadingConnector" with '
            '"kv_connector_module_path": "kvstore_client.vllm_tier"'
        )
    return settings


def check_settings(settings: VllmConfig) -> None:
    """Raises ValueError for an engine to which stored KV could be given back wrongly."""
    algorithm = settings.cache_config.prefix_caching_hash_algo
    if algorithm not in SOUND_HASHES:
        raise ValueError(
            f"prefix_caching_hash_algo: {algorithm} names other chunks in each process and is no "
            "protection against collisions; use sha256_cbor"
        )
    if settings.lora_config is not None and connector_settings.get(None) is None:
        raise ValueError(
            "enable_lora: vLLM tells a tier nothing of adapters, and replaced weights would get "
            'stale KV; use "kv_connector": "KVStoreOffloadingConnector" with '
            '"kv_connector_module_path": "kvstore_client.vllm_tier", which does'
        )
    if getattr(settings.cache_config, "calculate_kv_scales", False):
        raise ValueError("calculate_kv_scales: another process would read the KV with other scales")


def groups_of(
    config: OffloadingConfig, settings: VllmConfig, row_bytes: int, options: TierOptions
) -> list[Group]:
    """The KV groups, each with a space that names all its chunks depend on beside the tokens.

    A row holds all layers of the group and all ranks of this host, as vLLM lays them out; so all
    that decides the layout stands in the space.
    """
    model = settings.model_config
    geometry = _digest(
        [[group.group_id, group.tokens_per_block, group.layer_names] for group in config.groups],
        config.worker_kv_bytes_per_block,
        row_bytes,
        vars(config.parallel)
        | dict.fromkeys(("rank", "data_parallel_index", "data_parallel_size"), 0)
        | {"data_parallel_rank_local": 0},
        [config.replicated_layout, config.canonical_layout],
    )
    layout = (
        f"vllm-{SUPPORTED[0]}.{SUPPORTED[1]} row {config.kv_cache_layout} "
        f"{'canonical ' if config.canonical_layout else ''}x{config.cache.blocks_per_chunk} "
        f"{_machine()} {geometry}"
    )
    return [
        Group(
            index=group.group_id,
            space=Space.of(
                SpaceDescriptor(
                    model=(model.architectures or ["unknown"])[0],
                    revision=options.model_revision or model_revision(model.model, model.revision),
                    dtype=config.model.dtype,
                    layout=layout,
                    block_tokens=group.tokens_per_block * config.cache.blocks_per_chunk,
                    block_bytes=row_bytes,
                    layer_group=str(group.group_id),
                    tp_size=config.parallel.tp_size,
                    quantization=str(model.quantization or ""),
                    numerics=_numerics(settings),
                )
            ),
            chunk_tokens=group.tokens_per_block * config.cache.blocks_per_chunk,
        )
        for group in config.groups
    ]


def _numerics(settings: VllmConfig) -> str:
    """What else decides what the KV is: overrides of the model, a draft model, the kernels."""
    model = settings.model_config
    draft = settings.speculative_config and settings.speculative_config.draft_model_config
    backend = settings.attention_config.backend
    parts = {
        "model": {k: v for k, v in model.hf_config.to_dict().items() if k not in _SAYS_NOTHING},
        "dtype": str(model.dtype),
        "draft": model_revision(draft.model, draft.revision) if draft else "",
        "attention": getattr(backend, "name", str(backend)),
        "quantization": str(model.quantization or ""),
    }
    return f"vllm {_digest(parts)}"


def _machine() -> str:
    """What else decides the layout of a page. On a CPU its instructions do."""
    if current_platform.device_type != "cpu":
        return str(current_platform.device_type)
    amx = "amx" if torch.cpu._is_amx_tile_supported() else ""
    return f"cpu/{platform.machine()}/{torch.backends.cpu.get_cpu_capability()}/{amx}"


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]

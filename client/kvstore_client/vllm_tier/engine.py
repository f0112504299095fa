"""What the tier has to know of the engine that it serves, and what it refuses to serve.

vLLM hands a tier a part of its settings only; the rest decides what the KV is, or how sound the
names of its chunks are.
"""

import hashlib
import json
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, replace
from types import FrameType
from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    get_sliding_window_size_in_chunks,
)
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec, MambaSpec
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.version import __version__, __version_tuple__

from kvstore.api.space import MatchRule, SpaceDescriptor
from kvstore_client.engine.weights import model_revision
from kvstore_client.space import Space
from kvstore_client.vllm_tier.groups import Group
from kvstore_client.vllm_tier.options import TierOptions

SUPPORTED = (0, 32)
SOUND_HASHES = ("sha256", "sha256_cbor")
_OURS = (
    '"kv_connector": "KVStoreOffloadingConnector", '
    '"kv_connector_module_path": "kvstore_client.vllm_tier"'
)
_SAYS_NOTHING = {"_name_or_path", "transformers_version"}
"""Of a model's configuration: where it lies and who wrote it down."""
_WHICH_REPLICA = (
    "rank", "data_parallel_index", "data_parallel_size", "data_parallel_rank_local",
)  # fmt: skip
"""Replicas of an engine keep the same KV."""


class Engine(NamedTuple):
    """The engine that builds the tier, as its own configuration has it."""

    settings: VllmConfig
    kv_cache: KVCacheConfig
    names_adapters: bool = False
    """Whether each request says by which adapter's weights it is computed."""


_built: ContextVar[Engine | None] = ContextVar("kvstore_tier_engine", default=None)


@contextmanager
def building_for(engine: Engine) -> Iterator[None]:
    """Tiers that are built meanwhile are for this engine."""
    token = _built.set(engine)
    try:
        yield
    finally:
        _built.reset(token)


def check_version() -> None:
    """Raises RuntimeError for a vLLM whose interfaces are not known to be those used here."""
    if tuple(__version_tuple__[:2]) != SUPPORTED:
        wanted = ".".join(map(str, SUPPORTED))
        raise RuntimeError(
            f"KVStoreTier works with vLLM {wanted}, this is {__version__}; "
            f"install another version of kvstore-llm, or vllm=={wanted}.*"
        )


def engine_of_callers() -> Engine:
    """The engine that is building the tier.

    It is not among what a tier is given, but those who call have it: as what `building_for` says,
    or as their own variables. Raises RuntimeError where that is not so.
    """
    engine = _built.get()
    frame: FrameType | None = sys._getframe(1)
    while engine is None and frame is not None:
        settings, kv_cache = map(frame.f_locals.get, ("vllm_config", "kv_cache_config"))
        if isinstance(settings, VllmConfig) and isinstance(kv_cache, KVCacheConfig):
            engine = Engine(settings, kv_cache)
        frame = frame.f_back
    if engine is None:
        raise RuntimeError(
            f"KVStoreTier has to know the engine's settings and finds them nowhere; use {_OURS}"
        )
    return engine


def check_engine(engine: Engine) -> None:
    """Raises ValueError for an engine to which stored KV could be given back wrongly."""
    cache = engine.settings.cache_config
    if cache.prefix_caching_hash_algo not in SOUND_HASHES:
        raise ValueError(
            f"prefix_caching_hash_algo: {cache.prefix_caching_hash_algo} names a chunk otherwise "
            "in each process, and not every chunk by a name of its own; use sha256_cbor"
        )
    if engine.settings.lora_config is not None and not engine.names_adapters:
        raise ValueError(
            "enable_lora: vLLM tells a tier nothing of adapters, and one whose weights are "
            f"replaced would get stale KV; use {_OURS}, which does"
        )
    if getattr(cache, "calculate_kv_scales", False):
        raise ValueError("calculate_kv_scales: another process would read the KV by other scales")


def groups_of(
    config: OffloadingConfig, engine: Engine, row_bytes: int, options: TierOptions
) -> list[Group]:
    """The KV groups, each with a space that names all its chunks depend on beside the tokens.

    A row holds all layers of the group and all ranks of this host, as vLLM lays them out; so all
    that decides the layout stands in the space.
    """
    model = engine.settings.model_config
    geometry = _digest(
        [[group.group_id, group.tokens_per_block, group.layer_names] for group in config.groups],
        config.worker_kv_bytes_per_block,
        row_bytes,
        asdict(config.parallel) | dict.fromkeys(_WHICH_REPLICA),
        [config.replicated_layout, config.canonical_layout],
    )
    layout = (
        f"vllm-{SUPPORTED[0]}.{SUPPORTED[1]} row {config.kv_cache_layout} "
        f"{'canonical ' if config.canonical_layout else ''}x{config.cache.blocks_per_chunk} "
        f"{_machine()} {geometry}"
    )
    shared = SpaceDescriptor(
        model=(model.architectures or ["unknown"])[0],
        revision=options.model_revision or model_revision(model.model, model.revision),
        dtype=config.model.dtype,
        layout=layout,
        block_tokens=1,
        block_bytes=row_bytes,
        tp_size=config.parallel.tp_size,
        quantization=str(model.quantization or ""),
        numerics=_numerics(engine.settings),
    )
    groups = []
    for group in config.groups:
        chunk_tokens = group.tokens_per_block * config.cache.blocks_per_chunk
        kv_spec = engine.kv_cache.kv_cache_groups[group.group_id].kv_cache_spec
        rule, trailing = _rule(kv_spec, chunk_tokens)
        descriptor = replace(
            shared,
            block_tokens=chunk_tokens,
            layer_group=str(group.group_id),
            match_rule=rule,
            trailing_blocks=trailing,
        )
        groups.append(Group(group.group_id, Space.of(descriptor), chunk_tokens))
    return groups


def _rule(kv_spec: KVCacheSpec, chunk_tokens: int) -> tuple[MatchRule, int]:
    """Which chunks before its end a restore needs; of a window, so many as vLLM asks for."""
    window = get_sliding_window_size_in_chunks(kv_spec, chunk_tokens)
    if window is None:
        return MatchRule.ALL, 0
    if isinstance(kv_spec, MambaSpec):
        return MatchRule.BOUNDARY, 0
    return MatchRule.TRAILING, window


def _numerics(settings: VllmConfig) -> str:
    """What else decides what the KV is: overrides of the model, a draft model, the kernels."""
    model = settings.model_config
    draft = settings.speculative_config and settings.speculative_config.draft_model_config
    backend = settings.attention_config.backend
    parts = {
        "model": _telling(model.hf_config.to_dict()),
        "dtype": str(model.dtype),
        "draft": model_revision(draft.model, draft.revision) if draft else "",
        "attention": getattr(backend, "name", str(backend)),
        "quantization": str(model.quantization or ""),
    }
    return f"vllm {_digest(parts)}"


def _telling(settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {k: _telling(v) for k, v in settings.items() if k not in _SAYS_NOTHING}


def _machine() -> str:
    """What else decides the layout of a page. On a CPU its instructions do."""
    if current_platform.device_type != "cpu":
        return str(current_platform.device_type)
    amx = "amx" if torch.cpu._is_amx_tile_supported() else ""
    return f"cpu/{platform.machine()}/{torch.backends.cpu.get_cpu_capability()}/{amx}"


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]

"""What has to hold before the connector starts; what does not is refused, saying what to write."""

import logging
import os
from collections.abc import Mapping
from typing import Any

SUPPORTED = "0.32."
"""The versions of vLLM whose interfaces this connector knows."""

_HASHES = {"sha256", "sha256_cbor"}
_log = logging.getLogger("kvstore.vllm")


def check_engine(version: str, vllm_config: Any, kv_cache_config: Any) -> None:
    """Raises ValueError for an engine whose KV cache could not be shared correctly.

    Sets what has only one safe value: a failed load is computed again, not an error.
    """
    problem = _problem(version, vllm_config, kv_cache_config, os.environ)
    if problem:
        raise ValueError(f"KVStoreConnector: {problem}")
    transfer = vllm_config.kv_transfer_config
    if transfer.kv_load_failure_policy != "recompute":
        transfer.kv_load_failure_policy = "recompute"
        _log.info("kv_load_failure_policy: set to recompute; a cache may forget")


def _problem(
    version: str, vllm_config: Any, kv_cache_config: Any, environment: Mapping[str, str]
) -> str:
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    if not version.startswith(SUPPORTED):
        return f"vLLM {SUPPORTED}* is supported, this is {version}"
    if cache.prefix_caching_hash_algo not in _HASHES:
        return (
            f"prefix_caching_hash_algo {cache.prefix_caching_hash_algo} collides too easily to be "
            "shared: add --prefix-caching-hash-algo sha256_cbor"
        )
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if getattr(parallel, name) != 1:
            return f"{name} {getattr(parallel, name)}: only 1 is supported"
    media = vllm_config.model_config.multimodal_config
    if media is not None and not media.mm_processor_cache_gb and not cache.enable_prefix_caching:
        return (
            "media are named by a counter and not by their content: add --enable-prefix-caching, "
            "or --mm-processor-cache-gb above 0"
        )
    if kv_cache_config.hisparse_host_num_blocks is not None:
        return "a KV cache that lies partly in host memory (HiSparse) is not supported"
    if "PYTHONHASHSEED" in environment:
        _log.info("PYTHONHASHSEED is set: engines share what they store if it is the same in all")
    return ""

"""kvstore as a secondary tier of vLLM's own KV offloading (`TieringOffloadingSpec`).

    {"kv_connector": "OffloadingConnector", "kv_role": "kv_both",
     "kv_connector_extra_config": {
       "spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 8589934592,
       "secondary_tiers": [{"type": "KVStoreTier", "module_path": "kvstore_client.vllm_tier",
                            "endpoint": "127.0.0.1:7070"}]}}

Only vLLM imports this package; all but `tier`, `connector`, `engine` and `figures` in it works
without vLLM.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstore_client.vllm_tier.connector import KVStoreOffloadingConnector
    from kvstore_client.vllm_tier.tier import KVStoreTier

__all__ = ["KVStoreOffloadingConnector", "KVStoreTier"]


def __getattr__(name: str) -> Any:
    if name == "KVStoreTier":
        from kvstore_client.vllm_tier.tier import KVStoreTier

        return KVStoreTier
    if name == "KVStoreOffloadingConnector":
        from kvstore_client.vllm_tier.connector import KVStoreOffloadingConnector

        return KVStoreOffloadingConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The connector of vLLM 0.32: `KVStoreConnector`, for `--kv-transfer-config`.

    {"kv_connector": "KVStoreConnector", "kv_connector_module_path": "kvstore_client.vllm",
     "kv_role": "kv_both", "kv_connector_extra_config": {"endpoint": "127.0.0.1:7070"}}

With kvstore-llm installed, the name alone is enough. docs/vllm.md is the recipe.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstore_client.vllm.connector import KVStoreConnector

__all__ = ["KVStoreConnector"]


def __getattr__(name: str) -> Any:
    # vLLM imports the plug-in, and with it this package, before it is ready to be imported itself.
    if name != "KVStoreConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvstore_client.vllm.connector import KVStoreConnector

    return KVStoreConnector

"""SGLang keeps its host cache in kvstore: a HiCache storage backend, loaded as `dynamic`.

Only SGLang imports this package, by `"module_path": "kvstore_client.sglang"`; docs/sglang.md says
how.
"""

from kvstore_client.sglang.backend import KVStoreBackend

__all__ = ["KVStoreBackend"]

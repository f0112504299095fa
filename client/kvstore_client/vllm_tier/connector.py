"""vLLM's offloading connector, which also tells its tiers what vLLM does not: the adapters."""

from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from kvstore_client.vllm_tier.adapters import Adapter, Adapters
from kvstore_client.vllm_tier.engine import Engine, building_for


class KVStoreOffloadingConnector(OffloadingConnector):
    """For engines with LoRA: each request's context says by which weights it is computed."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        self._adapters = Adapters()
        with building_for(Engine(vllm_config, kv_cache_config, names_adapters=True)):
            super().__init__(vllm_config, role, kv_cache_config)

    def on_new_request(self, request: Request) -> None:
        """Before anything is looked up, stored or loaded for the request."""
        super().on_new_request(request)
        status = self.scheduler._req_status[request.request_id]
        status.req_context.set_state(self._adapter(request.lora_request))

    def _adapter(self, lora: Any) -> Adapter:
        if lora is None:
            return Adapter()
        extra = b"3d" if lora.is_3d_lora_weight else b""
        return self._adapters.of(
            lora.lora_name, lora.lora_path, lora.lora_int_id, extra, renewed=lora.load_inplace
        )

"""The least that can be called a connector: pages are copied to a dictionary and back.

It is an oracle: what vLLM computes from pages that surely are the right ones, for models of which
vLLM keeps no prefixes itself on this machine (latent attention without AMX). It loads before the
step, knows one group of full attention, and runs only with a witness, whose findings it uses.
"""

from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)

PAGES: dict[str, list[torch.Tensor]] = {}
"""By key in hex; of the process, so it outlives an engine in it."""


class Nothing(KVConnectorMetadata):
    """The witness's own metadata says it all."""


class LocalPages(KVConnectorBase_V1):
    """See the module."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._tokens = vllm_config.cache_config.block_size

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        usable = (request.num_tokens - 1) // self._tokens
        found = 0
        for block_hash in request.block_hashes[:usable]:
            if bytes(block_hash).hex() not in PAGES:
                break
            found += 1
        return max(0, found * self._tokens - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return Nothing()

    def start_load_kv(self, forward_context: Any, **others: Any) -> None:
        for pages in self.witness.current.promised:
            for group, key, block in pages.blocks:
                for page, kept in zip(self.pages(group, block), PAGES[key], strict=True):
                    page.copy_(kept)

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **others: Any
    ) -> None:
        pass

    def wait_for_save(self) -> None:
        for pages in self.witness.current.computed:
            for group, key, block in pages.blocks:
                PAGES.setdefault(key, [page.clone() for page in self.pages(group, block)])

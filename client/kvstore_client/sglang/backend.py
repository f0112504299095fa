"""The storage backend that SGLang's cache controller calls, from several threads at once."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
)

from kvstore.api.clock import SystemClock
from kvstore.api.errors import KvstoreError
from kvstore.api.wire import MAX_KEYS
from kvstore_client.budgets import Deadline
from kvstore_client.engine.adopted import adopted_key
from kvstore_client.restore_gate import RestoreGate
from kvstore_client.sglang.figures import Figures
from kvstore_client.sglang.identity import adapters_content, descriptors
from kvstore_client.sglang.options import SGLangOptions
from kvstore_client.sglang.pages import HostPages, Parts, bytes_of
from kvstore_client.sglang.promises import Promises
from kvstore_client.sglang.serving import Serving, check_version, weights_now
from kvstore_client.sglang.transfers import PageTransfers
from kvstore_client.sglang.updates import watch_updates
from kvstore_client.space import Space

_log = logging.getLogger("kvstore.engine.sglang")


class KVStoreBackend(HiCacheStorage):  # type: ignore[misc]
    """Pages of SGLang's host pool, stored in a node of kvstore and restored from there.

    Construction and registration raise ValueError for what cannot work, naming the setting. After
    that no call for data raises, outlasts its budget, or reports a page that is not whole and
    intact; a node that is down, slow or full is a miss.
    """

    def __init__(
        self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any] | None = None
    ) -> None:
        """`kwargs` is SGLang's second argument, by position; it holds nothing."""
        self._options = SGLangOptions.of_extra_config(storage_config.extra_config)
        check_version(self._options.untested_engine)
        self._config = storage_config
        watch_updates()
        self._serving = Serving.now()
        self._weights = weights_now()
        self._replaced = False
        self._content = adapters_content(self._options, self._serving)
        self._clock = SystemClock()
        self._attached = False
        self._figures = Figures()
        self._client = self._options.connect()
        self._transfers = PageTransfers(self._client, self._options.scope)
        self._promises = Promises(self._clock, self._client.release)

    # Registration.

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Learns where pages lie, and with that all that names their space."""
        super().register_mem_pool_host(mem_pool_host)
        config = self._config
        cuts = config.tp_lcm_size // config.tp_size if config.should_split_heads else 1
        self._pages = HostPages(mem_pool_host, cuts)
        named = descriptors(config, self._pages, self._options, self._serving)
        self._spaces = [Space.of(descriptor) for descriptor in named]
        self._gate = RestoreGate(self._pages.page_tokens, self._pages.block_bytes * cuts)
        if self._options.restore_gate and self._options.prefill_tokens_per_s:
            tokens = self._pages.page_tokens
            self._gate.computed(tokens, tokens / self._options.prefill_tokens_per_s)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Takes note of a pool. One that comes when all others are known is judged at once."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if self._attached:
            self._refuse_other_pools()

    def on_host_pools_registered(self) -> None:
        """Refuses what is not supported, and says in the log how the node was found."""
        self._refuse_other_pools()
        self._attached = True
        try:
            for space in self._spaces:
                self._client.open_space(space.descriptor)
        except KvstoreError as error:
            _log.error(
                "%s: %s; until that is mended nothing is found", self._client.endpoint, error
            )
        else:
            _log.info("%s: %s", self._client.endpoint, self._spaces[0].descriptor)

    def _refuse_other_pools(self) -> None:
        others = sorted(str(name) for name in getattr(self, "registered_pools", ()) if name != "kv")
        if others:
            raise ValueError(
                f"kvstore_client.sglang keeps the KV pool alone, and this model has {others} "
                "beside it; start without --hicache-storage-backend"
            )

    # What SGLang's threads call.

    def batch_exists(
        self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> int:
        """How many consecutive pages from the first on can be restored, by one call of the node.

        They are leased until they are read. Pages that are not worth loading do not count.
        """
        if not keys or self._stands_down():
            return 0
        prefix = (extra_info.prefix_keys if extra_info is not None else None) or []
        if len(prefix) + len(keys) > MAX_KEYS:
            prefix, keys = [], keys[:MAX_KEYS]
        chain = self._names([*prefix, *keys])
        held = len(prefix)
        match = self._client.match(
            self._spaces,
            chain,
            scopes=self._options.scopes,
            lease_ms=self._options.lease_ms,
            held_blocks=held,
        )
        found = match.blocks - held
        worth = self._gate.worth(match.spaces[0], held) if found else 0
        if worth:
            self._promises.give(match, chain[held : held + worth])
        else:
            self._client.release(match)
        self._figures.count(pages_asked=len(keys), pages_found=found, pages_not_worth=found - worth)
        return worth

    def batch_get_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Fills pages of the host pool; True for the leading ones that are whole and intact."""
        loaded = 0
        if self._fits(keys, host_indices) and not self._stands_down():
            loaded = self._load(keys, self._pages.blocks(host_indices))
        return [place < loaded for place in range(len(keys))]

    def batch_set_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """True for each page that the node holds afterwards. One that it had is not moved again."""
        if not self._fits(keys, host_indices) or self._stands_down():
            return [False] * len(keys)
        prefix = extra_info.prefix_keys if extra_info is not None else None
        return self._store(keys, self._pages.blocks(host_indices), prefix)

    # The same with a copy more, for `interface_v1` 0: pages come and go as flat tensors.

    def batch_get(
        self,
        keys: list[str],
        target_locations: Sequence[torch.Tensor] | None = None,
        target_sizes: Any = None,
    ) -> list[torch.Tensor | None]:
        """The leading pages that are whole and intact, in the tensors given or in new ones."""
        if target_locations is None:
            target_locations = [self.mem_pool_host.get_dummy_flat_data_page() for _ in keys]
        loaded = 0
        if keys and self._are_whole(keys, target_locations) and not self._stands_down():
            loaded = self._load(keys, [[[bytes_of(page)] for page in target_locations]])
        return [page if place < loaded else None for place, page in enumerate(target_locations)]

    def batch_set(
        self,
        keys: list[str],
        values: Sequence[torch.Tensor] | None = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Whether the node holds all these pages afterwards."""
        pages = [page.contiguous() for page in values or ()]
        if not self._are_whole(keys, pages) or self._stands_down():
            return False
        return all(self._store(keys, [[[bytes_of(page)] for page in pages]], None))

    def get(
        self, key: str, target_location: torch.Tensor | None = None, target_sizes: Any = None
    ) -> torch.Tensor | None:
        """One page, or None."""
        targets = None if target_location is None else [target_location]
        return self.batch_get([key], targets)[0]

    def set(
        self,
        key: str,
        value: torch.Tensor | None = None,
        target_location: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Whether the node holds the page afterwards."""
        return value is not None and self.batch_set([key], [value])

    def exists(self, key: str) -> bool:
        """Whether a page can be restored."""
        return self.batch_exists([key]) == 1

    # What its scheduler calls.

    def clear(self) -> None:
        """Forgets all pages of this rank's spaces, whoever stored them in this tenant and scope.

        Raises `KvstoreError`, which SGLang reports, where the node could not be told to.
        """
        for space in self._spaces:
            self._client.clear_space(space, self._options.scope)

    def get_stats(self) -> Any:
        """SGLang's `StorageMetrics` since the last time."""
        from sglang.srt.observability.metrics_collector import StorageMetrics

        metrics = StorageMetrics()
        self._figures.fill(metrics)
        return metrics

    @property
    def counters(self) -> Counter[str]:
        """What was done, by the names of `figures.MEANINGS`, and lost, by those of
        `losses.MEANINGS`."""
        return self._figures.counters + self._client.counters

    def close(self) -> None:
        """Waits for calls under way, which their budgets bound, and hangs up. Idempotent."""
        self._transfers.close()
        self._client.close()

    # Both interfaces below.

    def _load(self, keys: Sequence[str], blocks: Sequence[Sequence[Parts]]) -> int:
        """`blocks`: for each space those of all pages."""
        names = self._names(keys)
        lease = self._promises.lease(names[0])
        begun_s = self._clock.monotonic_s()
        deadline = Deadline(self._clock, self._options.load_budget_s)
        loaded = len(keys)
        tiers: list[str] = []
        for space, pages in zip(self._spaces, blocks, strict=True):
            tiers = self._transfers.load(space, names[:loaded], pages[:loaded], lease, deadline)
            loaded = len(tiers)
            if not loaded:
                break
        self._promises.was_read(names, loaded)
        seconds = self._clock.monotonic_s() - begun_s
        self._gate.loaded(tiers, seconds)
        self._figures.count(pages_loaded=loaded, pages_lost=len(keys) - loaded)
        if loaded:
            self._figures.loaded(loaded, loaded * self._page_bytes, seconds)
        return loaded

    def _store(
        self,
        keys: Sequence[str],
        blocks: Sequence[Sequence[Parts]],
        prefix: Sequence[str] | None,
    ) -> list[bool]:
        names = self._names(keys)
        parent = self._names(prefix[-1:])[0] if prefix else b""
        begun_s = self._clock.monotonic_s()
        deadline = Deadline(self._clock, self._options.store_budget_s)
        held = [True] * len(keys)
        for space, pages in zip(self._spaces, blocks, strict=True):
            stored = self._transfers.store(space, names, pages, parent, deadline)
            if parent and not any(stored) and deadline.rest_s() > 0:
                # The node has forgotten the parent, and takes no orphans. SGLang may have it, so
                # that the run is of use to it; without a parent it is a chain of its own.
                stored = self._transfers.store(space, names, pages, b"", deadline)
                self._figures.count(parents_lost=int(any(stored)))
            held = [both and each for both, each in zip(held, stored, strict=True)]
        self._figures.count(
            pages_stored=sum(held),
            pages_not_stored=len(held) - sum(held),
            parents_unknown=int(prefix is None),
        )
        if any(held):
            seconds = self._clock.monotonic_s() - begun_s
            self._figures.stored(sum(held), sum(held) * self._page_bytes, seconds)
        return held

    @property
    def _page_bytes(self) -> int:
        return self._pages.block_bytes * self._pages.cuts

    def _names(self, keys: Sequence[str]) -> list[bytes]:
        return [adopted_key(key.encode(), self._content) for key in keys]

    def _fits(self, keys: Sequence[str], host_indices: torch.Tensor) -> bool:
        """Whether there is a page of the pool for each key, and any key at all."""
        fits = len(host_indices) == len(keys) * self._pages.page_tokens
        if not fits:
            _log.error("%d indices for %d pages: none is moved", len(host_indices), len(keys))
        return fits and bool(keys)

    def _are_whole(self, keys: Sequence[str], pages: Sequence[torch.Tensor]) -> bool:
        """Whether there is a flat page for each key, as long as a block of the only space."""
        whole = (
            len(keys) == len(pages)
            and self._pages.cuts == 1
            and all(page.nbytes == self._page_bytes and page.is_contiguous() for page in pages)
        )
        if not whole:
            _log.error("pages that are cut by heads, or of another size, need interface_v1")
        return whole

    def _stands_down(self) -> bool:
        """Whether the weights were replaced under us: nothing says what the new ones are called.

        What was stored is of the old ones, and what is computed now of the new ones.
        """
        # For good: pages that other weights have computed may still lie in the host pool.
        self._replaced = self._replaced or weights_now() != self._weights
        if self._replaced:
            if not self._figures.counters["stood_down"]:
                _log.error(
                    "the engine's weights are now %r: nothing is stored or restored until the "
                    "backend is attached again with a model_revision of theirs",
                    weights_now()[0],
                )
            self._figures.count(stood_down=1)
        return self._replaced

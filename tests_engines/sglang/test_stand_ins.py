"""The stand-ins of the fast tests agree with the installed SGLang, as far as it matters."""

import dataclasses
import inspect

import pytest
import torch
from sglang import __version__
from sglang.srt import runtime_context
from sglang.srt.arg_groups.overrides import resolution_result
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.mem_cache import hicache_storage
from sglang.srt.observability.metrics_collector import StorageMetrics

from kvstore_client.sglang import KVStoreBackend
from kvstore_client.sglang.serving import TESTED_VERSION
from tests.stand_ins import sglang_storage
from tests_engines.sglang.rig import LAYERS, LAYOUTS, PAGE_TOKENS, TOKENS, mha

METHODS = [
    name for name, value in vars(sglang_storage.HiCacheStorage).items() if inspect.isfunction(value)
]


def parameters(owner: type, name: str) -> list[tuple[str, object]]:
    """Names and defaults, in order."""
    signature = inspect.signature(getattr(owner, name))
    return [(each.name, each.default) for each in signature.parameters.values()]


def test_the_version_is_the_one_that_was_tested() -> None:
    """Of the installed engine, the stand-ins and the backend's check."""
    assert __version__ == sglang_storage.VERSION == TESTED_VERSION


@pytest.mark.parametrize("name", METHODS)
def test_methods_take_the_same_arguments(name: str) -> None:
    """In SGLang, in the stand-in and in the backend."""
    real = parameters(hicache_storage.HiCacheStorage, name)
    assert parameters(sglang_storage.HiCacheStorage, name) == real
    assert parameters(KVStoreBackend, name) == real


def test_the_same_methods_must_be_there() -> None:
    """Nothing of SGLang's interface is left out but what concerns other pools than that of KV."""
    real = hicache_storage.HiCacheStorage
    assert sglang_storage.HiCacheStorage.__abstractmethods__ == real.__abstractmethods__
    public = {name for name, value in vars(real).items() if inspect.isfunction(value)}
    assert public - set(METHODS) == {"batch_exists_v2", "batch_get_v2", "batch_set_v2"}


@pytest.mark.parametrize(
    ("stand_in", "real"),
    [
        (sglang_storage.HiCacheStorageConfig, hicache_storage.HiCacheStorageConfig),
        (sglang_storage.HiCacheStorageExtraInfo, hicache_storage.HiCacheStorageExtraInfo),
        (sglang_storage.StorageMetrics, StorageMetrics),
    ],
)
def test_records_have_the_same_fields(stand_in: type, real: type) -> None:
    """With the same defaults, in the same order."""

    def fields(record: type) -> list[tuple[str, object, object]]:
        return [(f.name, f.default, f.default_factory) for f in dataclasses.fields(record)]

    assert fields(stand_in) == fields(real)


def test_the_engine_publishes_what_the_backend_reads() -> None:
    """By the same functions, with the same defaults, and a ValueError before that."""
    stand_in = sglang_storage.Engine()
    for name, ask in stand_in.context().items():
        for function in (ask, getattr(runtime_context, name)):
            with pytest.raises(ValueError, match=r"not published|not set yet"):
                function()
    stand_in.publish(model_path="dummy")
    with runtime_context.get_context().override_server_args() as server_args:
        for name, value in vars(stand_in.model).items():
            assert resolution_result(server_args, name) == value, name
        assert runtime_context.get_model().model_path == "dummy"
        assert runtime_context.get_lora().lora_paths is None
        assert runtime_context.get_spec().speculative_draft_model_path is None
        assert runtime_context.get_serving().weight_version == "default"
    assert {"lora_name", "lora_path"} <= set(LoRARef.__struct_fields__)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pools_lay_pages_out_alike(layout: str) -> None:
    """The same parts, as far apart, and the same flat pages for the same bytes."""
    real = mha(layout)
    alike = sglang_storage.HostPool(
        layout, heads=4, page_size=PAGE_TOKENS, pages=real.page_num, layers=LAYERS
    )
    alike.head_dim = alike.v_head_dim = real.head_dim
    alike.kv_buffer = real.kv_buffer
    real.kv_buffer.view(torch.uint8).random_(0, 256)
    indices = torch.cat([torch.arange(TOKENS, TOKENS + 16), torch.arange(32)])
    assert real.size == alike.size
    assert tuple(map(list, real.get_page_buffer_meta(indices))) == alike.get_page_buffer_meta(
        indices
    )
    if layout == "page_head":
        cut = real.get_split_heads_page_buffer_meta(indices, 2)
        assert tuple(map(list, cut)) == alike.get_split_heads_page_buffer_meta(indices, 2)
    for index in (0, 16, TOKENS):
        pages = [pool.get_data_page(index).contiguous() for pool in (real, alike)]
        assert torch.equal(pages[0].view(torch.uint8), pages[1].view(torch.uint8))
    assert real.get_dummy_flat_data_page().shape == alike.get_dummy_flat_data_page().shape

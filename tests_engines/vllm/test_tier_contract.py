"""The stand-ins that the fast tests of KVStoreTier use agree with the installed vLLM."""

import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from enum import Enum
from typing import Any

import pytest
from vllm.v1.kv_offload.tiering.base import SecondaryTierManager
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
from vllm.version import __version_tuple__

from kvstore_client.vllm_tier import KVStoreTier
from kvstore_client.vllm_tier.engine import SUPPORTED
from tests.stand_ins import vllm_offloading

SETTINGS = {"VllmConfig", "KVCacheConfig"}
"""Large in vLLM: of their fields we only have those that the tier reads."""
NO_SIGNATURE = {"OffloadingConnectorStats", "KVCacheSpec", "MambaSpec", "BackpressureDetector"}


def pairs() -> Iterator[tuple[str, str, Any, Any]]:
    """Module, name, stand-in and the real thing, of all that the tier imports from vLLM."""
    for module, contents in vllm_offloading.MODULES.items():
        for name, stand_in in contents.items():
            if getattr(stand_in, "__module__", "") == vllm_offloading.__name__:
                yield module, name, stand_in, getattr(importlib.import_module(module), name)


PAIRS = list(pairs())
IDS = [name for _, name, _, _ in PAIRS]


def test_the_version_is_the_one_that_is_supported() -> None:
    """What the tier refuses otherwise."""
    assert tuple(__version_tuple__[:2]) == SUPPORTED
    assert len(PAIRS) >= 15


@pytest.mark.parametrize(("module", "name", "stand_in", "real"), PAIRS, ids=IDS)
def test_a_stand_in_has_the_shape_of_the_real_thing(
    module: str, name: str, stand_in: Any, real: Any
) -> None:
    """Enums have the same members, dataclasses the same fields, methods the same parameters."""
    if not inspect.isclass(stand_in):
        assert parameters(stand_in) == parameters(real)
    elif issubclass(stand_in, Enum):
        members = {each.name: each.value for each in stand_in}
        assert members == {each.name: each.value for each in real}
    elif dataclasses.is_dataclass(stand_in) and name in SETTINGS:
        assert {each.name for each in dataclasses.fields(stand_in)} <= {
            each.name for each in dataclasses.fields(real)
        }
    elif dataclasses.is_dataclass(stand_in):
        assert shape(stand_in) == shape(real)
    elif name not in NO_SIGNATURE:
        assert parameters(stand_in) == parameters(real)
    methods = {
        method: value
        for method, value in vars(stand_in).items()
        if inspect.isfunction(value) and not method.startswith("_")
    }
    for method, value in methods.items():
        assert parameters(value) == parameters(getattr(real, method)), f"{module}.{name}.{method}"


@pytest.mark.parametrize(
    "method",
    [
        name
        for name, value in vars(SecondaryTierManager).items()
        if inspect.isfunction(value) and not name.startswith("_")
    ],
)
def test_the_tier_answers_to_every_call_of_vllm(method: str) -> None:
    """By the names of the base class's parameters: vLLM may pass them by position or by name."""
    assert parameters(getattr(KVStoreTier, method)) == parameters(
        getattr(SecondaryTierManager, method)
    )


def test_the_manager_asks_for_the_source_right_after_a_hit() -> None:
    """`cache_hit_source` of the tier is that of the lookup before: so the order matters."""
    source = inspect.getsource(TieringOffloadingManager)
    asks = source.index("self.secondary_tiers[tier_idx].cache_hit_source")
    initiates = source.index("def _initiate_promotion")
    assert initiates < asks
    lookup = inspect.getsource(TieringOffloadingManager.lookup)
    assert lookup.index("tier.lookup(key, req_context)") < lookup.index("_initiate_promotion(")


def test_a_row_that_failed_is_never_read() -> None:
    """vLLM's primary tier frees the chunks that a promotion did not bring."""
    source = inspect.getsource(TieringOffloadingManager._complete_promotion)
    assert "failed_keys_set.difference_update(successful_keys)" in source
    assert "failed_keys," in source and "False," in source


def parameters(function: Any) -> list[tuple[str, Any, bool]]:
    """Names, kinds and whether there is a default."""
    return [
        (each.name, each.kind, each.default is each.empty)
        for each in inspect.signature(function).parameters.values()
    ]


def shape(kind: Any) -> list[tuple[str, bool, bool]]:
    """Of each field its name, whether it has a default, and whether it is passed."""
    return [
        (
            each.name,
            each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING,
            each.init,
        )
        for each in dataclasses.fields(kind)
    ]

"""Adapters of peft inside a model: which one is active, and what names it."""

import hashlib
import sys
from collections.abc import Mapping
from typing import Any

_LABEL = b"kvstore adapter 1"
_PEFT = "peft"
_LORA = "peft.tuners.lora.layer"
_SETTINGS = ("r", "lora_alpha", "scaling", "use_rslora", "lora_bias")

State = tuple[object, ...]


class Adapters:
    """Plain LoRA adapters, named by their weights; what else peft does to a model is refused.

    What the adapter itself is called, and where it came from, names nothing.
    """

    def __init__(self, model: Any) -> None:
        """Raises ValueError, as all methods do, for what is not supported."""
        self._model = model

    def state(self) -> State:
        """It differs whenever other adapters are active than before, or otherwise."""
        return tuple(
            (
                name,
                tuple(layer.active_adapters),
                bool(layer.disable_adapters),
                tuple(_settings(layer, adapter) for adapter in _active(layer)),
                len(layer._forward_pre_hooks),  # peft's way to give each row its own adapter.
            )
            for name, layer in self._layers()
        )

    def split(self, tensors: Mapping[str, bytes]) -> tuple[dict[str, bytes], bytes]:
        """Of each tensor's digest: those of the model without adapters, by the names that they
        have there, and what names the active adapter; empty: none is."""
        layers = self._layers()
        prefixes = tuple(f"{name}.{kind}." for name, each in layers for kind in _kinds(each))
        plain = {
            name.replace(".base_layer.", ".") if layers else name: digest
            for name, digest in tensors.items()
            if not prefixes or not name.startswith(prefixes)
        }
        whole = hashlib.sha256(_LABEL)
        active = [(name, each, adapter) for name, each in layers for adapter in _active(each)]
        for name, layer, adapter in active:
            _add(whole, name.encode(), _settings(layer, adapter).encode())
            for kind in _kinds(layer):
                prefix = f"{name}.{kind}.{adapter}"
                for tensor in sorted(tensors):
                    if tensor == prefix or tensor.startswith(f"{prefix}."):
                        _add(whole, kind.encode(), tensor.removeprefix(prefix).encode())
                        _add(whole, tensors[tensor])
        return plain, whole.digest() if active else b""

    def _layers(self) -> list[tuple[str, Any]]:
        """Each LoRA layer by its name in the model."""
        if _PEFT not in sys.modules:
            return []
        layers = []
        for name, module in self._model.named_modules():
            kind = type(module)
            if kind.__module__.partition(".")[0] != _PEFT:
                continue
            if kind.__module__ != _LORA or not hasattr(module, "active_adapters"):
                raise ValueError(
                    f"model: {name} is a {kind.__module__}.{kind.__qualname__}; of adapters only "
                    "plain LoRA is supported"
                )
            if module.merged_adapters:
                raise ValueError(
                    f"model: adapter {module.merged_adapters[0]!r} is merged into {name}; "
                    "call merge_and_unload() to keep it so, or unmerge it"
                )
            for adapter in _active(module):
                if variant := module.lora_variant.get(adapter):
                    raise ValueError(
                        f"model: adapter {adapter!r} in {name} is {type(variant).__qualname__}; "
                        "of adapters only plain LoRA is supported"
                    )
            layers.append((name, module))
        return layers


def _active(layer: Any) -> list[str]:
    """The adapters that change what a layer computes now, in order."""
    if layer.disable_adapters:
        return []
    return [adapter for adapter in layer.active_adapters if adapter in layer.scaling]


def _kinds(layer: Any) -> tuple[str, ...]:
    kinds: tuple[str, ...] = layer.adapter_layer_names
    return kinds


def _settings(layer: Any, adapter: str) -> str:
    return repr([getattr(layer, name, {}).get(adapter) for name in _SETTINGS])


def _add(digest: "hashlib._Hash", *parts: bytes) -> None:
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)

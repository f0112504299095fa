"""What names a model as it lies in memory: its weights, its adapter, and how it rounds.

A path or a commit says what was loaded, not what became of it: weights are trained, merged and cast
in memory. So the tensors themselves are digested, once, and again when they change.
"""

import hashlib
import json
import os
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import transformers

from kvstore_client.transformers.adapters import Adapters, State
from kvstore_client.transformers.modules import module_classes, module_settings

_LABEL = b"kvstore model 1"
_NOT_OF_THE_MODEL = {
    "_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype",
    "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
"""Entries of a configuration that change no key: where it comes from, who wrote it, what is told
to `generate`, and what class and tensors say themselves."""
_READERS = 8
_WORD_BYTES = 8
_RUN_BYTES = 4096


class _Seen(NamedTuple):
    """A tensor as it was when it was digested."""

    tensor: weakref.ref[torch.Tensor]
    place: int
    writes: int
    total: int
    digest: bytes

    def unchanged(self) -> bool:
        """Whether it is there, where it was, and not written to since."""
        tensor = self.tensor()
        return (
            tensor is not None
            and self.place == tensor.data_ptr()
            and self.writes == _writes(tensor)
        )


class Look(NamedTuple):
    """What a model was when it was looked at. Invariant: it is not written to afterwards."""

    revision: str
    """Of weights and configuration, without adapters: a SHA-256 in hex, or what was given."""
    adapter: bytes
    """A digest of the active adapter; empty: none is active."""
    seen: Mapping[str, _Seen]
    adapters: State
    classes: tuple[type, ...]


class Identity:
    """Names a model, and notices when it becomes another one.

    It notices a tensor that was replaced, and each write that torch counts. What torch does not
    count, a write through `Tensor.data`, shows in a total over each tensor at the next look: but
    for values that change places within 4 KiB. Between two looks it does not show.
    """

    def __init__(self, model: Any, revision: str = "") -> None:
        """Reads all weights, or an adapter's alone if `revision` names the others.

        Raises ValueError, as all methods do, for adapters that are not supported.
        """
        self._model = model
        self._adapters = Adapters(model)
        self._given = revision
        self._seen: dict[str, _Seen] = {}
        self.look()

    def changed(self, since: Look) -> bool:
        """Whether the model has become another one since, as far as torch counts it.

        Whoever looked meanwhile changes nothing about it. Quick enough to be asked before each
        pass.
        """
        return (
            any(not seen.unchanged() for seen in since.seen.values())
            or self._adapters.state() != since.adapters
            or module_classes(self._model) != since.classes
        )

    def look(self) -> Look:
        """Looks at the model, and reads what is new in it.

        That takes as long as a total over all that names it: as one token of an answer does.
        """
        adapters, classes = self._adapters.state(), module_classes(self._model)
        tensors = self._tensors()
        # What is written to while it is read counts as changed afterwards.
        before = {n: (weakref.ref(t), t.data_ptr(), _writes(t)) for n, t in tensors.items()}
        totals = tensor_totals(tensors)
        known = {
            name: seen
            for name, seen in self._seen.items()
            if seen.unchanged()
            and seen.tensor() is tensors.get(name)
            and seen.total == totals.get(name)
        }
        fresh = {name: tensor for name, tensor in tensors.items() if name not in known}
        digests = tensor_digests(fresh.values())
        for name, digest in zip(fresh, digests, strict=True):
            known[name] = _Seen(*before[name], totals[name], digest)
        self._seen = known
        contents = {name: seen.digest for name, seen in known.items()}
        plain, adapter = self._adapters.split(contents)
        return Look(self._given or self._whole(plain), adapter, known, adapters, classes)

    def _whole(self, contents: Mapping[str, bytes]) -> str:
        whole = hashlib.sha256(_LABEL)
        settings = json.dumps(_of_the_model(self._model.config.to_dict()), default=str)
        parts = [type(self._model).__qualname__.encode(), settings.encode()]
        parts += [json.dumps(module_settings(self._model), sort_keys=True).encode()]
        for name in sorted(contents):
            parts += [name.encode(), contents[name]]
        for part in parts:
            whole.update(len(part).to_bytes(8, "little"))
            whole.update(part)
        return whole.hexdigest()

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Those that name the model; where its revision is given, those without that name."""
        tensors = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        if not self._given:
            return tensors
        plain, _ = self._adapters.split(dict.fromkeys(tensors, b""))
        return {name: each for name, each in tensors.items() if name not in plain}


def describe_numerics(model: Any, chunk_tokens: int, rows: int) -> str:
    """What decides the last bit of a block beside weights and tokens, for a space's descriptor."""
    config = model.config.get_text_config(decoder=True)
    device = model.device
    if device.type == "cpu":
        processor = f"{_instruction_set()} threads={torch.get_num_threads()}"
    else:
        processor = torch.get_device_module(device.type).get_device_name(device)
    parts = (
        f"prefill={chunk_tokens} rows={rows} attention={config._attn_implementation}",
        f"torch={torch.__version__} transformers={transformers.__version__}",
        f"matmul={torch.get_float32_matmul_precision()}",
        f"compiled={_compiled(model)}",
        f"{device.type} {processor}",
    )
    return " ".join(part for part in parts if not part.endswith("="))


def tensor_digests(tensors: Iterable[torch.Tensor]) -> list[bytes]:
    """The SHA-256 of each tensor: its dtype, its shape, its values."""
    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1), "kvstore-weights") as readers:
        return list(readers.map(_tensor_digest, tensors))


@torch.no_grad()
def _tensor_digest(tensor: torch.Tensor) -> bytes:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()


@torch.no_grad()
def tensor_totals(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Of each tensor a number that changes with any of its values, at the speed of memory."""
    by_device: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        by_device.setdefault(tensor.device, {})[name] = _total(tensor)
    return {
        name: total
        for totals in by_device.values()
        for name, total in zip(totals, torch.stack(list(totals.values())).tolist(), strict=True)
    }


def _total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of all words, those of each 4 KiB weighed by where they lie."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % _WORD_BYTES:
        flat = flat.clone()
    whole = len(flat) // _RUN_BYTES * _RUN_BYTES
    words = len(flat) // _WORD_BYTES * _WORD_BYTES
    runs = flat[:whole].view(torch.int64).view(-1, _RUN_BYTES // _WORD_BYTES).sum(dim=1)
    parts = runs
    if whole < len(flat):
        rest = flat[whole:words].view(torch.int64), flat[words:].to(torch.int64)
        parts = torch.cat([runs, *rest])
    return (parts * torch.arange(1, 2 * len(parts), 2, device=parts.device)).sum()


def _writes(tensor: torch.Tensor) -> int:
    """How often a tensor was written to, as torch counts; it does not count for inference."""
    return -1 if tensor.is_inference() else tensor._version


def _of_the_model(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        str(name): _of_the_model(value[name])
        for name in sorted(value, key=str)
        if name not in _NOT_OF_THE_MODEL
    }


def _compiled(model: Any) -> str:
    """Which modules were: all together, or some by themselves."""
    if model._compiled_call_impl is not None:
        return "whole"
    which = [n for n, module in model.named_modules() if module._compiled_call_impl is not None]
    return hashlib.sha256(" ".join(which).encode()).hexdigest()[:16] if which else ""


def _instruction_set() -> str:
    # oneDNN multiplies bf16 in tiles where it can, and older torch cannot say whether it does.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    tiles = "+AMX" if capabilities.get("amx_bf16") else ""
    return torch.backends.cpu.get_cpu_capability() + tiles

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

_LABEL = b"kvstore model 1"
_NOT_OF_THE_MODEL = {
    "_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype",
    "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
"""Entries of a configuration that change no key: where it comes from, who wrote it, what is told
to `generate`, and what class and tensors say themselves."""
_READERS = 8
_SAMPLES = 64


class _Seen(NamedTuple):
    """A tensor as it was when it was digested."""

    tensor: weakref.ref[torch.Tensor]
    place: int
    writes: int
    digest: bytes

    def unchanged(self) -> bool:
        """Whether it is there, where it was, and not written to since."""
        tensor = self.tensor()
        return (
            tensor is not None
            and self.place == tensor.data_ptr()
            and self.writes == _writes(tensor)
        )


class Identity:
    """Names a model, and notices when it becomes another one.

    It notices a tensor that was replaced, and each write that torch counts. What torch does not
    count, a write through `Tensor.data`, shows in a sample of the tensors' values.
    """

    def __init__(self, model: Any, revision: str = "") -> None:
        """Reads all weights, or an adapter's alone if `revision` names the others.

        Raises ValueError, as all methods do, for adapters that are not supported.
        """
        self._model = model
        self._adapters = Adapters(model)
        self._given = revision
        self._seen: dict[str, _Seen] = {}
        self._sample = b""
        self._state: State = ()
        self.revision = ""
        """Of weights and configuration, without adapters: a SHA-256 in hex, or what was given."""
        self.adapter = b""
        """A digest of the active adapter; empty: none is active."""
        self.refresh()

    def changed(self) -> bool:
        """Whether the model has become another one since `refresh`, as far as torch counts it.

        Quick enough to be asked before each pass.
        """
        return (
            any(not seen.unchanged() for seen in self._seen.values())
            or self._adapters.state() != self._state
        )

    def refresh(self) -> None:
        """Looks at the model, and reads what is new in it."""
        self._state = self._adapters.state()
        tensors = self._tensors()
        sample = _sample(tensors.values())
        if sample != self._sample:
            self._seen = {}  # Another session may be looking at the former one.
        known = {
            name: seen
            for name, seen in self._seen.items()
            if seen.unchanged() and seen.tensor() is tensors.get(name)
        }
        fresh = {name: tensor for name, tensor in tensors.items() if name not in known}
        # What is written to while it is read counts as changed afterwards.
        before = [(weakref.ref(each), each.data_ptr(), _writes(each)) for each in fresh.values()]
        digests = tensor_digests(fresh.values())
        for name, seen, digest in zip(fresh, before, digests, strict=True):
            known[name] = _Seen(*seen, digest)
        self._seen, self._sample = known, sample
        contents = {name: seen.digest for name, seen in known.items()}
        plain, self.adapter = self._adapters.split(contents)
        self.revision = self._given or self._whole(plain)

    def _whole(self, contents: Mapping[str, bytes]) -> str:
        whole = hashlib.sha256(_LABEL)
        settings = json.dumps(_of_the_model(self._model.config.to_dict()), default=str)
        parts = [type(self._model).__qualname__.encode(), settings.encode()]
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
        "compiled" if model._compiled_call_impl is not None else "",
        f"{device.type} {processor}",
    )
    return " ".join(part for part in parts if part)


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
def _sample(tensors: Iterable[torch.Tensor]) -> bytes:
    """A digest of a few values of each tensor, from all over it."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // _SAMPLES)].to(torch.float32)
        by_device.setdefault(tensor.device, []).append(values)
    digest = hashlib.sha256()
    for samples in by_device.values():
        digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.digest()


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


def _instruction_set() -> str:
    # oneDNN multiplies bf16 in tiles where it can, and older torch cannot say whether it does.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    tiles = "+AMX" if capabilities.get("amx_bf16") else ""
    return torch.backends.cpu.get_cpu_capability() + tiles

"""What the engine in this process serves, as far as it decides the bytes of KV."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sglang
from sglang.srt import runtime_context

from kvstore_client.sglang.updates import updates

TESTED_VERSION = "0.5.23"


def check_version(untested_engine: bool) -> None:
    """Raises ValueError for an engine that this backend was not tested with."""
    if sglang.__version__ != TESTED_VERSION and not untested_engine:
        raise ValueError(
            f"kvstore_client.sglang is tested with SGLang {TESTED_VERSION} and this is "
            f"{sglang.__version__}; set untested_engine to true to try it all the same"
        )


@dataclass(frozen=True, slots=True)
class Serving:
    """Weights and settings of the running engine. Empty where there is none, as in a test."""

    model_path: str = ""
    revision: str | None = None
    load_format: str = ""
    settings: str = ""
    """Overrides of the checkpoint's own settings, as text; empty: none."""
    quantization: str = ""
    """Of the weights and of KV; the host pool's dtype does not tell two kinds of fp8 apart."""
    adapters: tuple[tuple[str, str], ...] = ()
    """Name and path of the LoRA adapters of the command line, whose names in SGLang's keys are
    digests of both, so that replacing the files changes no key. One that is loaded later gets a
    random name, and needs nothing here."""
    draft_path: str = ""
    draft_revision: str | None = None
    replaced: bool = False
    """Whether the weights were replaced since the engine started, as far as it was told so."""

    @classmethod
    def now(cls) -> "Serving":
        """What this process serves. Raises ValueError for a file that cannot be read."""
        model = _published(runtime_context.get_model)
        if model is None:
            return cls()
        lora, spec = runtime_context.get_lora(), runtime_context.get_spec()
        adapters = (lora.lora_paths or ()) if lora.enable_lora else ()
        return cls(
            model_path=model.model_path,
            revision=model.revision,
            load_format=model.load_format,
            settings=""
            if model.json_model_override_args == "{}"
            else model.json_model_override_args,
            quantization=_quantization(model),
            adapters=tuple(sorted((ref.lora_name, ref.lora_path) for ref in adapters)),
            draft_path=spec.speculative_draft_model_path or "",
            draft_revision=spec.speculative_draft_model_revision,
            replaced=weights_now() != (runtime_context.get_server_args().weight_version, 0),
        )


def weights_now() -> tuple[str, int]:
    """What the engine calls its weights now, and how often they were updated, as far as that was
    seen; an empty name where there is no engine."""
    serving = _published(runtime_context.get_serving)
    return (serving.weight_version if serving is not None else "", updates())


def _published(namespace: Callable[[], Any]) -> Any | None:
    try:
        return namespace()
    except ValueError:  # This process has no engine.
        return None


def _quantization(model: Any) -> str:
    parts = [f"weights={model.quantization or ''}", f"kv={model.kv_cache_dtype}"]
    while_loading = {"modelopt": model.modelopt_quant, "rl": model.rl_quant_profile}
    parts += [f"{name}={given}" for name, given in while_loading.items() if given]
    if model.quantization_param_path:
        scales = Path(model.quantization_param_path)
        try:
            parts.append(f"scales={hashlib.sha256(scales.read_bytes()).hexdigest()}")
        except OSError as error:
            raise ValueError(f"quantization_param_path: {error}") from None
    return " ".join(parts)

"""What this adapter can serve exactly. All else is refused, naming what it is."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from kvstore_client.transformers.modules import check_modules

MODEL_TYPES = (
    "gemma", "gemma2", "gemma3", "gemma3_text", "llama", "mistral", "qwen2", "qwen3",
)  # fmt: skip
"""As a model's configuration calls them (`model_type`)."""

_ROPE_OF_LENGTH = ("dynamic", "longrope")


def supported_model(model: Any) -> Any:
    """The model itself, out of peft's wrapper if it is in one. Raises ValueError."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        for name, settings in model.peft_config.items():
            if settings.is_prompt_learning:
                raise ValueError(
                    f"model: adapter {name!r} is {type(settings).__name__}, which puts tokens of "
                    "its own before the prompt; of adapters only plain LoRA is supported"
                )
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        raise ValueError(
            f"model: one of transformers that can generate is needed, got a {type(model).__name__}"
        )
    _check_config(model)
    _check_weights(model)
    return model


def check_state(model: Any) -> None:
    """Raises ValueError for a model that would not compute now as it does when it generates."""
    if model.training:
        raise ValueError("model: is in training mode, where dropout is random; call model.eval()")
    implementation = model.generation_config.cache_implementation
    if implementation is not None:
        raise ValueError(
            f"generation_config.cache_implementation: {implementation!r} asks for a cache of its "
            "own; set it to None. Static, quantized and offloaded caches are not supported"
        )
    check_autocast(model.device)
    check_modules(model)


def check_autocast(device: torch.device) -> None:
    """Raises ValueError where torch would compute in another type than the model's."""
    if torch.is_autocast_enabled(device.type):
        raise ValueError("autocast: is not supported; load the model in the type that you want")


def check_inputs(
    model: Any,
    input_ids: object,
    attention_mask: torch.Tensor | None,
    others: Mapping[str, object],
) -> torch.Tensor:
    """The tokens, [row, token]. Raises ValueError, naming the field that cannot be served."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or not input_ids.numel():
        shape = tuple(getattr(input_ids, "shape", ()))
        raise ValueError(
            "input_ids: a tensor [row, token] is needed, as tokenizers give with "
            f"return_tensors='pt'; got {type(input_ids).__name__} {shape}"
        )
    if input_ids.is_floating_point():
        raise ValueError(f"input_ids: whole numbers are needed, got {input_ids.dtype}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: must have the shape of input_ids, {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    if attention_mask is not None and not bool((attention_mask == 1).all()):
        raise ValueError(f"attention_mask: {_NO_PADDING}")
    if attention_mask is None and _looks_padded(model, input_ids):
        raise ValueError(f"input_ids: {_NO_PADDING}. If it is none, give an attention_mask of ones")
    image_token = getattr(model.config, "image_token_id", None)
    if image_token is not None and bool((input_ids == image_token).any()):
        raise ValueError("input_ids: holds image tokens; only text is supported")
    check_others(others)
    return input_ids


def check_others(others: Mapping[str, object]) -> None:
    """Raises ValueError for an input beside tokens on which keys and values would depend."""
    for name, value in others.items():
        if value is None:
            continue
        if name == "token_type_ids" and isinstance(value, torch.Tensor) and not bool(value.any()):
            continue
        raise ValueError(f"{name}: is not supported; only tokens are, input_ids")


_NO_PADDING = (
    "padding is not supported; give prompts of different lengths a session each, "
    "a batch takes prompts of equal length"
)


def _check_config(model: Any) -> None:
    config = model.config
    if config.is_encoder_decoder:
        raise ValueError(
            f"model: {config.model_type} is an encoder-decoder, which is not supported"
        )
    if config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"model: model_type {config.model_type!r} is not supported; "
            f"these are: {', '.join(MODEL_TYPES)}"
        )
    if getattr(model, "hf_quantizer", None) or getattr(config, "quantization_config", None):
        raise ValueError("model: quantized weights are not supported")
    text = config.get_text_config(decoder=True)
    if getattr(text, "use_bidirectional_attention", None):
        raise ValueError(
            "model: use_bidirectional_attention: keys depend on later tokens, so none can be stored"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    for settings in (rope, *(each for each in rope.values() if isinstance(each, dict))):
        if settings.get("rope_type") in _ROPE_OF_LENGTH:
            # Their angles depend on how long the prompt is: so would a key's bytes.
            raise ValueError(f"model: rope_type {settings['rope_type']!r} is not supported")


def _check_weights(model: Any) -> None:
    devices = set()
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not torch.Tensor:
            raise ValueError(
                f"model: {name} is a {type(parameter.data).__name__}; models that are spread over "
                "processes are not supported"
            )
        if parameter.device.type == "meta":
            raise ValueError(f"model: {name} is not in memory (offloaded); it is not supported")
        devices.add(parameter.device)
    if len(devices) != 1:
        raise ValueError(
            f"model: lies on several devices, {', '.join(sorted(map(str, devices)))}; "
            "one is supported"
        )
    if not model.dtype.is_floating_point or model.dtype.itemsize < 2:
        raise ValueError(f"model: dtype {model.dtype} is not supported")


def _looks_padded(model: Any, input_ids: torch.Tensor) -> bool:
    """Whether `generate` itself would take some tokens for padding."""
    pad, eos = model.generation_config.pad_token_id, model.generation_config.eos_token_id
    if pad is None or pad in (eos if isinstance(eos, list) else [eos]):
        return False
    return bool((input_ids == pad).any())

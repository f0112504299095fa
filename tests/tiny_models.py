"""Tiny models of transformers, made on the spot, whose every weight matters to what they say."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

CHUNK = 8
WINDOW = 20
"""No multiple of a chunk, and neither is what a layer keeps."""
VOCABULARY = 101

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
_MIXED = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-sliding": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2-sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", _MIXED | {"query_pre_attn_scalar": 16}),
    "gemma3_text": ("gemma3_text", _MIXED | {"query_pre_attn_scalar": 16}),
    "gemma3": (
        "gemma3",
        {
            "text_config": _BASE | _MIXED | {"query_pre_attn_scalar": 16},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": VOCABULARY - 1,
            "tie_word_embeddings": False,
        },
    ),
}
"""For each name the model type, and what its configuration changes."""


def tiny_model(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A model that answers different prompts differently, and itself in many tokens."""
    kind, settings = FAMILIES[family]
    base = {} if "text_config" in settings else _BASE
    config = AutoConfig.for_model(kind, **(base | settings | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(parameter + 0.1 * noise)
    model.generation_config.eos_token_id = None
    return model.eval()


def prompt(tokens: int, seed: int = 0, rows: int = 1) -> torch.Tensor:
    """Some tokens, [row, token]; none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY - 1, (rows, tokens), generator=generator)

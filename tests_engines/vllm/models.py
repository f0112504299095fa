"""Tiny models, made on the spot: real architectures, random weights that do not degenerate.

Weights are drawn with a spread at which the greedy tokens and their probabilities depend on the
whole context: with the libraries' own spread such small models answer one token for ever, whatever
is in their KV cache.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from tokenizers.trainers import BpeTrainer
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

VOCABULARY = 512
FIRST_TEXT_TOKEN = 3
"""Below it are the tokens that begin, end and pad a text."""
LORA_RANK = 8
SENTENCE = "the store keeps what the engine has read and gives it back when it reads it again. "
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def prompt_of(seed: int, tokens: int) -> list[int]:
    """Token ids that depend on the seed alone; a longer prompt begins with the shorter one."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(FIRST_TEXT_TOKEN, VOCABULARY, (8192,), generator=generator)
    if tokens > len(drawn):
        raise ValueError(f"tokens: at most {len(drawn)}, got {tokens}")
    return [int(token) for token in drawn[:tokens]]


def make_llama(path: Path, *, seed: int = 1, spread: float = 0.3, hidden: int = 256) -> Path:
    """One group of layers with full attention; as many heads as `hidden` has room for."""
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
    }
    config = LlamaConfig(initializer_range=spread, **(_SIZES | sizes))
    return _save(LlamaForCausalLM, config, path, seed)


def make_qwen3(path: Path) -> Path:
    """Full attention with normalised queries and keys."""
    return _save(Qwen3ForCausalLM, Qwen3Config(initializer_range=0.3, **_SIZES), path, 2)


def make_gemma3(path: Path) -> Path:
    """Layers with a sliding window of 256 tokens and with full attention in turn: two groups."""
    config = Gemma3TextConfig(
        initializer_range=0.1,
        sliding_window=256,
        query_pre_attn_scalar=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        **_SIZES,
    )
    return _save(Gemma3ForCausalLM, config, path, 3)


def make_qwen3_next(path: Path) -> Path:
    """Layers with a recurrent state and with full attention in turn: two groups."""
    config = Qwen3NextConfig(
        initializer_range=0.1,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        **_SIZES,
    )
    return _save(Qwen3NextForCausalLM, config, path, 4)


def make_deepseek_v2(path: Path) -> Path:
    """Latent attention: one vector a token and layer, the same for every rank."""
    sizes = _SIZES | {"num_key_value_heads": 4}
    del sizes["head_dim"]
    config = DeepseekV2Config(
        initializer_range=0.1,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=64,
        first_k_dense_replace=1,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        **sizes,
    )
    return _save(DeepseekV2ForCausalLM, config, path, 5)


def make_adapter(path: Path, seed: int, *, base: Path) -> Path:
    """A low-rank adapter of the attention of `base`, written as the usual two files."""
    config = json.loads((base / "config.json").read_text())
    hidden, head = int(config["hidden_size"]), int(config["head_dim"])
    queries = int(config["num_attention_heads"]) * head
    values = int(config["num_key_value_heads"]) * head
    sizes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, values),
        "v_proj": (hidden, values),
        "o_proj": (queries, hidden),
    }
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(int(config["num_hidden_layers"])):
        for name, (inputs, outputs) in sizes.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            down = torch.randn(LORA_RANK, inputs, generator=generator) * 0.3
            up = torch.randn(outputs, LORA_RANK, generator=generator) * 0.3
            weights[f"{stem}.lora_A.weight"] = down
            weights[f"{stem}.lora_B.weight"] = up
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, path / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": LORA_RANK,
        "lora_alpha": 2 * LORA_RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(sizes),
        "base_model_name_or_path": str(base),
    }
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


MAKERS: dict[str, Callable[[Path], Path]] = {
    "llama": make_llama,
    "llama-drafts": lambda path: make_llama(path, spread=0.04),
    "qwen3": make_qwen3,
    "gemma3": make_gemma3,
    "qwen3-next": make_qwen3_next,
    "deepseek-v2": make_deepseek_v2,
}


@dataclass
class Models:
    """The tiny models, each made when it is first asked for."""

    home: Path

    def __getitem__(self, name: str) -> Path:
        path = self.home / name
        return path if path.exists() else MAKERS[name](path)


def _save(model: Callable[[Any], Any], config: Any, path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    made = model(config)
    made.generation_config.eos_token_id = None
    made.to(torch.float32).save_pretrained(path)
    _tokenizer().save_pretrained(path)
    return path


def _tokenizer() -> PreTrainedTokenizerFast:
    plain = Tokenizer(tokenizer_models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator([SENTENCE * 20], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
    )

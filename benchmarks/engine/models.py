"""The models that the worker is measured with."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvstore_workers.demo_model import demo_model_dir

MAX_TOKENS = 4096
VOCABULARY = 4096
SEED = 7


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint, and what it is called in tables."""

    name: str
    checkpoint: Path


def demo_model() -> Model:
    """The small model that comes along: 6 layers, 1.5 KiB of KV for each token."""
    return Model("demo model", demo_model_dir())


def random_model(home: Path) -> Model:
    """Random weights in a shape that is used: 12 layers of width 768, 12 KiB for each token.

    What a model says does not matter to the time that it takes.
    """
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=4, head_dim=64,
        max_position_embeddings=MAX_TOKENS, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    path = home / "random-12x768"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return Model("random weights, 12 layers of 768", path)

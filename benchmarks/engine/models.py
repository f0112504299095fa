"""The models that the worker is measured with."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvstore_workers.demo_model import demo_model_dir

MAX_TOKENS = 4096
LONGEST_TOKENS = 40_960
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


def eight_billion(home: Path, device: torch.device) -> tuple[Model, LlamaForCausalLM]:
    """Random weights in the shape of Llama 3.1 8B: 32 layers of 4096, 128 KiB for each token.

    The checkpoint (16 GB), and the model itself on the device as transformers runs it.
    """
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=LONGEST_TOKENS, rope_theta=500_000.0, bos_token_id=0,
        eos_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    path = home / "random-32x4096"
    with device:
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.eval().save_pretrained(path)
    return Model("random weights, 32 layers of 4096", path), model


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

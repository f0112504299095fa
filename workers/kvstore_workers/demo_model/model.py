"""The demonstration model itself: how it is built, judged, saved and loaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as functional
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from kvstore_workers.demo_model import corpus

LOSS_LIMIT = 3.6


class DemoModelError(Exception):
    """Training or checking cannot go on; the message says what to do."""


@dataclass(frozen=True)
class HeldOut:
    """The windows that the held-out loss is the mean over."""

    windows_256: Tensor
    windows_3000: Tensor

    @classmethod
    def cut(cls, documents: Sequence[Tensor], limit_256: int, limit_3000: int) -> "HeldOut":
        """Return windows cut from `documents`, at most as many as the limits say."""
        return cls(
            corpus.held_out_windows(documents, 256, limit_256),
            corpus.held_out_windows(documents, 3000, limit_3000),
        )

    def losses(self, model: LlamaForCausalLM) -> "Losses":
        """Return the mean losses of `model` at both context lengths."""
        return Losses(
            mean_loss(model, self.windows_256, windows_per_batch=16),
            mean_loss(model, self.windows_3000, windows_per_batch=1),
        )


@dataclass(frozen=True)
class Losses:
    """Held-out losses in nats per token, each named after its context in tokens."""

    held_out_loss_256: float
    held_out_loss_3000: float

    def good(self) -> bool:
        """Return whether both losses are within the limit."""
        return max(self.held_out_loss_256, self.held_out_loss_3000) <= LOSS_LIMIT

    def describe(self) -> str:
        """Return both figures as words."""
        return (
            f"held-out loss {self.held_out_loss_256:.4f} at 256 tokens, "
            f"{self.held_out_loss_3000:.4f} at 3000 tokens"
        )


def build_model(end_id: int, seed: int) -> LlamaForCausalLM:
    """Return an untrained model in float32, its weights drawn from `seed`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=corpus.VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=end_id,
        eos_token_id=end_id,
    )
    return LlamaForCausalLM(config)


def batch_loss(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Return the mean loss in nats of predicting each window's ids after its first."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.dtype == torch.float32):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def mean_loss(model: LlamaForCausalLM, windows: Tensor, windows_per_batch: int) -> float:
    """Return the mean loss over all positions of all windows."""
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(windows), windows_per_batch):
            part = windows[start : start + windows_per_batch]
            total += float(batch_loss(model, part)) * len(part)
    return total / len(windows)


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write config.json and model.safetensors, the weights rounded to bfloat16."""
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(folder)
    tensors = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_model(folder: Path) -> LlamaForCausalLM:
    """Return the model saved in `folder`, in bfloat16 and ready to evaluate."""
    hide_bars: Callable[[], None] = transformers_logging.disable_progress_bar
    hide_bars()
    try:
        model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, local_files_only=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise DemoModelError(f"no model could be loaded from {folder}: {error}") from error
    return model


def final_losses(model: LlamaForCausalLM, documents: Sequence[Tensor]) -> Losses:
    """Return the losses that count, over many held-out windows; `model` is the saved one."""
    return HeldOut.cut(documents, limit_256=480, limit_3000=48).losses(model)

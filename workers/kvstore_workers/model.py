"""A Llama-like model from a local checkpoint, computing over the VRAM pool."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from kvstore.api.errors import ConfigError
from kvstore_workers import attention
from kvstore_workers.attention import Plan, Row
from kvstore_workers.vram import VramPool, torch_dtype

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_OF_LENGTH = ("dynamic", "longrope")


class DecodeRow(NamedTuple):
    """One request's share of a decode step."""

    token: int
    position: int
    table: torch.Tensor
    """All its blocks in order, on the model's device; int64."""


class PagedModel:
    """Runs prefill chunks and decode steps whose keys and values lie in a VRAM pool.

    Invariant: what a row computes depends on its own tokens and on fixed shapes only. A chunk is
    computed alone; a decode step always has `width` rows, padded where fewer requests run.
    """

    def __init__(self, model: Any, vram: VramPool, width: int) -> None:
        self._model = model
        self._vram = vram
        self._width = width
        config = model.config
        self._groups = config.num_attention_heads // vram.layout.kv_heads
        self._block_tokens = vram.layout.block_tokens
        self._dtype = torch_dtype(vram.layout.dtype)
        self.max_tokens: int = config.max_position_embeddings
        """Longest context that the model was built for."""
        self.vocabulary: int = config.vocab_size
        self.eos_tokens = _eos_tokens(model)
        """Tokens that end an answer."""

    @torch.inference_mode()
    def prefill(
        self, tokens: Sequence[int], start: int, table: torch.Tensor, *, want_logits: bool
    ) -> torch.Tensor | None:
        """The logits after the last of `tokens`, [vocabulary], if they are wanted.

        `tokens` stand at positions from `start` on; what lies before must be in the blocks of
        `table`. Their keys and values are in the pool once the compute stream gets there.
        """
        end = start + len(tokens)
        device = self._vram.device
        positions = torch.arange(start, end, device=device)
        mask = attention.causal_mask(start, end, self._groups, self._dtype, device)
        plan = Plan(
            vram=self._vram,
            write_blocks=table[positions // self._block_tokens],
            write_slots=positions % self._block_tokens,
            rows=(Row(self._context(table, end), end, mask),),
        )
        ids = torch.tensor([list(tokens)], device=device)
        hidden = self._hidden(ids, positions[None], plan)
        return self._model.lm_head(hidden[0, -1:])[0] if want_logits else None

    @torch.inference_mode()
    def decode(self, rows: Sequence[DecodeRow]) -> torch.Tensor:
        """The logits after each row's token; [len(rows), vocabulary]. At most `width` rows."""
        device = self._vram.device
        padding = [0] * (self._width - len(rows))
        ids = torch.tensor([[row.token] for row in rows] + [[0] for _ in padding], device=device)
        places = [row.position for row in rows]
        positions = torch.tensor(places + padding, device=device)
        live = positions[: len(rows)]
        tables = [self._context(row.table, row.position + 1) for row in rows]
        plan = Plan(
            vram=self._vram,
            write_blocks=torch.stack([table[-1] for table in tables]),
            write_slots=live % self._block_tokens,
            rows=tuple(
                Row(table, place + 1, None) for table, place in zip(tables, places, strict=True)
            ),
        )
        hidden = self._hidden(ids, positions[:, None], plan)
        logits: torch.Tensor = self._model.lm_head(hidden)
        return logits[: len(rows), 0]

    def _hidden(self, ids: torch.Tensor, positions: torch.Tensor, plan: Plan) -> torch.Tensor:
        output = self._model.model(
            input_ids=ids, position_ids=positions, use_cache=False, plan=plan
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def _context(self, table: torch.Tensor, length: int) -> torch.Tensor:
        return table[: -(-length // self._block_tokens)]


def load_model(checkpoint: Path, vram: VramPool, width: int) -> PagedModel:
    """The model of a checkpoint directory, in the pool's dtype and on its device.

    Reads safetensors only, from the local disk only. Raises `ConfigError` for a model that this
    worker cannot run without a difference.
    """
    check_config(AutoConfig.from_pretrained(checkpoint, local_files_only=True))
    attention.register()
    with _no_progress_bar():
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            attn_implementation=attention.NAME,
            dtype=torch_dtype(vram.layout.dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    return PagedModel(model.to(vram.device).eval(), vram, width)


def describe_numerics(device: torch.device, chunk_tokens: int) -> str:
    """What decides the last bit of a block beside weights and tokens, for a space's descriptor."""
    if device.type == "cuda":
        processor = f"{torch.cuda.get_device_name(device)} fused"
    else:
        processor = f"{_instruction_set()} threads={torch.get_num_threads()}"
    version = torch.__version__.partition("+")[0]
    return f"prefill={chunk_tokens} torch={version} {device.type} {processor}"


def _instruction_set() -> str:
    # oneDNN multiplies bf16 in tiles where it can, and older torch cannot say whether it does.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    tiles = "+AMX" if capabilities.get("amx_bf16") else ""
    return torch.backends.cpu.get_cpu_capability() + tiles


def check_config(config: Any) -> None:
    """Raises `ConfigError` for a model that pages of full attention cannot serve exactly."""
    if config.model_type not in MODEL_TYPES:
        raise ConfigError(
            f"checkpoint: model_type must be one of {', '.join(MODEL_TYPES)}, "
            f"got {config.model_type!r}"
        )
    layer_types = getattr(config, "layer_types", None) or ()
    if getattr(config, "sliding_window", None) or "sliding_attention" in layer_types:
        raise ConfigError("checkpoint: sliding-window attention is not supported")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _ROPE_OF_LENGTH:
        # Their angles depend on the longest context in the batch: a key's bytes would depend on
        # what came later and who ran beside it.
        raise ConfigError(f"checkpoint: rope_type {rope['rope_type']!r} is not supported")


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _eos_tokens(model: Any) -> frozenset[int]:
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = model.config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)

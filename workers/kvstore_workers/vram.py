"""The tensor that holds all KV of one worker: on the GPU if there is one, else in host memory."""

import hashlib

import torch

from kvstore_workers.layout import KVLayout

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(name: str | None = None) -> torch.device:
    """The named device; without a name the first GPU, or the CPU where there is none."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a layout's dtype."""
    return _DTYPES[name]


class VramPool:
    """The KV of all requests of a worker, cut into blocks. Who owns which is `BlockPool`'s matter.

    Invariant: a block is contiguous, so that its bytes are one piece of memory.
    """

    def __init__(self, layout: KVLayout, blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.device = device
        self.tensor = torch.zeros(
            (blocks, *layout.block_shape), dtype=_DTYPES[layout.dtype], device=device
        )
        """Shape [blocks, layers, 2, kv_heads, block_tokens, head_dim]."""
        self.bytes = self.tensor.view(blocks, -1).view(torch.uint8)
        """The same memory as bytes; shape [blocks, block_bytes]."""

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return self.tensor.shape[0]

    def layer(self, index: int) -> torch.Tensor:
        """A view of one layer of all blocks; [blocks, 2, kv_heads, block_tokens, head_dim]."""
        return self.tensor[:, index]

    def sha256(self, block: int) -> bytes:
        """The SHA-256 of the bytes that lie in a block now. Waits for the current stream."""
        return hashlib.sha256(self.bytes[block].cpu().numpy().data).digest()

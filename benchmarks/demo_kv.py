"""The demo model's own keys and values: the blocks that codecs are measured on, and what they cost.

Text that the model was not trained on is filled into a VRAM pool by the worker's own code; blocks
are the very bytes that the worker would store. Its default cut is used.
"""

from collections.abc import Callable, Sequence

import torch
from tokenizers import Tokenizer

from kvstore_workers.demo_model import corpus, demo_model_dir
from kvstore_workers.layout import KVLayout, read_layout
from kvstore_workers.model import DecodeRow, PagedModel, load_model
from kvstore_workers.vram import VramPool

BLOCK_TOKENS, CHUNK_TOKENS = 32, 128
WIDTH = 1
"""Rows of a decode step: one request at a time is enough here."""


def held_out_texts(count: int, tokens: int) -> list[list[int]]:
    """Beginnings of held-out files, each so many tokens long."""
    tokenizer: Tokenizer = Tokenizer.from_file(str(demo_model_dir() / "tokenizer.json"))
    sources = sorted(corpus.load_split().held_out, key=lambda source: -source.size_bytes)
    documents = corpus.encode_documents(tokenizer, sources[: 2 * count])
    return [document[:tokens].tolist() for document in documents if len(document) >= tokens][:count]


class DemoKV:
    """The demo model over a pool that holds one text and what is generated behind it."""

    def __init__(self, dtype: str, tokens: int) -> None:
        blocks = -(-tokens // BLOCK_TOKENS)
        self.layout: KVLayout = read_layout(demo_model_dir(), BLOCK_TOKENS, dtype)
        self._vram = VramPool(self.layout, blocks, torch.device("cpu"))
        self._model: PagedModel = load_model(demo_model_dir(), self._vram, WIDTH)
        self._table = torch.arange(blocks)

    def blocks(self, text: Sequence[int]) -> list[bytes]:
        """The blocks of a text's full chunks, as the worker stores them."""
        for start in range(0, len(text), CHUNK_TOKENS):
            part = text[start : start + CHUNK_TOKENS]
            self._model.prefill(part, start, self._table, want_logits=False)
        whole = len(text) // CHUNK_TOKENS * CHUNK_TOKENS // BLOCK_TOKENS
        return [self._vram.bytes[block].numpy().tobytes() for block in range(whole)]

    def logits(
        self, text: Sequence[int], start: int, through: Callable[[bytes], bytes] = bytes
    ) -> torch.Tensor:
        """What the model says before each token of a text from the `start` one on.

        All that lies before went through something: `start` - 1 is a whole number of chunks, and
        the next token the first that is computed over what came back. [tokens, vocabulary]
        """
        for index, block in enumerate(self.blocks(text[: start - 1])):
            came = torch.frombuffer(bytearray(through(block)), dtype=torch.uint8)
            self._vram.bytes[index] = came
        rows = [DecodeRow(text[place], place, self._table) for place in range(start - 1, len(text))]
        return torch.cat([self._model.decode([row]) for row in rows[:-1]]).float()

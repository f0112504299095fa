"""The text the demonstration model learns from: the running interpreter's standard library.

Files are split into training and held-out files by a hash of their relative path, so the split
depends neither on the seed nor on the order in which a file system lists its folders.
"""

import hashlib
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END_TEXT = "<|end|>"
VOCABULARY = 4096
HELD_OUT_SHARE = 0.05
LONG_FILE_BYTES = 16_000
LONG_FILES_HELD_OUT_MIN = 24

# Tables of code points, one giant escaped string, and files that are broken on purpose: they are
# Python only by name, and a model that learns them writes worse Python.
SKIPPED_FOLDERS = (
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
    "lib2to3/tests/data",
    "test/encoded_modules",
)


class CorpusError(Exception):
    """The standard library found here cannot serve as a corpus; the message says why."""


@dataclass(frozen=True)
class Source:
    """One file of the standard library."""

    relative_path: str
    text: str

    @property
    def size_bytes(self) -> int:
        """Return the length of the text in UTF-8."""
        return len(self.text.encode())

    @property
    def rank(self) -> float:
        """Return the file's place in [0, 1), drawn from a hash of its path alone."""
        head = hashlib.sha256(self.relative_path.encode()).digest()[:8]
        return int.from_bytes(head, "big") / 2**64


@dataclass(frozen=True)
class Split:
    """The training files and the held-out files; no file is in both."""

    training: tuple[Source, ...]
    held_out: tuple[Source, ...]

    def describe(self) -> str:
        """Return one sentence that names the Python version, the files and the bytes."""
        trained, held = (
            f"{len(part)} files, {sum(source.size_bytes for source in part)} bytes"
            for part in (self.training, self.held_out)
        )
        return (
            f"standard library of {platform.python_implementation()} {platform.python_version()}: "
            f"{trained} to train on; {held} held out"
        )


def load_split(root: Path | None = None) -> Split:
    """Return the split of the standard library under `root`, by default the interpreter's own."""
    folder = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    sources = _read_sources(folder)
    if not sources:
        raise CorpusError(
            f"no Python sources under {folder}: this interpreter may keep its standard library in "
            "an archive; use one that installs it as plain files"
        )
    return split_sources(sources)


def split_sources(sources: Sequence[Source]) -> Split:
    """Return `sources` split by path hash, with enough long files among the held-out ones."""
    ranked = sorted(sources, key=lambda source: source.rank)
    held = {source.relative_path for source in ranked if source.rank < HELD_OUT_SHARE}
    long = [source.relative_path for source in ranked if source.size_bytes >= LONG_FILE_BYTES]
    held.update(long[:LONG_FILES_HELD_OUT_MIN])
    return Split(
        training=tuple(source for source in sources if source.relative_path not in held),
        held_out=tuple(source for source in sources if source.relative_path in held),
    )


def _read_sources(folder: Path) -> list[Source]:
    """Return every usable file under `folder`, sorted by relative path."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    found = []
    for relative_path in sorted(paths):
        if any(f"/{skipped}/" in f"/{relative_path}" for skipped in SKIPPED_FOLDERS):
            continue
        try:
            text = paths[relative_path].read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            found.append(Source(relative_path, text))
    return found


def train_tokenizer(sources: Sequence[Source]) -> Tokenizer:
    """Return a byte-level BPE tokenizer of `VOCABULARY` tokens learnt from `sources`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((source.text for source in sources), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise CorpusError(
            f"the sources gave only {tokenizer.get_vocab_size()} of {VOCABULARY} tokens: "
            "there is too little text to learn from"
        )
    return tokenizer


def end_id(tokenizer: Tokenizer) -> int:
    """Return the id of the end token, which also opens every document."""
    token_id = tokenizer.token_to_id(END_TEXT)
    if token_id is None:
        raise CorpusError(f"the tokenizer has no {END_TEXT} token: it is not this model's own")
    return int(token_id)


def encode_documents(tokenizer: Tokenizer, sources: Sequence[Source]) -> list[Tensor]:
    """Return each source as token ids, the end token first."""
    first = end_id(tokenizer)
    encodings = tokenizer.encode_batch([source.text for source in sources])
    return [torch.tensor([first, *encoding.ids]) for encoding in encodings]


def held_out_windows(documents: Sequence[Tensor], context_tokens: int, limit: int) -> Tensor:
    """Return at most `limit` windows of `context_tokens` + 1 ids, none across two documents."""
    windows = [
        document[start : start + context_tokens + 1]
        for document in documents
        for start in range(0, len(document) - context_tokens, context_tokens)
    ]
    if not windows:
        raise CorpusError(f"no held-out file is longer than {context_tokens} tokens")
    count = min(limit, len(windows))
    # Evenly spaced, so that a small limit still visits many files.
    return torch.stack([windows[index * len(windows) // count] for index in range(count)])


def join_documents(documents: Sequence[Tensor], seed: int) -> Tensor:
    """Return all documents as one stream of ids, in an order drawn from `seed`."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    return torch.cat([documents[index] for index in order.tolist()])


def training_batches(
    stream: Tensor, context_tokens: int, windows_per_batch: int, seed: int
) -> Iterator[Tensor]:
    """Yield batches of windows of `context_tokens` + 1 ids without end, epoch after epoch.

    Within an epoch no window comes twice; each epoch cuts the stream at another offset.
    """
    if len(stream) < context_tokens * (windows_per_batch + 1) + 1:
        raise CorpusError(f"the training text is shorter than one batch at {context_tokens} tokens")
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(context_tokens, (1,), generator=generator))
        windows = stream[offset:].unfold(0, context_tokens + 1, context_tokens)
        order = torch.randperm(len(windows), generator=generator)
        for start in range(0, len(windows) - windows_per_batch + 1, windows_per_batch):
            yield windows[order[start : start + windows_per_batch]]

"""Long documents that every machine has: sources of Python's standard library."""

import sysconfig
from pathlib import Path

from tokenizers import Tokenizer

from kvstore.api.errors import ConfigError


def load_tokenizer(checkpoint: Path) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises ConfigError if it has none that is fast."""
    path = checkpoint / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  The library raises no narrower class.
        raise ConfigError(f"--model: {path} is no tokenizer: {error}") from None


def document_tokens(tokenizer: Tokenizer, module: str, owner: str, tokens: int) -> list[int]:
    """The first `tokens` tokens of a module's source, under a heading that names its owner."""
    path = Path(sysconfig.get_paths()["stdlib"]) / module
    text = f"# Filed for {owner}: {module}\n\n{path.read_text(encoding='utf-8')}"
    found: list[int] = tokenizer.encode(text).ids[:tokens]
    if len(found) < tokens:
        raise ConfigError(f"{module}: has {len(found)} tokens, {tokens} are needed")
    return found

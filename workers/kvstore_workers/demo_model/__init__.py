"""The demonstration model: a small Llama trained on the Python standard library.

The package folder holds both the trainer (``python -m kvstore_workers.demo_model.train``) and what
it last wrote: ``config.json``, ``model.safetensors``, ``tokenizer.json``, ``loss.jsonl`` and
``digest.json``.
"""

from pathlib import Path

__all__ = ["demo_model_dir"]


def demo_model_dir() -> Path:
    """Return the folder that holds the model's files."""
    return Path(__file__).resolve().parent

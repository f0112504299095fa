"""Names of weights: what tells one checkpoint, or adapter, from another one.

A path names a place and not what lies there, so a local checkpoint is named by a digest of its
content. A snapshot of the hub has a commit.
"""

import hashlib
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvstore_client.engine.background import in_background

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz"}
_CODE = {".py"}
"""A checkpoint may bring its own model."""
_SETTINGS = {
    "config.json", "params.json", "adapter_config.json",
    "quantize_config.json", "quant_config.json", "hf_quant_config.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
}  # fmt: skip
_COMMIT = re.compile(r"[0-9a-f]{40}")
_READERS = 4

Identity = tuple[tuple[str, int, int, int, int, int], ...]
"""Of each file its name, device, inode, size, and when content and inode changed, in ns."""

_digests: dict[Path, tuple[Identity, str]] = {}
_lock = threading.Lock()


def weights_identity(path: Path) -> Identity:
    """What the file system says of a checkpoint's files: when it differs, so may their content.

    Raises ValueError if there are no weights.
    """
    return tuple(_identity(name, file) for name, file in _files(path))


def weights_changed_ns(path: Path) -> int:
    """When content or inode of a checkpoint's files last changed, on the system's clock.

    Raises ValueError if there are no weights.
    """
    return max(changed_ns for *_, changed_ns in weights_identity(path))


def checkpoint_digest(path: Path) -> str:
    """The SHA-256, in hex, of the weights, settings and code of a checkpoint or an adapter.

    `path` is a directory, or a file that holds all. Reads it whole, the first time and whenever
    `weights_identity` differs. Raises ValueError if there are no weights or they change meanwhile.
    """
    identity = weights_identity(path)
    with _lock:
        known = _digests.get(path)
        if known is not None and known[0] == identity:
            return known[1]
        files = _files(path)
        contents = _content_digests([file for _, file in files])
        if weights_identity(path) != identity:
            raise ValueError(f"{path}: changes while it is read")
        whole = hashlib.sha256(b"kvstore weights 1")
        for (name, _), content in zip(files, contents, strict=True):
            whole.update(len(name.encode()).to_bytes(8, "little"))
            whole.update(name.encode())
            whole.update(content)
        _digests[path] = identity, whole.hexdigest()
        return whole.hexdigest()


def model_revision(model: str, revision: str | None = None) -> str:
    """What names the weights that an engine loads as `model`: a path, or a name on the hub.

    Raises ValueError if that cannot be told.
    """
    if Path(model).exists():
        return checkpoint_digest(Path(model))
    if revision and _COMMIT.fullmatch(revision):
        return revision
    commit = _commit_in_cache(model, revision)
    if commit is None:
        raise ValueError(
            f"model {model!r}: neither a path nor a snapshot in the hub's cache, so its weights "
            "have no name; set model_revision, or the engine's revision to a whole commit"
        )
    return commit


def _commit_in_cache(model: str, revision: str | None) -> str | None:
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        return None
    parts = Path(found).parts if isinstance(found, str) else ()
    return next((part for part in reversed(parts) if _COMMIT.fullmatch(part)), None)


def _files(path: Path) -> list[tuple[str, Path]]:
    """Names below the checkpoint, and where they lie; in an order of their own."""
    if path.is_file():
        return [("", path)]
    files = sorted(
        (file.relative_to(path).as_posix(), file)
        for file in path.rglob("*")
        if (file.suffix in _WEIGHTS | _CODE or file.name in _SETTINGS) and file.is_file()
    )
    if not any(file.suffix in _WEIGHTS for _, file in files):
        raise ValueError(f"{path}: no weights there ({', '.join(sorted(_WEIGHTS))})")
    return files


def _identity(name: str, file: Path) -> tuple[str, int, int, int, int, int]:
    status = file.stat()
    return (
        name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns,
    )  # fmt: skip


def _content_digests(files: Sequence[Path]) -> list[bytes]:
    """Of each file, read by a few threads at once, which do not hold up the end of the process."""
    digests = [b""] * len(files)
    left = iter(range(len(files)))

    def read(left: Iterator[int]) -> None:
        for index in left:
            digests[index] = _content_digest(files[index])

    for reader in [in_background(lambda: read(left)) for _ in range(_READERS)]:
        reader.result()
    return digests


def _content_digest(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()

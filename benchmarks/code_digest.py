"""Which code a figure was measured on: a digest that comments and layout do not change."""

import ast
import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def code_digest(beside: Sequence[str] = ()) -> str:
    """The digest of the modules of this repository that this process has loaded.

    Those whose path begins as one of `beside` are loaded, but not under test.
    """
    digest = hashlib.sha256()
    for path in sorted(_loaded()):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(tuple(beside)):
            continue
        digest.update(name.encode() + b"\0")
        digest.update(_meaning(path.read_text()).encode() + b"\0")
    return digest.hexdigest()[:16]


def _loaded() -> Iterator[Path]:
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        path = Path(file) if file else ROOT
        if path.suffix == ".py" and path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            yield path


def _meaning(source: str) -> str:
    """The program without its comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [each for each in body if not _is_text(each)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(node: ast.AST) -> bool:
    """A docstring, or a line that stands for one behind an attribute."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )

"""The examples do what the docs say, with a node and a model that are really there."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore_workers.demo_model import demo_model_dir
from tests.node_process import NodeProcess

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeProcess]:
    """A node of one test."""
    node = NodeProcess(tmp_path)
    node.start()
    yield node
    node.kill()


def test_stored_prompts_are_restored_by_the_second_run(node: NodeProcess) -> None:
    """Two processes, one after the other: the same words, most of the prompt restored."""
    text = ROOT / "examples" / "stored_prompts.py"
    runs = [
        subprocess.run(
            [sys.executable, ROOT / "examples/stored_prompts.py", demo_model_dir(), text,
             node.endpoint],
            check=True, capture_output=True, text=True,
        ).stdout
        for _ in range(2)
    ]  # fmt: skip
    (first_words, first), (words, second) = (run.strip().rsplit("\n", 1) for run in runs)
    assert first_words == words
    page = (ROOT / "docs" / "transformers.md").read_text()
    assert "demo_model examples/stored_prompts.py\n" in page
    assert first.startswith("0 of 408 tokens restored")
    assert second.startswith("256 of 408 tokens restored")
    assert "`0 of 408 tokens restored`, the second `256 of 408`" in page

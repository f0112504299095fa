"""What the tests of vLLM's connector share."""

import asyncio
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.stand_ins.vllm_mini_engine import MiniEngine, Request

Start = Callable[..., MiniEngine]
PATIENT = {
    "match_budget_s": 30,
    "load_budget_s": 30,
    "store_budget_s": 30,
    "lease_ms": 60_000,
    "restore_gate": False,
}
PROMPT = [(7 * number) % 251 for number in range(50)]
"""Twelve whole blocks of four tokens, and two tokens."""


def weights(path: Path, content: bytes) -> Path:
    """A directory that has weights."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(content)
    return path


async def answers(engine: MiniEngine, *prompts: Sequence[int], **more: Any) -> list[Request]:
    """Requests together, to their end, and everything stored that is to be."""

    def run() -> list[Request]:
        requests = [engine.add(prompt, **more) for prompt in prompts]
        engine.run()
        engine.saved()
        return requests

    return await asyncio.to_thread(run)


def output(finished: Collection[str] = (), failed: Collection[str] = ()) -> Any:
    """What the workers report after a step."""
    return SimpleNamespace(
        finished_recving=set(finished),
        failed_recving=set(failed),
        invalid_block_ids=set(),
        kv_connector_worker_meta=None,
    )

"""KVStoreConnector with its KV cache on a GPU: pinned memory, streams of its own, events."""

import asyncio

import pytest
import torch

from tests.scripted_node import NodeThread
from tests.stand_ins.vllm_mini_engine import full, window
from tests.vllm_rig import PROMPT, Start, answers

pytest_plugins = ["tests.vllm_fixtures"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("groups", [[full()], [full(), window(100)]], ids=["full", "window"])
async def test_what_a_gpu_computes_another_engine_restores(
    groups: list[object], remote: NodeThread, start: Start
) -> None:
    """Pages are written over at once, and each that is looked at is right to the byte."""
    first = await asyncio.to_thread(start, remote, groups, device="cuda", pages=60)
    prompts = [[number, *PROMPT] for number in range(4)]
    for prompt in prompts:
        await answers(first, prompt, outputs=3)
    second = await asyncio.to_thread(start, remote, groups, device="cuda")
    for prompt in prompts:
        (read,) = await answers(second, prompt, outputs=3)
        assert read.restored == 48

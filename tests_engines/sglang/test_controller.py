"""SGLang's controller and its threads over the backend: backup, prefetch, detach."""

from collections.abc import Callable, Iterator

import pytest
import torch

from tests_engines.sglang.controller import Engine, engine
from tests_engines.sglang.rig import LAYOUTS, Node, device_pool, fill, keys_of, mha, pages

PROMPT = list(range(64))
LATER = list(range(64, 96))


@pytest.fixture(params=LAYOUTS)
def running(
    request: pytest.FixtureRequest,
    start_node: Callable[..., Node],
    group: torch.distributed.ProcessGroup,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Engine]:
    """A controller over a node, for each layout of the host pool."""
    pool = mha(request.param)
    fill(pool, 2)
    with engine(pool, device_pool(), start_node().endpoint, group, monkeypatch) as run:
        yield run


def test_what_was_backed_up_is_prefetched_bit_exact(running: Engine) -> None:
    """The threads store a prompt, find its pages in a longer one, and bring them back."""
    stored = running.pool.alloc(64)
    before = pages(running.pool, stored)
    assert running.backup(PROMPT, stored, []) == 64
    found = running.find(PROMPT + LATER)
    assert found.storage_hit_count == 64
    completed, into = running.fetch(found)
    assert completed == 64
    assert pages(running.pool, into) == before
    assert running.backup(PROMPT + LATER, running.pool.alloc(32), keys_of(PROMPT)) == 32
    assert running.prefetch(PROMPT + LATER)[0] == 96


def test_detach_ends_the_threads_and_the_connection(running: Engine) -> None:
    """Nothing of the backend is left, and it can be attached again."""
    backend = running.controller.storage_backend
    running.controller.detach_storage_backend()
    assert running.controller.storage_backend is None
    assert backend._client.closed
    assert backend.batch_exists(keys_of(PROMPT)) == 0

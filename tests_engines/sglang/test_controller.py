"""SGLang's controllers and their threads over the backend: backup, prefetch, detach."""

from collections.abc import Callable, Iterator

import pytest
import torch

from tests_engines.sglang.controller import HYBRID, PLAIN, Engine, engine
from tests_engines.sglang.rig import LAYOUTS, Node, device_pool, fill, keys_of, mha, pages

PROMPT = list(range(64))
LATER = list(range(64, 96))
CASES = [(kind, layout, 1) for kind in (HYBRID, PLAIN) for layout in LAYOUTS]
CASES += [(HYBRID, "page_first", 0)]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}-v{case[2]}")
def running(
    request: pytest.FixtureRequest,
    start_node: Callable[..., Node],
    group: torch.distributed.ProcessGroup,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Engine]:
    """A controller over a node: each layout of the host pool, and the copying interface."""
    kind, layout, interface_v1 = request.param
    pool = mha(layout)
    fill(pool, 2)
    with engine(
        pool, device_pool(), start_node().endpoint, group, monkeypatch, kind,
        interface_v1=interface_v1,
    ) as run:  # fmt: skip
        yield run


def test_what_was_backed_up_is_prefetched_bit_exact_and_detach_is_clean(running: Engine) -> None:
    """The threads store a prompt, find its pages in a longer one, bring them back, and end.

    The same tokens under a salt have pages of their own.
    """
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

    assert running.prefetch(PROMPT, salt="tenant")[0] == 0
    salted = running.pool.alloc(64)
    assert running.backup(PROMPT, salted, [], salt="tenant") == 64
    completed, into = running.prefetch(PROMPT, salt="tenant")
    assert completed == 64
    assert pages(running.pool, into) == pages(running.pool, salted) != before

    backend = running.controller.storage_backend
    running.controller.detach_storage_backend()
    assert running.controller.storage_backend is None
    assert backend._client.closed
    assert backend.batch_exists(keys_of(PROMPT)) == 0

"""What the store does never changes what `generate` says, and never holds it up or ends it."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore_client.engine.options import EngineOptions
from kvstore_client.transformers.groups import layer_groups
from kvstore_client.transformers.restore import Restorer
from kvstore_client.transformers.saving import Saving
from tests.node_process import NodeProcess
from tests.scripted_node import NodeThread, refusing
from tests.tiny_models import CHUNK, prompt, tiny_model
from tests.transformers_rig import (
    PATIENCE_S,
    answer,
    ask,
    assert_same,
    computed,
    patient,
    plain,
)

pytest_plugins = ["tests.transformers_fixtures"]

TOKENS = prompt(4 * CHUNK + 1)
FAR_BELOW_FOREVER_S = 20.0


async def hangs(request: object, context: object) -> Any:
    """Never answers."""
    await asyncio.Event().wait()


async def hangs_while_it_streams(request: object, context: object) -> Any:
    """Never says anything."""
    await asyncio.Event().wait()
    yield


async def promises_everything(request: pb.MatchRequest, context: object) -> pb.MatchReply:
    """Says that all of a chain is there."""
    blocks = len(request.keys) // 32
    runs = [pb.Run(blocks=blocks, tier="memory", leased=True)]
    spaces = [pb.SpaceMatch(runs=runs) for _ in request.space_ids]
    return pb.MatchReply(matched_blocks=blocks, spaces=spaces, lease_id=b"l", lease_ms=1000)


def test_without_a_node_it_is_a_plain_generate(llama: Any, node: NodeProcess) -> None:
    """Nothing is restored and nothing stored; nothing is raised, and what is lost is counted."""
    node.kill()
    with patient(llama, node.endpoint) as cache:
        assert ask(cache, llama, TOKENS)[0] == 0
        assert cache.counters["failed_blocks"] == 4
        assert cache.counters["match_failed"] == 1


def test_a_node_that_is_killed_between_any_two_steps_is_not_missed(
    llama: Any, node: NodeProcess
) -> None:
    """Between load and store, and before the next load."""
    with patient(llama, node.endpoint, store_budget_s=1.0) as cache:
        assert ask(cache, llama, TOKENS)[0] == 0
        with cache.session(TOKENS) as session:
            assert session.restored_tokens == 4 * CHUNK
            node.kill()
            assert_same(answer(llama, **session.inputs), plain(llama, TOKENS))
        longer = torch.cat([TOKENS, prompt(CHUNK)], dim=1)
        assert ask(cache, llama, longer)[0] == 0


def test_a_frozen_node_costs_its_budgets(llama: Any, node: NodeProcess) -> None:
    """It is there and says nothing: one match is waited for, and no store."""
    options = {"match_budget_s": 0.2, "load_budget_s": 0.2, "store_budget_s": 0.2}
    with patient(llama, node.endpoint, **options) as cache:
        assert ask(cache, llama, TOKENS)[0] == 0
        node.freeze()
        began_s = time.monotonic()
        with cache.session(TOKENS) as session:
            assert session.restored_tokens == 0
            assert time.monotonic() - began_s < FAR_BELOW_FOREVER_S
            assert_same(answer(llama, **session.inputs), plain(llama, TOKENS))
        assert cache.counters["match_late"] == 1


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(
    ("method", "script"),
    [
        ("Match", hangs),
        ("Match", refusing(grpc.StatusCode.RESOURCE_EXHAUSTED)),
        ("Match", promises_everything),
        ("Read", hangs_while_it_streams),
        ("Write", hangs_while_it_streams),
    ],
    ids=["match hangs", "match refused", "match lies", "read hangs", "write hangs"],
)
def test_a_call_that_goes_wrong_is_a_miss(
    family: str, method: str, script: Callable[..., Any], scripted: NodeThread
) -> None:
    """Each of them alone, once nothing is stored yet and once everything is."""
    model = tiny_model(family)
    options = {"match_budget_s": 1.0, "load_budget_s": 0.5, "store_budget_s": 1.0}
    with patient(model, scripted.endpoint, **options) as cache:
        for _ in range(2):
            scripted.node.play(method, *[script] * 2)
            with cache.session(TOKENS) as session:
                assert_same(answer(model, **session.inputs), plain(model, TOKENS))
            assert cache.drain(PATIENCE_S)
            scripted.node.scripts.clear()
            ask(cache, model, TOKENS)


@pytest.mark.parametrize(("family", "restored"), [("llama", 2 * CHUNK), ("gemma2", 0)])
def test_a_damaged_block_is_computed_and_stored_again(
    family: str, restored: int, scripted: NodeThread
) -> None:
    """One flipped bit: what lies before it is used, unless a window needs more."""
    model = tiny_model(family)
    with patient(model, scripted.endpoint) as cache:
        ask(cache, model, TOKENS)
        space = cache._prompts(TOKENS, b"", None, cache._look()).spaces[0]
        keys = cache._prompts(TOKENS, b"", None, cache._look()).keys[0]
        data, digest = scripted.node.blocks[space.space_id, keys[2]]
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 1
        scripted.node.blocks[space.space_id, keys[2]] = bytes(flipped), digest
        assert ask(cache, model, TOKENS)[0] == restored
        assert cache.counters["load_corrupt"] == 1
        del scripted.node.blocks[space.space_id, keys[2]]
        assert ask(cache, model, TOKENS)[0] == 2 * CHUNK
        assert ask(cache, model, TOKENS)[0] == 4 * CHUNK


def test_a_flipped_bit_on_disk_is_computed_and_stored_again(node: NodeProcess) -> None:
    """The files of a stopped node, changed by one bit inside one block."""
    model = tiny_model("llama")
    node.stop()
    node.start("--disk-codec", "raw")
    with patient(model, node.endpoint) as cache:
        ask(cache, model, TOKENS)
    node.stop()
    _, chunks = computed(model, TOKENS, 4 * CHUNK)
    halves = [half[0] for layer in chunks[1] for half in layer]
    wanted = torch.stack(halves).numpy().tobytes()
    found = [(file, file.read_bytes().find(wanted)) for file in node.home.rglob("blocks/*")]
    ((file, place),) = [(file, place) for file, place in found if place >= 0]
    with file.open("r+b") as stream:
        stream.seek(place + len(wanted) // 2)
        byte = stream.read(1)[0]
        stream.seek(place + len(wanted) // 2)
        stream.write(bytes([byte ^ 1]))
    node.start()
    with patient(model, node.endpoint) as cache:
        assert ask(cache, model, TOKENS)[0] == CHUNK
        assert ask(cache, model, TOKENS)[0] == 4 * CHUNK


def test_what_finds_no_room_is_dropped_and_counted(scripted: NodeThread, llama: Any) -> None:
    """The rest of the prompt with it: blocks without those before them are of no use."""
    block_bytes = 4 * 2 * 2 * CHUNK * 16 * 4
    scripted.node.play("Write", hangs_while_it_streams)
    options = {"max_saving_bytes": 2 * block_bytes, "store_budget_s": 1.0}
    with patient(llama, scripted.endpoint, **options) as cache:
        with cache.session(TOKENS) as session:
            assert_same(answer(llama, **session.inputs), plain(llama, TOKENS))
        assert cache.counters["dropped_tokens"] == 2 * CHUNK
        assert cache.drain(PATIENCE_S)


def test_an_adapter_without_room_stores_nothing(scripted: NodeThread, llama: Any) -> None:
    """`max_saving_bytes` 0 only reads."""
    with patient(llama, scripted.endpoint, max_saving_bytes=0) as cache:
        assert ask(cache, llama, TOKENS)[0] == 0
        assert scripted.node.calls["Write"] == 0


class Broken:
    """A client, or a queue, that raises what no one expects."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{name}: nobody expects this")


def test_a_mistake_of_ours_is_a_miss_too(
    llama: Any, scripted: NodeThread, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is raised on the way to the store and back: it is logged, and no more."""
    broken: Any = Broken()
    past = DynamicCache(config=llama.config)
    groups = layer_groups(llama.config, torch.float32, CHUNK)
    counters: Counter[str] = Counter()
    with patient(llama, scripted.endpoint) as cache:
        prompts = cache._prompts(TOKENS, b"", None, cache._look())
    with caplog.at_level(logging.ERROR):
        restorer = Restorer(broken, EngineOptions(), groups, None)
        assert restorer.restore(prompts, past, llama.device).blocks == 0
        assert past.get_seq_length() == 0
        saving = Saving(prompts, groups, broken, 0, counters=counters)
        saving.computed(0, CHUNK, past)
        saving.finish()
    assert caplog.text.count("Traceback") == 2
    assert counters == {"failed": 4 * CHUNK}


def test_a_cache_that_cannot_be_filled_stays_empty(
    scripted: NodeThread, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory for the last group of layers: those before it are given back too."""
    model = tiny_model("gemma2")
    with patient(model, scripted.endpoint) as cache:
        ask(cache, model, TOKENS)
        with monkeypatch.context() as patched, caplog.at_level(logging.ERROR):
            patched.setattr(DynamicSlidingWindowLayer, "lazy_initialization", _no_memory)
            session = cache.session(TOKENS)
        assert "no memory" in caplog.text
        with session:
            assert session.restored_tokens == session.cache.get_seq_length() == 0
            assert not any(layer.is_initialized for layer in session.cache.layers)
            assert not session.restored_from
            assert_same(answer(model, **session.inputs), plain(model, TOKENS))
        assert ask(cache, model, TOKENS)[0] == 4 * CHUNK


def _no_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("no memory")


def test_a_closed_cache_computes(scripted: NodeThread, llama: Any) -> None:
    """Sessions that outlive it, and those that come after it."""
    cache = patient(llama, scripted.endpoint)
    with cache.session(TOKENS) as session:
        cache.close()
        cache.close()
        assert_same(answer(llama, **session.inputs), plain(llama, TOKENS))
    with cache.session(TOKENS) as session:
        assert_same(answer(llama, **session.inputs), plain(llama, TOKENS))


def test_what_loads_slower_than_it_is_computed_is_computed(
    scripted: NodeThread, llama: Any
) -> None:
    """The gate hears of chunks and of loads, and decides."""
    with patient(llama, scripted.endpoint, restore_gate=True) as cache:
        gate = cache._gate
        assert gate is not None
        ask(cache, llama, TOKENS)
        assert ask(cache, llama, TOKENS)[0] == 4 * CHUNK
        gate.computed(10**9, 1e-3)
        gate.loaded(["memory"], 10.0)
        assert ask(cache, llama, TOKENS)[0] == 0
        assert cache.counters["recomputed_tokens"] == 4 * CHUNK


def test_the_load_budget_is_one_for_all_rows_and_groups(scripted: NodeThread) -> None:
    """A clock that says that it is over after the first load."""
    model = tiny_model("gemma2")
    with patient(model, scripted.endpoint) as cache:
        ask(cache, model, TOKENS)
        now_s = iter([0.0] * 4 + [100.0] * 100)
        options = EngineOptions(endpoint=scripted.endpoint)
        groups = layer_groups(model.config, torch.float32, CHUNK)
        restorer = Restorer(cache._client, options, groups, None, lambda: next(now_s))
        past = DynamicCache(config=model.config)
        prompts = cache._prompts(TOKENS, b"", None, cache._look())
        reads = scripted.node.calls["Read"]
        assert restorer.restore(prompts, past, model.device).blocks == 0
        assert scripted.node.calls["Read"] == reads + 1
        assert past.get_seq_length() == 0


def test_hints_reach_the_node(scripted: NodeThread, llama: Any) -> None:
    """With the match and with what is stored."""
    with patient(llama, scripted.endpoint) as cache:
        ask(cache, llama, TOKENS, session_id=b"s1", final=True)
    asked = [each for each in scripted.node.requests if hasattr(each, "hint")]
    assert {type(each) for each in asked} == {pb.MatchRequest, pb.WriteBegin}
    assert {(each.hint.session_id, each.hint.reuse) for each in asked} == {(b"s1", pb.REUSE_FINAL)}


def test_parents_are_named(scripted: NodeThread, llama: Any) -> None:
    """Each block is stored below the one before it."""
    with patient(llama, scripted.endpoint) as cache:
        ask(cache, llama, TOKENS)
        prompts = cache._prompts(TOKENS, b"", None, cache._look())
    space_id = prompts.spaces[0].space_id
    parents = [scripted.node.parents[space_id, key] for key in prompts.keys[0]]
    assert parents == [b"", *prompts.keys[0][:-1]]

"""The parts of KVStoreConnector one by one: pages, keys, layout, hints, adapters, settings."""

import asyncio
import dataclasses
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
import torch

from kvstore.api.hint import Reuse, ReuseHint
from kvstore.api.space import MatchRule
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore_client.engine.weights import model_revision, weights_changed_ns
from kvstore_client.match import Match, Run
from tests.client_rig import hanging
from tests.scripted_node import NodeThread
from tests.sim.clock import ManualClock
from tests.stand_ins import vllm_connector as vllm
from tests.stand_ins.vllm_mini_engine import Lora, full, state, vllm_config, window
from tests.vllm_rig import PROMPT, Start, answers, weights

pytest_plugins = ["tests.vllm_fixtures"]
pytestmark = pytest.mark.usefixtures("stand_in")

PAGES = 7
PAGE_BYTES = 24


def caches(order: str, layers: int = 3) -> list[torch.Tensor]:
    """Each layer's view of `[pages, heads, tokens, content]`, in one allocation."""
    shape = (layers, PAGES, 2, 3, 4)
    axes = "LBHNC"
    physical = torch.zeros([shape[axes.index(axis)] for axis in order], dtype=torch.uint8)
    logical = physical.permute([order.index(axis) for axis in axes])
    return [logical[layer] for layer in range(layers)]


@pytest.mark.parametrize(
    ("order", "runs"), [("LBHNC", 3), ("LBNHC", 3), ("BLHNC", 1), ("BLNHC", 1)]
)
@pytest.mark.parametrize("way", ["of a CPU", "of a GPU"])
def test_pages_come_back_as_they_were(order: str, runs: int, way: str) -> None:
    """Whatever the order of axes, and in one copy where layers of a block lie side by side."""
    from kvstore_client.vllm.pages import GroupPages, page_views

    layers = caches(order)
    for layer in layers:
        layer.copy_(torch.randint(0, 255, layer.shape, dtype=torch.uint8))
    before = [layer.clone() for layer in layers]
    group = GroupPages([page_views(layer, PAGES, PAGE_BYTES) for layer in layers])
    if way == "of a GPU":
        group._arrays.clear()  # What then copies is the same on any device.
    assert group.runs == runs
    assert group.page_bytes == 3 * PAGE_BYTES
    buffers = [torch.full((2 * group.page_bytes,), 0x55, dtype=torch.uint8) for _ in range(2)]
    group.gather([(5, 2), (0, 1)], buffers)
    assert not buffers[1][: group.page_bytes].any(), "what is not there is zero, not old bytes"
    for layer in layers:
        layer[1:] = 0
    group.scatter(buffers, [(5, 2), (0, 1)])
    for layer, was in zip(layers, before, strict=True):
        for page in (1, 2, 5):
            assert torch.equal(layer[page], was[page])
        assert torch.equal(layer[0], was[0]), "page 0 is nobody's"
        assert not layer[[3, 4, 6]].any()


@pytest.mark.parametrize("order", ["LHBNC", "BHLNC"])
def test_pages_in_pieces_are_refused(order: str) -> None:
    """The message says what to write."""
    from kvstore_client.vllm.pages import page_views

    with pytest.raises(ValueError, match="VLLM_KV_CACHE_LAYOUT"):
        page_views(caches(order)[0], PAGES, PAGE_BYTES)


def test_kernel_blocks_make_up_a_page() -> None:
    """A kernel may see a page as several smaller ones."""
    from kvstore_client.vllm.pages import page_views

    cache = (
        torch.arange(PAGES * PAGE_BYTES, dtype=torch.int32).to(torch.uint8).view(PAGES * 3, 1, 2, 4)
    )
    view = page_views(cache, PAGES, PAGE_BYTES)
    assert torch.equal(view[2], cache.flatten()[2 * PAGE_BYTES : 3 * PAGE_BYTES])


def test_padding_is_no_part_of_a_page() -> None:
    """A state is padded to the size of another group's page; what lies there is not stored."""
    from kvstore_client.vllm.pages import GroupPages, page_views

    raw = torch.zeros(PAGES * 32, dtype=torch.uint8)
    padded = raw.as_strided((PAGES, 1, 1, 20), (32, 20, 20, 1))
    group = GroupPages([page_views(padded, PAGES, 20)])
    assert group.page_bytes == 20
    group.scatter([torch.full((20,), 9, dtype=torch.uint8)], [(3,)])
    assert int(raw.count_nonzero()) == 20


def test_keys_follow_the_engines_hashes_also_back() -> None:
    """A session's last answer gives way to its next question: its keys go, and only they."""
    from kvstore_client.vllm.keys import Chain

    hashes = [bytes([number]) * 32 for number in range(9)]
    chain = Chain(2)
    assert chain.follow(hashes[:5]) == 0
    assert len(chain.keys) == 2
    first = list(chain.keys)
    assert chain.follow(hashes) == 2
    assert chain.keys[:2] == first and len(chain.keys) == 4
    assert chain.follow([*hashes[:5], b"x" * 32, b"y" * 32]) == 2
    assert chain.keys[:2] == first and len(chain.keys) == 3
    assert chain.follow(hashes[:2]) == 1
    assert chain.before(0) == b"" and chain.before(1) == first[0]
    assert Chain(2, b"adapter").follow(hashes) == 0
    other = Chain(2, b"adapter")
    other.follow(hashes)
    assert set(other.keys).isdisjoint(first)


def spec_of(kind: vllm.KVCacheSpecKind) -> vllm.Spec:
    """A group of some kind, without what that kind needs."""
    return vllm.Spec(kind=kind, block_size=4, real_page_size_bytes=9)


def group_config(*specs: vllm.Spec) -> vllm.KVCacheConfig:
    """Groups of these."""
    groups = [vllm.KVCacheGroupSpec([f"l{at}"], spec) for at, spec in enumerate(specs)]
    return vllm.KVCacheConfig(8, groups)


def test_groups_become_spaces_with_their_rules() -> None:
    """One unit for all, and what a hit needs of each."""
    from kvstore_client.vllm.layout import layout_of

    config = group_config(full(8), window(10, block_size=4), window(3, block_size=2), state(16))
    layout = layout_of(None, config)
    assert (layout.unit_tokens, layout.hashes_per_unit) == (16, 8)
    assert [group.rule for group in layout.groups] == [
        MatchRule.ALL, MatchRule.TRAILING, MatchRule.TRAILING, MatchRule.BOUNDARY,
    ]  # fmt: skip
    assert [group.pages for group in layout.groups] == [2, 4, 8, 1]
    assert [group.spare_pages for group in layout.groups] == [0, 1, 7, 0]
    assert layout.groups[1].trailing_blocks == 1
    assert not layout.divisible and not layout.single
    long = layout_of(None, group_config(window(34, block_size=4)))
    assert long.groups[0].trailing_blocks == 9


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (spec_of(vllm.KVCacheSpecKind.MAMBA), "--enable-prefix"),
        (spec_of(vllm.KVCacheSpecKind.UNKNOWN), "unknown"),
    ],
)
def test_groups_that_cannot_be_stored_are_refused(spec: vllm.Spec, said: str) -> None:
    """With what to write, where there is something."""
    from kvstore_client.vllm.layout import layout_of

    with pytest.raises(ValueError, match=said):
        layout_of(None, group_config(spec))


def test_a_hit_names_the_farthest_tier_of_each_block() -> None:
    """Two spaces of three blocks: what no space needs has no tier."""
    from kvstore_client.vllm.plan import tiers_of

    whole = (Run(1, "memory", True), Run(2, "disk", True))
    tail = (Run(2, "", False), Run(1, "redis", False))
    assert tiers_of(Match(3, (whole, tail)), 0, 3) == ["memory", "disk", "redis"]
    assert tiers_of(Match(3, (tail,)), 1, 3) == ["", "redis"]


@pytest.mark.parametrize(
    ("given", "more", "hint"),
    [
        (None, {}, None),
        ({"session_id": "s"}, {}, ReuseHint(b"s")),
        (
            {"reuse": "Final", "expected_return_ms": 5},
            {},
            ReuseHint(reuse=Reuse.FINAL, expected_return_ms=5),
        ),
        (None, {"session_id": "own"}, ReuseHint(b"own")),
        (None, {"resumable": True}, ReuseHint(reuse=Reuse.AUTOMATIC)),
        (None, {"pooling_params": object()}, ReuseHint(reuse=Reuse.FINAL)),
        ("nonsense", {}, None),
        ({"sesion_id": "s"}, {}, None),
        ({"reuse": 3}, {}, None),
        ({"expected_return_ms": -1}, {}, None),
        ({"expected_return_ms": True}, {}, None),
        ({"session_id": 5}, {}, None),
    ],
)
def test_hints_are_read_and_nonsense_is_ignored(given: Any, more: Any, hint: Any) -> None:
    """A hint is advice: one that is wrong is none."""
    from kvstore_client.vllm.hints import hint_of

    request = SimpleNamespace(
        kv_transfer_params={"kvstore": given} if given is not None else None,
        **{"session_id": None, "resumable": False, "pooling_params": None, **more},
    )
    assert hint_of(request) == hint


async def test_the_end_of_an_answer_is_told(remote: NodeThread, start: Start) -> None:
    """Who stopped by itself waits for somebody; who ran out of tokens says nothing."""
    engine = await asyncio.to_thread(start, remote)
    await answers(engine, PROMPT)
    assert remote.node.calls["Hint"] == 0
    heard: list[pb.HintRequest] = []

    async def hearing(request: pb.HintRequest, context: object) -> None:
        heard.append(request)

    remote.node.play("Hint", hearing)
    await answers(engine, [1, *PROMPT], ends="stop", params={"kvstore": {"session_id": "s"}})
    await asyncio.to_thread(_until, lambda: heard)
    hint = heard[0].hint
    assert (hint.session_id, hint.reuse) == (b"s", Reuse.INTERACTIVE.value)


def _until(done: Any) -> None:
    tick = threading.Event()
    for _ in range(3000):
        if done():
            return
        tick.wait(0.01)
    raise AssertionError("it did not come to pass")


def settled(value: str | Exception) -> "Future[str]":
    """A reading that has ended."""
    reading: Future[str] = Future()
    if isinstance(value, str):
        reading.set_result(value)
    else:
        reading.set_exception(value)
    return reading


def test_an_adapter_is_certain_while_its_files_are_the_same() -> None:
    """Before the engine has read them, after, and at each use since."""
    from kvstore_client.vllm.adapters import Adapters

    files = {"p": "one"}
    adapters = Adapters(lambda path: files[path])
    lora = Lora("a", 1, "p")
    first = adapters.use(lora)
    _until(lambda: first.known)
    assert first.certain and first.content == b"one"
    assert not first.savable, "the engine may have read other files"
    first.ran()
    _until(lambda: first.savable)
    files["p"] = "two"
    second = adapters.use(lora)
    _until(lambda: second.known)
    assert not second.certain and not second.savable and not first.savable
    loaded_anew = adapters.use(Lora("a", 1, "p", load_inplace=True))
    _until(lambda: loaded_anew.known)
    assert loaded_anew.certain and loaded_anew.content == b"two" and not first.savable
    unreadable = adapters.use(Lora("b", 2, "nowhere"))
    _until(lambda: unreadable.known)
    assert not unreadable.certain
    adapters.close()


def test_a_request_that_was_preempted_begins_anew() -> None:
    """It has no pages any more, and the engine may have read its adapter again."""
    from kvstore_client.vllm.adapters import Adapters
    from kvstore_client.vllm.asked import Asked

    files = {"p": "one"}
    adapters = Adapters(lambda path: files[path])
    use = adapters.use(Lora("a", 1, "p"))
    use.ran()
    _until(lambda: use.savable)
    request = SimpleNamespace(num_preemptions=0)
    asked = Asked(request, use=use, saved=7, began_at=0)
    asked.notice_preemption()
    assert asked.saved == 7 and use.savable
    request.num_preemptions, files["p"] = 1, "two"
    asked.notice_preemption()
    assert asked.saved == 0 and asked.began_at is None and not use.savable
    use.ran()
    adapters.read("p").result()
    assert not use.savable, "it has run with other weights"
    adapters.close()


def test_staging_is_bounded_and_used_again() -> None:
    """What does not fit waits; a block larger than the bound is taken alone."""
    from kvstore_client.vllm.staging import Staging

    staging = Staging(100, ManualClock(), pinned=False)
    taken = staging.take(30, 5)
    assert len(taken) == 3
    assert staging.take(30, 1) == []
    staging.give(taken)
    again = staging.take(30, 3)
    assert {each.data_ptr() for each in again} == {each.data_ptr() for each in taken}
    staging.give(again)
    assert len(staging.take(1000, 2)) == 1
    assert staging.take(1, 1) == []
    staging.close()
    assert staging.take(1, 1, until_s=1e9) == []


async def test_what_the_node_held_a_moment_ago_is_not_offered_again() -> None:
    """Nor what is on its way; later it is, for a node may forget."""
    from kvstore_client.vllm.held import FRESH_S, Held

    clock = ManualClock()
    held = Held(clock)
    held.begun(b"s", [b"a", b"b"])
    assert held.lacking(b"s", [b"a", b"b", b"c"]) == [False, False, True]
    assert held.lacking(b"t", [b"a"]) == [True], "another space's block is another one"
    held.ended(b"s", [b"a", b"b"], [True, False])
    assert held.lacking(b"s", [b"a", b"b"]) == [False, True]
    await clock.advance(FRESH_S + 1)
    assert held.lacking(b"s", [b"a"]) == [True]
    held.ended(b"s", [b"a"], [True])
    held.clear()
    assert held.lacking(b"s", [b"a"]) == [True]


def test_counts_travel_and_are_shown() -> None:
    """From both sides through vLLM's hooks to Prometheus, with the labels of each."""
    from kvstore_client.vllm import KVStoreConnector
    from kvstore_client.vllm.stats import ConnectorStats, Tally

    tally = Tally()
    tally.add("loads", label="whole")
    tally.add("saved_blocks", 3)
    with pytest.raises(KeyError):
        tally.add("saved_blocks", label="x")
    stats = ConnectorStats(data=tally.take()).aggregate(ConnectorStats(data={"saved_blocks|": 2}))
    assert tally.take() == {}
    travelled = {"loads|whole": 1}
    for _ in range(2):  # Each of vLLM's loggers adds up for itself.
        mine = KVStoreConnector.build_kv_connector_stats(travelled)
        mine.aggregate(ConnectorStats(data={"loads|whole": 2}))
        assert mine.data == {"loads|whole": 3}
    assert stats.reduce() == {"loads whole": 1, "saved_blocks": 5}
    registry = prometheus_client.CollectorRegistry()

    def counter(name: str, documentation: str, labelnames: list[str]) -> Any:
        return prometheus_client.Counter(name, documentation, labelnames, registry=registry)

    kinds = {prometheus_client.Counter: counter}
    shown = KVStoreConnector.build_prom_metrics(None, kinds, ["engine"], {0: ["0"]})
    shown.observe(stats.data)
    found = registry.get_sample_value
    assert found("vllm:kvstore_saved_blocks_total", {"engine": "0"}) == 5
    assert found("vllm:kvstore_loads_total", {"engine": "0", "result": "whole"}) == 1


def test_the_page_names_every_metric_and_setting() -> None:
    """docs/vllm.md is the reference of both."""
    from kvstore_client.vllm.options import ConnectorOptions
    from kvstore_client.vllm.stats import METRICS

    page = (Path(__file__).parent.parent / "docs" / "vllm.md").read_text()
    for name, metric in METRICS.items():
        label = f"{{{metric.label}}}" if metric.label else ""
        assert f"`vllm:kvstore_{name}{label}`" in page, name
    for field in dataclasses.fields(ConnectorOptions):
        assert f"`{field.name}`" in page, field.name


_MEDIA_SETTINGS = (
    "media_io_kwargs",
    "mm_processor_kwargs",
    "mm_device_do_normalize",
    "mm_encoder_attn_dtype",
    "mm_encoder_fp8_scale_path",
    "video_pruning_rate",
    "video_pruning_method",
)
CHANGES = {
    "parallel_config__pipeline_parallel_size": (2, "pipeline_parallel_size"),
    "parallel_config__decode_context_parallel_size": (2, "decode_context_parallel_size"),
    "cache_config__prefix_caching_hash_algo": ("xxhash", "sha256_cbor"),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_an_engine_that_could_not_share_rightly_is_refused(change: str, start: Start) -> None:
    """At its start, with what to write."""
    value, said = CHANGES[change]
    section, _, name = change.partition("__")
    from kvstore_client.vllm.requirements import check_engine

    config = vllm_config(Path("m"), {}, caching=True)
    setattr(getattr(config, section), name, value)
    with pytest.raises(ValueError, match=said):
        check_engine("0.32.0", config, group_config(full()))


def test_another_version_is_refused_and_the_failure_policy_is_set() -> None:
    """A cache may forget, so a failed load is computed again."""
    from kvstore_client.vllm.requirements import check_engine

    config = vllm_config(Path("m"), {}, caching=True)
    with pytest.raises(ValueError, match=r"0\.32"):
        check_engine("0.33.0", config, group_config(full()))
    check_engine("0.32.1", config, group_config(full()))
    assert config.kv_transfer_config.kv_load_failure_policy == "recompute"


def test_media_that_are_named_by_a_counter_are_refused() -> None:
    """vLLM names them so where neither of its caches needs their content."""
    from kvstore_client.vllm.requirements import check_engine

    config = vllm_config(Path("m"), {}, caching=False)
    config.model_config.multimodal_config = SimpleNamespace(mm_processor_cache_gb=0)
    with pytest.raises(ValueError, match="--mm-processor-cache-gb"):
        check_engine("0.32.0", config, group_config(full()))
    config.model_config.multimodal_config.mm_processor_cache_gb = 4
    check_engine("0.32.0", config, group_config(full()))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"endpont": "x"}, r"kv_connector_extra_config.endpont.*endpoint"),
        ({"load_threads": 0}, "load_threads"),
        ({"max_loading_bytes": 0}, "max_loading_bytes"),
        ({"drain_timeout_s": -1}, "drain_timeout_s"),
        ({"match_budget_s": 0}, "match_budget_s"),
    ],
)
async def test_settings_that_are_wrong_stop_the_start(
    settings: dict[str, Any], said: str, start: Start
) -> None:
    """Naming the field."""
    with pytest.raises(ValueError, match=said):
        await asyncio.to_thread(start, "127.0.0.1:1", settings=settings)


async def test_weights_without_a_name_stop_the_start(start: Start) -> None:
    """Unless they are given one."""
    with pytest.raises(ValueError, match="model_revision"):
        await asyncio.to_thread(start, "127.0.0.1:1", model=Path("no/such-model"))
    await asyncio.to_thread(
        start, "127.0.0.1:1", model=Path("no/such-model"), settings={"model_revision": "mine"}
    )


@pytest.mark.parametrize(
    "change",
    [
        {"model_config__dtype": torch.bfloat16},
        {"cache_config__cache_dtype": "fp8"},
        {"model_config__quantization": "awq"},
        {"model_config__quantization_config": {"linear": "fp8_per_block"}},
        {"cache_config__kv_cache_dtype_skip_layers": ["0"]},
        {"cache_config__prefix_caching_hash_algo": "sha256_cbor"},
        {"model_config__hf_text_config": SimpleNamespace(to_dict=lambda: {"rope_theta": 1.0})},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_engines_that_differ_never_meet(
    change: dict[str, Any], remote: NodeThread, start: Start
) -> None:
    """One field of what the bytes depend on, and the other's blocks are not there."""
    first = await asyncio.to_thread(start, remote)
    await answers(first, PROMPT)
    second = await asyncio.to_thread(start, remote, **change)
    (read,) = await answers(second, PROMPT)
    assert read.restored == 0


def test_how_an_engine_reads_media_is_part_of_the_space() -> None:
    """A request's hashes cover its media, not what the engine's settings make of them."""
    from kvstore_client.vllm.spaces import _common

    handshake: Any = SimpleNamespace(layout="L")

    def numerics(**changes: Any) -> str:
        config = vllm_config(Path("m"), {}, caching=True)
        said = dict.fromkeys(_MEDIA_SETTINGS) | {"media_io_kwargs": {}} | changes
        config.model_config.multimodal_config = SimpleNamespace(**said)
        return str(_common(config, handshake, "r")["numerics"])

    changes: list[dict[str, Any]] = [
        {},
        {"mm_processor_kwargs": {"num_crops": 4}},
        {"media_io_kwargs": {"video": {"num_frames": 40}}},
        {"video_pruning_rate": 0.5},
    ]
    assert len({numerics(**change) for change in changes}) == len(changes)


@pytest.mark.parametrize(("method", "drafts"), [("ngram", False), ("medusa", False), ("mtp", True)])
def test_a_draft_model_counts_where_it_writes_pages(method: str, drafts: bool) -> None:
    """Otherwise answers are stored as well."""
    from kvstore_client.vllm.spaces import has_draft_model

    config = vllm_config(Path("m"), {}, caching=True)
    # vLLM names the target itself where there is no other model.
    config.speculative_config = SimpleNamespace(
        method=method, draft_model_config=config.model_config
    )
    assert has_draft_model(config) is drafts


def test_files_that_changed_while_the_engine_loaded_give_no_name(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have the weights of before, which the files do not tell any more."""
    from kvstore_client.vllm import spaces

    config = vllm_config(model, {}, caching=True)
    changed_ns = weights_changed_ns(model)
    monkeypatch.setattr(spaces, "started_ns", lambda: changed_ns)
    assert spaces.revision_of(config, "") == model_revision(str(model))
    monkeypatch.setattr(spaces, "started_ns", lambda: changed_ns - 1)
    with pytest.raises(ValueError, match="changed after"):
        spaces.revision_of(config, "")
    assert spaces.revision_of(config, "mine") == "mine"


def test_a_process_knows_when_it_began() -> None:
    """On the clock of files: after this one, and before those that it writes."""
    code = "from kvstore_client.engine.process import started_ns; print(started_ns())"
    before_ns = time.time_ns()
    began_ns = int(subprocess.check_output([sys.executable, "-c", code], text=True))
    clocks_ns = 1_000_000  # The two clocks are read one after the other.
    assert before_ns - clocks_ns <= began_ns <= time.time_ns()


async def test_other_weights_at_the_same_path_are_another_model(
    remote: NodeThread, start: Start, model: Path
) -> None:
    """And the same weights at another path are the same one."""
    first = await asyncio.to_thread(start, remote)
    await answers(first, PROMPT)
    copy = weights(model.parent / "elsewhere" / "model", b"weights")
    same = await asyncio.to_thread(start, remote, model=copy)
    (read,) = await answers(same, PROMPT)
    assert read.restored == 48
    weights(model, b"others")
    second = await asyncio.to_thread(start, remote)
    (read,) = await answers(second, PROMPT)
    assert read.restored == 0


async def test_after_a_reset_nothing_from_before_is_loaded(
    remote: NodeThread, start: Start
) -> None:
    """Weights may have been changed in place: what follows is this engine's alone."""
    engine = await asyncio.to_thread(start, remote)
    await answers(engine, PROMPT)
    assert engine.scheduler.reset_cache() is True
    (read,) = await answers(engine, PROMPT)
    assert read.restored == 0
    (again,) = await answers(engine, PROMPT)
    assert again.restored == 48
    other = await asyncio.to_thread(start, remote)
    (read,) = await answers(other, PROMPT[:20])
    assert read.restored == 16


async def test_roles_are_kept(remote: NodeThread, start: Start) -> None:
    """Who only produces loads nothing; who only consumes stores nothing."""
    consumer = await asyncio.to_thread(start, remote, role="kv_consumer")
    await answers(consumer, PROMPT)
    assert not remote.node.blocks
    producer = await asyncio.to_thread(start, remote, role="kv_producer")
    await answers(producer, PROMPT)
    (again,) = await answers(producer, PROMPT)
    assert again.restored == 0
    (read,) = await answers(consumer, PROMPT)
    assert read.restored == 48


async def test_only_prompts_are_stored_if_so_set(remote: NodeThread, start: Start) -> None:
    """A block with one generated token is an answer's."""
    engine = await asyncio.to_thread(start, remote, settings={"save_output": False})
    await answers(engine, PROMPT, outputs=30)
    assert len(remote.node.blocks) == 12


def test_what_generated_tokens_see_may_depend_on_where_the_prompt_ended() -> None:
    """R-SWA: the prompt and a window, so the chain alone does not name an answer's KV."""
    from kvstore_client.vllm.layout import layout_of

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Rswa(vllm.Spec):
        rswa_window: int = 8

    assert layout_of(None, group_config(full())).outputs
    spec = Rswa(**vars(full()))
    assert not layout_of(None, group_config(full(), spec)).outputs


async def test_answers_of_a_diffusion_model_are_not_stored(
    remote: NodeThread, start: Start
) -> None:
    """Their blocks see what stands behind them."""
    engine = await asyncio.to_thread(start, remote, model_config__is_diffusion=True)
    await answers(engine, PROMPT, outputs=30)
    assert len(remote.node.blocks) == 12


async def test_an_answer_that_has_grown_old_is_asked_for_again(
    remote: NodeThread, start: Start
) -> None:
    """Its lease may end before a load has: the request waited long for pages."""
    engine = await asyncio.to_thread(start, remote)
    await answers(engine, PROMPT)
    request = engine.add(PROMPT)
    side = engine.scheduler._scheduler
    side._clock = ManualClock()

    def ask() -> int:
        while (tokens := engine.scheduler.get_num_new_matched_tokens(request, 0)[0]) is None:
            pass
        return int(tokens)

    assert await asyncio.to_thread(ask) == 48
    asked = remote.node.calls["Match"]
    await side._clock.advance(59.0)
    assert engine.scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
    assert await asyncio.to_thread(ask) == 48
    assert remote.node.calls["Match"] == asked + 1
    await asyncio.to_thread(_until, lambda: remote.node.calls["Release"] == 1)
    side._clock = engine.ranks[0].connector._worker._clock
    await asyncio.to_thread(engine.run)


async def test_an_answer_whose_lease_was_given_back_is_asked_for_again(
    remote: NodeThread, start: Start
) -> None:
    """The engine held all of it itself then, and has lost some since."""
    engine = await asyncio.to_thread(start, remote)
    await answers(engine, PROMPT)
    request = engine.add([*PROMPT, *PROMPT])
    asked = remote.node.calls["Match"]

    def ask(held: int) -> int:
        while (found := engine.scheduler.get_num_new_matched_tokens(request, held)[0]) is None:
            pass
        return int(found)

    assert await asyncio.to_thread(ask, 16) == 32
    assert await asyncio.to_thread(ask, 48) == 0
    assert await asyncio.to_thread(ask, 32) == 16
    assert remote.node.calls["Match"] == asked + 2
    await asyncio.to_thread(engine.run)


async def test_an_answer_that_does_not_come_is_not_waited_for(
    remote: NodeThread, start: Start
) -> None:
    """Even where the client's own thread does not get to keep its budget."""
    engine = await asyncio.to_thread(start, remote)
    remote.node.play("Match", hanging)
    request = engine.add(PROMPT)
    side = engine.scheduler._scheduler
    side._clock = ManualClock()
    ask = engine.scheduler.get_num_new_matched_tokens
    assert ask(request, 0) == (None, False)
    assert ask(request, 0) == (None, False)
    await side._clock.advance(31.0)
    assert ask(request, 0) == (0, False)
    assert side.stats().data["matches|late"] == 1
    await asyncio.to_thread(engine.run)


async def test_what_takes_longer_to_load_than_to_compute_is_computed(
    remote: NodeThread, start: Start
) -> None:
    """By what the engine's own steps and loads have taken."""
    first = await asyncio.to_thread(start, remote)
    await answers(first, PROMPT)
    engine = await asyncio.to_thread(start, remote, settings={"restore_gate": True})
    gate = engine.scheduler._scheduler._gate
    gate.computed(1000, 0.001)
    gate.loaded(["memory"] * 2, 10.0)
    (read,) = await answers(engine, PROMPT)
    assert read.restored == 0
    assert engine.stats()["gated_tokens|"] == 48


async def test_a_lease_that_is_over_at_once_is_not_asked_for_for_ever(
    remote: NodeThread, start: Start
) -> None:
    """A few times, and then the answer is used: what is not leased may be there all the same."""
    first = await asyncio.to_thread(start, remote)
    await answers(first, PROMPT)
    engine = await asyncio.to_thread(start, remote, settings={"lease_ms": 1})
    before = remote.node.calls["Match"]
    side = engine.scheduler._scheduler
    side._clock = ManualClock()
    request = engine.add(PROMPT)
    for _ in range(200):
        told, _ = engine.scheduler.get_num_new_matched_tokens(request, 0)
        if told is not None:
            break
        question = side._asked[request.request_id].question
        if question is not None:
            await asyncio.to_thread(question.future.result)
            question.state()
        await side._clock.advance(1.0)
    assert told == 48
    assert remote.node.calls["Match"] <= before + 3
    side._clock = engine.ranks[0].connector._worker._clock
    await asyncio.to_thread(engine.run)

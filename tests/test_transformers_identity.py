"""What is stored of one model is never given to another: by its weights, and how it rounds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvstore_client.transformers.identity import Identity, describe_numerics, tensor_totals
from tests.scripted_node import NodeThread
from tests.tiny_models import CHUNK, prompt, tiny_model
from tests.transformers_rig import answer, ask, patient

pytest_plugins = ["tests.transformers_fixtures"]

TOKENS = prompt(2 * CHUNK + 1)


def _counted(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] += 0.5


def _uncounted(model: Any) -> None:
    model.model.layers[2].mlp.up_proj.weight.data.mul_(1.01)


def _replaced(model: Any) -> None:
    weight = model.model.layers[2].mlp.up_proj.weight
    model.model.layers[2].mlp.up_proj.weight = torch.nn.Parameter(weight * 1.01)


def _reassigned(model: Any) -> None:
    model.model.norm.weight.data = model.model.norm.weight.data * 1.01


def _uncounted_value(model: Any) -> None:
    model.get_input_embeddings().weight.data[7, 1] += 3.0


def _uncounted_exchange(model: Any) -> None:
    table = model.get_input_embeddings().weight.data
    table[[3, 90]] = table[[90, 3]]


def _activation(model: Any) -> None:
    model.model.layers[2].mlp.act_fn = torch.nn.GELU()


def _scale(model: Any) -> None:
    model.model.layers[2].self_attn.scaling *= 0.5


def _buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def _setting(model: Any) -> None:
    model.config.rms_norm_eps *= 2


def _trained(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()


@pytest.mark.parametrize(
    "change",
    [
        _counted, _uncounted, _uncounted_value, _uncounted_exchange, _replaced, _reassigned,
        _activation, _scale, _buffer, _setting, _trained,
    ],
)  # fmt: skip
def test_a_model_that_changes_in_memory_is_another_one(
    change: Callable[[Any], None], scripted: NodeThread
) -> None:
    """It finds nothing of what it was, stores anew, and finds that."""
    model = tiny_model("llama", seed=7)
    with patient(model, scripted.endpoint) as cache:
        assert ask(cache, model, TOKENS)[0] == 0
        assert ask(cache, model, TOKENS)[0] == 2 * CHUNK
        change(model)
        assert ask(cache, model, TOKENS)[0] == 0
        assert ask(cache, model, TOKENS)[0] == 2 * CHUNK


@pytest.mark.parametrize("change", [_counted, _replaced, _activation])
@pytest.mark.parametrize("others", [0, 1])
def test_a_model_that_changes_within_a_session_is_refused(
    others: int, change: Callable[[Any], None], scripted: NodeThread
) -> None:
    """What was restored was the former one's, also where another session has seen the change."""
    model = tiny_model("llama", seed=7)
    with patient(model, scripted.endpoint) as cache, cache.session(TOKENS) as session:
        change(model)
        for _ in range(others):
            cache.session(prompt(CHUNK + 1, seed=1)).close()
        with pytest.raises(ValueError, match="model: its weights or its adapter changed"):
            answer(model, **session.inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("count", [1, 7, 1024, 3001])
def test_a_total_changes_with_each_value(dtype: torch.dtype, count: int) -> None:
    """Whatever a tensor's length is, and wherever in its storage it begins."""
    whole = torch.arange(count + 1).remainder(251).to(dtype)
    for tensor in (whole[:-1], whole[1:]):
        totals = {tensor_totals({"it": tensor})["it"]}
        for place in {*range(0, count, 97), count - 1}:
            tensor[place] += 1
            totals.add(tensor_totals({"it": tensor})["it"])
        assert len(totals) == 1 + len({*range(0, count, 97), count - 1})


def test_the_same_weights_are_the_same_model_wherever_they_lie(
    tmp_path: Path, scripted: NodeThread
) -> None:
    """Made on the spot, saved, and loaded from two places: one revision."""
    model = tiny_model("qwen3", seed=8)
    revisions = {Identity(model).look().revision}
    for name in ("one", "other"):
        model.save_pretrained(tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        revisions.add(Identity(loaded).look().revision)
    assert len(revisions) == 1
    with patient(model, scripted.endpoint) as cache:
        ask(cache, model, TOKENS)
    with patient(loaded, scripted.endpoint) as cache:
        assert ask(cache, loaded, TOKENS)[0] == 2 * CHUNK


def test_only_what_changed_is_read_again() -> None:
    """The digests of all other tensors are kept."""
    model = tiny_model("llama")
    identity = Identity(model)
    before = dict(identity._seen)
    look = identity.look()
    assert not identity.changed(look)
    _counted(model)
    assert identity.changed(look)
    assert not identity.changed(identity.look())
    assert identity.changed(look)
    fresh = [name for name, seen in identity._seen.items() if seen is not before[name]]
    assert fresh == ["model.layers.2.mlp.up_proj.weight"]


def test_a_revision_that_is_given_is_taken(scripted: NodeThread) -> None:
    """Then nothing is read; who gives the same name twice says that it is the same."""
    model = tiny_model("llama", seed=9)
    identity = Identity(model, "release-7")
    assert (identity.look().revision, identity._seen) == ("release-7", {})
    with patient(model, scripted.endpoint, model_revision="release-7") as cache:
        assert ask(cache, model, TOKENS)[0] == 0
    with patient(model, scripted.endpoint, model_revision="release-7") as cache:
        assert ask(cache, model, TOKENS)[0] == 2 * CHUNK
    with patient(model, scripted.endpoint, model_revision="release-8") as cache:
        assert ask(cache, model, TOKENS)[0] == 0


def test_modules_that_are_compiled_round_otherwise() -> None:
    """The whole model, one layer, or another one."""
    models = [tiny_model("llama") for _ in range(4)]
    models[1].compile(backend="eager")
    models[2].model.layers[0].compile(backend="eager")
    models[3].model.layers[1].compile(backend="eager")
    described = {describe_numerics(model, CHUNK, 1) for model in models}
    assert len(described) == 4
    assert max(map(len, described)) <= 256


def test_models_that_round_otherwise_do_not_mix(scripted: NodeThread) -> None:
    """Threads, kernel, dtype, chunk length: each of them has blocks of its own."""
    model = tiny_model("llama", seed=10)
    seen = set()

    def stored(changed: Any, chunk_tokens: int = CHUNK) -> int:
        with patient(changed, scripted.endpoint, chunk_tokens=chunk_tokens) as cache:
            with cache.session(TOKENS) as session:
                answer(changed, **session.inputs)
            assert cache.drain(60)
            seen.add(describe_numerics(changed, chunk_tokens, 1))
            return session.restored_tokens

    assert [stored(model), stored(model)] == [0, 2 * CHUNK]
    assert stored(model, 2 * CHUNK) == 0
    model.set_attn_implementation("eager")
    assert stored(model) == 0
    model.set_attn_implementation("sdpa")
    torch.set_num_threads(2)
    assert stored(model) == 0
    torch.set_num_threads(1)
    assert len(seen) == 4
    assert max(map(len, seen)) <= 256
    assert stored(tiny_model("llama", seed=10).to(torch.bfloat16)) == 0
    assert stored(model) == 2 * CHUNK

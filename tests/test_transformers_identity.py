"""What is stored of one model is never given to another: weights, adapters, and how it rounds."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from kvstore_client.transformers.identity import Identity, describe_numerics
from tests.tiny_models import CHUNK, prompt, tiny_model
from tests.transformers_rig import answer, ask, patient, plain

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


def _buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def _setting(model: Any) -> None:
    model.config.rms_norm_eps *= 2


def _trained(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()


@pytest.mark.parametrize(
    "change", [_counted, _uncounted, _replaced, _reassigned, _buffer, _setting, _trained]
)
def test_a_model_that_changes_in_memory_is_another_one(
    change: Callable[[Any], None], scripted: Any
) -> None:
    """It finds nothing of what it was, stores anew, and finds that."""
    model = tiny_model("llama", seed=7)
    with patient(model, scripted.endpoint) as cache:
        assert ask(cache, model, TOKENS)[0] == 0
        assert ask(cache, model, TOKENS)[0] == 2 * CHUNK
        change(model)
        assert ask(cache, model, TOKENS)[0] == 0
        assert ask(cache, model, TOKENS)[0] == 2 * CHUNK


def test_a_model_that_changes_within_a_session_is_refused(scripted: Any) -> None:
    """What was restored was the former one's."""
    model = tiny_model("llama", seed=7)
    with patient(model, scripted.endpoint) as cache, cache.session(TOKENS) as session:
        _counted(model)
        with pytest.raises(ValueError, match="model: its weights or its adapter changed"):
            answer(model, **session.inputs)


def test_the_same_weights_are_the_same_model_wherever_they_lie(
    tmp_path: Path, scripted: Any
) -> None:
    """Made on the spot, saved, and loaded from two places: one revision."""
    model = tiny_model("qwen3", seed=8)
    revisions = {Identity(model).revision}
    for name in ("one", "other"):
        model.save_pretrained(tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        revisions.add(Identity(loaded).revision)
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
    assert not identity.changed()
    _counted(model)
    assert identity.changed()
    identity.refresh()
    assert not identity.changed()
    fresh = [name for name, seen in identity._seen.items() if seen is not before[name]]
    assert fresh == ["model.layers.2.mlp.up_proj.weight"]


def test_a_revision_that_is_given_is_taken(scripted: Any) -> None:
    """Then nothing is read; who gives the same name twice says that it is the same."""
    model = tiny_model("llama", seed=9)
    identity = Identity(model, "release-7")
    assert (identity.revision, identity._seen) == ("release-7", {})
    with patient(model, scripted.endpoint, model_revision="release-7") as cache:
        assert ask(cache, model, TOKENS)[0] == 0
    with patient(model, scripted.endpoint, model_revision="release-7") as cache:
        assert ask(cache, model, TOKENS)[0] == 2 * CHUNK
    with patient(model, scripted.endpoint, model_revision="release-8") as cache:
        assert ask(cache, model, TOKENS)[0] == 0


def test_models_that_round_otherwise_do_not_mix(scripted: Any) -> None:
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


@pytest.fixture
def adapted() -> Iterator[PeftModel]:
    """A model with two adapters that differ, neither of which does nothing."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"])
    model = get_peft_model(tiny_model("llama", seed=11), config, "one")
    model.add_adapter("other", config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            generator = torch.Generator().manual_seed(len(name) + 100 * (".other." in name))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    yield model.eval()


def test_adapters_never_meet(scripted: Any, adapted: PeftModel) -> None:
    """Two of them and none; what is stored without any is the plain model's."""
    with patient(adapted, scripted.endpoint) as cache:
        answers = set()
        for name in ("one", "other"):
            adapted.set_adapter(name)
            assert ask(cache, adapted, TOKENS)[0] == 0
            assert ask(cache, adapted, TOKENS)[0] == 2 * CHUNK
            answers.add(str(plain(adapted, TOKENS)[0]))
        with adapted.disable_adapter():
            assert ask(cache, adapted, TOKENS)[0] == 0
            answers.add(str(plain(adapted, TOKENS)[0]))
        adapted.set_adapter("one")
        assert ask(cache, adapted, TOKENS)[0] == 2 * CHUNK
        assert len(answers) == 3
    alone = tiny_model("llama", seed=11)
    with patient(alone, scripted.endpoint) as cache:
        assert ask(cache, alone, TOKENS)[0] == 2 * CHUNK


def test_an_adapter_is_named_by_its_weights(scripted: Any, adapted: PeftModel) -> None:
    """Under another name it is the same; with other weights, or scaled otherwise, it is not."""
    with patient(adapted, scripted.endpoint) as cache:
        adapted.set_adapter("one")
        ask(cache, adapted, TOKENS)
        state = {
            name.replace(".one.", ".other."): value.clone()
            for name, value in adapted.state_dict().items()
            if ".one." in name
        }
        adapted.load_state_dict(state, strict=False)
        adapted.set_adapter("other")
        assert ask(cache, adapted, TOKENS)[0] == 2 * CHUNK
        layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
        layer.set_scale("other", 3.0)
        assert ask(cache, adapted, TOKENS)[0] == 0
        layer.set_scale("other", 1.0)
        assert ask(cache, adapted, TOKENS)[0] == 2 * CHUNK
        with torch.no_grad():
            layer.lora_B["other"].weight[1, 1] += 1
        assert ask(cache, adapted, TOKENS)[0] == 0


def test_an_adapter_that_changes_within_a_session_is_refused(
    scripted: Any, adapted: PeftModel
) -> None:
    """Also where each row is given its own."""
    with patient(adapted, scripted.endpoint) as cache:
        adapted.set_adapter("one")
        with cache.session(TOKENS) as session:
            adapted.set_adapter("other")
            with pytest.raises(ValueError, match="its adapter changed"):
                answer(adapted, **session.inputs)
        with (
            cache.session(TOKENS) as session,
            pytest.raises(ValueError, match="its adapter changed"),
        ):
            answer(adapted, adapter_names=["one"], **session.inputs)


def test_other_adapters_are_refused(adapted: PeftModel) -> None:
    """Merged ones, other kinds, and prompts that are learned."""
    with patient(adapted, "127.0.0.1:1") as cache:
        adapted.merge_adapter(["one"])
        with pytest.raises(ValueError, match="adapter 'one' is merged into"):
            cache.session(TOKENS)
        adapted.unmerge_adapter()
        cache.session(TOKENS).close()
    other = IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"])
    with pytest.raises(ValueError, match=r"of adapters only plain LoRA is supported"):
        patient(get_peft_model(tiny_model("llama"), other), "127.0.0.1:1")
    dora = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(ValueError, match=r"is Dora.*; of adapters only plain LoRA is supported"):
        patient(get_peft_model(tiny_model("llama"), dora).eval(), "127.0.0.1:1")
    learned = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="is PromptTuningConfig, which puts tokens"):
        patient(get_peft_model(tiny_model("llama"), learned), "127.0.0.1:1")


def test_an_adapter_that_was_merged_for_good_is_a_model(scripted: Any, adapted: PeftModel) -> None:
    """Its weights are other ones than before."""
    adapted.set_adapter("one")
    with patient(adapted, scripted.endpoint) as cache:
        ask(cache, adapted, TOKENS)
    merged = adapted.merge_and_unload(adapter_names=["one"]).eval()
    with patient(merged, scripted.endpoint) as cache:
        assert ask(cache, merged, TOKENS)[0] == 0
        assert ask(cache, merged, TOKENS)[0] == 2 * CHUNK

"""Adapters of peft: what is stored with one is never given to another, nor to the plain model."""

from collections.abc import Iterator

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from tests.scripted_node import NodeThread
from tests.tiny_models import CHUNK, prompt, tiny_model
from tests.transformers_rig import answer, ask, assert_same, patient, plain

pytest_plugins = ["tests.transformers_fixtures"]

TOKENS = prompt(2 * CHUNK + 1)


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


def test_adapters_never_meet(scripted: NodeThread, adapted: PeftModel) -> None:
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


def test_an_adapter_is_named_by_its_weights(scripted: NodeThread, adapted: PeftModel) -> None:
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
    scripted: NodeThread, adapted: PeftModel
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


def test_an_adapter_that_another_session_has_is_not_this_ones(
    scripted: NodeThread, adapted: PeftModel
) -> None:
    """A session keeps to the adapter that it began with."""
    with patient(adapted, scripted.endpoint) as cache:
        adapted.set_adapter("one")
        with cache.session(TOKENS) as session:
            adapted.set_adapter("other")
            ask(cache, adapted, TOKENS)
            with pytest.raises(ValueError, match="its adapter changed"):
                answer(adapted, **session.inputs)
            adapted.set_adapter("one")
            assert_same(answer(adapted, **session.inputs), plain(adapted, TOKENS))


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


def test_an_adapter_that_was_merged_for_good_is_a_model(
    scripted: NodeThread, adapted: PeftModel
) -> None:
    """Its weights are other ones than before."""
    adapted.set_adapter("one")
    with patient(adapted, scripted.endpoint) as cache:
        ask(cache, adapted, TOKENS)
    merged = adapted.merge_and_unload(adapter_names=["one"]).eval()
    with patient(merged, scripted.endpoint) as cache:
        assert ask(cache, merged, TOKENS)[0] == 0
        assert ask(cache, merged, TOKENS)[0] == 2 * CHUNK

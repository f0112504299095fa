"""What cannot be served exactly is refused before anything is computed, and named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvstore_client.transformers import PromptCache
from kvstore_client.transformers.groups import check_layers
from kvstore_client.transformers.versions import SUPPORTED, check_versions
from tests.tiny_models import CHUNK, VOCABULARY, prompt, tiny_model
from tests.transformers_rig import answer, ask, assert_same, patient, plain

pytest_plugins = ["tests.transformers_fixtures"]

TOKENS = prompt(2 * CHUNK + 1)
ONES = torch.ones_like(TOKENS)


def _padded() -> torch.Tensor:
    mask = ONES.clone()
    mask[0, :3] = 0
    return mask


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": TOKENS[0]}, r"input_ids: a tensor \[row, token\] .* got Tensor \(17,\)"),
        ({"input_ids": TOKENS[:, :0]}, r"input_ids: a tensor"),
        ({"input_ids": TOKENS.tolist()}, r"input_ids: a tensor .* got list"),
        ({"input_ids": TOKENS.float()}, r"input_ids: whole numbers"),
        ({"attention_mask": _padded()}, r"attention_mask: padding is not supported"),
        ({"attention_mask": ONES[:, 1:]}, r"attention_mask: must have the shape of input_ids"),
        ({"pixel_values": torch.zeros(1)}, r"pixel_values: is not supported"),
        ({"inputs_embeds": torch.zeros(1)}, r"inputs_embeds: is not supported"),
        ({"position_ids": torch.zeros(1)}, r"position_ids: is not supported"),
        ({"token_type_ids": ONES}, r"token_type_ids: is not supported"),
        ({"session_id": bytes(33)}, r"session_id: at most 32 bytes"),
    ],
)
def test_wrong_inputs_name_their_field(inputs: Any, message: str, llama: Any) -> None:
    """Before the store is asked."""
    with patient(llama, "127.0.0.1:1") as cache:
        with pytest.raises(ValueError, match=message):
            cache.session(**{"input_ids": TOKENS, **inputs})
        assert cache.counters == {}


def test_what_a_tokenizer_gives_beside_is_taken(endpoint: str, llama: Any) -> None:
    """A mask of ones, and types of zeros."""
    with patient(llama, endpoint) as cache:
        types = torch.zeros_like(TOKENS)
        with cache.session(TOKENS, ONES, token_type_ids=types, salt=b"beside") as session:
            assert_same(answer(llama, **session.inputs), plain(llama, TOKENS))


def test_what_generate_would_take_for_padding_is_refused() -> None:
    """Without a mask it would hide such tokens; with a mask of ones they are tokens."""
    model = tiny_model("llama")
    model.generation_config.pad_token_id = int(TOKENS[0, 0])
    with patient(model, "127.0.0.1:1", match_budget_s=0.1) as cache:
        with pytest.raises(ValueError, match="input_ids: padding is not supported"):
            cache.session(TOKENS)
        with cache.session(TOKENS, ONES) as session:
            assert_same(answer(model, **session.inputs), plain(model, TOKENS))


def test_image_tokens_are_refused() -> None:
    """They stand for what is not in the prompt."""
    tokens = TOKENS.clone()
    tokens[0, 5] = VOCABULARY - 1
    message = "input_ids: holds image tokens"
    with (
        patient(tiny_model("gemma3"), "127.0.0.1:1") as cache,
        pytest.raises(ValueError, match=message),
    ):
        cache.session(tokens)


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_beams": 2}, r"num_beams, num_return_sequences: must be 1"),
        ({"input_ids": TOKENS + 1}, r"input_ids: other tokens"),
        ({"attention_mask": _padded()}, r"(attention_mask: only ones|position_ids: must be those)"),
        ({"position_ids": torch.arange(17)[None] + 1}, r"position_ids: must be those"),
    ],
)
def test_generate_must_be_told_what_the_session_was(
    restored: bool, change: Any, message: str, endpoint: str, llama: Any, salt: bytes
) -> None:
    """Whether or not something was restored; nothing of it is stored."""
    with patient(llama, endpoint) as cache:
        if restored:
            ask(cache, llama, TOKENS, salt=salt)
        held = cache.counters["held_blocks"]
        with cache.session(TOKENS, salt=salt) as session:
            assert session.restored_tokens == (2 * CHUNK if restored else 0)
            with pytest.raises(ValueError, match=message):
                answer(llama, **(session.inputs | change))
        assert cache.drain(60)
        assert cache.counters["held_blocks"] == held


def test_autocast_and_embeddings_are_refused_in_the_pass(llama: Any) -> None:
    """They reach the model, and not the session."""
    with patient(llama, "127.0.0.1:1", match_budget_s=0.1) as cache:
        session = cache.session(TOKENS)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
            llama.generate(**session.inputs, max_new_tokens=1)
        session.close()
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
            cache.session(TOKENS)
        with cache.session(TOKENS) as session:
            past, embeds = session.cache, torch.zeros(1, CHUNK, 32)
            with pytest.raises(ValueError, match="inputs_embeds"):
                llama(inputs_embeds=embeds, past_key_values=past)


def test_a_model_in_training_or_with_a_cache_of_its_own_is_refused() -> None:
    """Dropout is random; a static, quantized or offloaded cache is another one."""
    model = tiny_model("llama")
    with patient(model, "127.0.0.1:1") as cache:
        model.train()
        with pytest.raises(ValueError, match=r"model: is in training mode.*model\.eval\(\)"):
            cache.session(TOKENS)
        model.eval()
        for implementation in ("static", "quantized", "offloaded"):
            model.generation_config.cache_implementation = implementation
            message = f"generation_config.cache_implementation: '{implementation}'"
            with pytest.raises(ValueError, match=message):
                cache.session(TOKENS)


def _tiny(auto: Any, kind: str, **settings: Any) -> Callable[[], Any]:
    base = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
    return lambda: auto.from_config(AutoConfig.for_model(kind, **(base | settings)))


def _quantized() -> Any:
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    return model


def _offloaded() -> Any:
    model = tiny_model("llama")
    model.model.layers[0].to("meta")
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no model": (lambda: torch.nn.Linear(2, 2), r"model: one of transformers .* got a Linear"),
    "compiled": (lambda: torch.compile(tiny_model("llama")), r"model: one of transformers"),
    "no generation": (
        _tiny(AutoModel, "llama", num_attention_heads=2),
        r"model: one of transformers that can generate is needed, got a LlamaModel",
    ),
    "encoder-decoder": (
        _tiny(AutoModelForSeq2SeqLM, "t5", d_model=32, d_ff=32, num_layers=1, d_kv=8, num_heads=2),
        r"model: t5 is an encoder-decoder",
    ),
    "recurrent": (
        _tiny(AutoModelForCausalLM, "mamba", state_size=4),
        r"model: model_type 'mamba' is not supported; these are: gemma, ",
    ),
    "linear attention": (
        _tiny(
            AutoModelForCausalLM, "qwen3_next", num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
            linear_value_head_dim=8, num_experts=2, moe_intermediate_size=8,
            shared_expert_intermediate_size=8, num_experts_per_tok=1,
        ),
        r"model: model_type 'qwen3_next' is not supported",
    ),
    "latent attention": (
        _tiny(
            AutoModelForCausalLM, "deepseek_v3", num_attention_heads=2, num_key_value_heads=2,
            q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
            n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1,
            moe_intermediate_size=8, first_k_dense_replace=1,
        ),
        r"model: model_type 'deepseek_v3' is not supported",
    ),
    "rope by length": (
        lambda: tiny_model(
            "llama",
            rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        ),
        r"model: rope_type 'dynamic' is not supported",
    ),
    "both ways": (
        lambda: tiny_model("gemma3_text", use_bidirectional_attention=True),
        r"model: use_bidirectional_attention",
    ),
    "other layers": (
        lambda: tiny_model("qwen2", layer_types=["full_attention"] * 3 + ["chunked_attention"],
                           attention_chunk_size=32),
        r"model: layer 3 \(chunked_attention, DynamicSlidingWindowLayer\)",
    ),
    "quantized": (_quantized, r"model: quantized weights are not supported"),
    "offloaded": (_offloaded, r"model: model\.layers\.0\..* is not in memory"),
}  # fmt: skip


@pytest.mark.parametrize("which", REFUSED)
def test_models_that_cannot_be_served_exactly_are_refused(which: str) -> None:
    """When the cache is made, before anything is read or computed."""
    make, message = REFUSED[which]
    with pytest.raises(ValueError, match=message):
        PromptCache(make(), "127.0.0.1:1", chunk_tokens=CHUNK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_tokens": 0}, r"PromptCache\.chunk_tokens: must be 1 or more, got 0"),
        ({"budget_s": 1.0}, r"PromptCache\.budget_s: no such setting"),
        ({"load_budget_s": 0}, r"PromptCache\.load_budget_s: must lie above 0"),
        ({"token_file": "/nowhere"}, r"token_file: "),
    ],
)
def test_wrong_options_name_their_field(options: Any, message: str, llama: Any) -> None:
    """As every adapter's do."""
    with pytest.raises(ValueError, match=message):
        PromptCache(llama, "127.0.0.1:1", **options)


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ({"torch": "2.13.0"}, r"needs transformers>=.*not installed; pip install 'kvstore-llm\["),
        ({"torch": "2.13.0", "transformers": "4.57.6"}, r"needs transformers>=.*found 4\.57\.6"),
        (
            {"torch": "2.13.0", "transformers": "6.0.0rc1"},
            r"needs transformers>=.*found 6\.0\.0rc1",
        ),
        ({"torch": "2.5.1", "transformers": "5.23.0"}, r"needs torch>=2\.6,<3, found 2\.5\.1"),
    ],
)
def test_other_versions_are_refused_when_it_is_imported(
    installed: dict[str, str], message: str
) -> None:
    """With what is needed, and what was found."""
    assert set(SUPPORTED) == {"torch", "transformers"}
    check_versions({"torch": "2.13.0+cpu", "transformers": "5.23.0.dev0"})
    with pytest.raises(ImportError, match=message):
        check_versions(installed)


def test_a_version_whose_layers_keep_more_is_refused_when_it_is_imported() -> None:
    """It would compute on with less than it needs, without a word."""

    class Counting(DynamicSlidingWindowLayer):  # type: ignore[misc]
        def update(self, *args: Any, **named: Any) -> Any:
            self.seen = getattr(self, "seen", 0) + 1
            return super().update(*args, **named)

    class Longer(DynamicSlidingWindowLayer):  # type: ignore[misc]
        def update(self, keys: Any, values: Any, *args: Any, **named: Any) -> Any:
            before = vars(self)["keys"]
            given = super().update(keys, values, *args, **named)
            self.keys = keys if before is None else torch.cat([before, keys], dim=-2)
            return given

    check_layers()
    for kind, kept in ((Counting, "seen"), (Longer, "keys")):
        with pytest.raises(ImportError, match=f"this version's {kind.__name__} keeps {kept} "):
            check_layers([kind(sliding_window=4)])

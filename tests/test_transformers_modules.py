"""Code that is hung into a model, or put in the place of its own, is refused; some is harmless."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from torch.nn.modules.module import register_module_forward_hook
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.scripted_node import NodeThread
from tests.tiny_models import CHUNK, FAMILIES, prompt, tiny_model
from tests.transformers_rig import answer, ask, patient, plain

pytest_plugins = ["tests.transformers_fixtures"]

TOKENS = prompt(2 * CHUNK + 1)


def steer(module: Any, inputs: Any, output: Any) -> Any:
    """Pushes what a layer says."""
    return output + 1.0


class Steering:
    """The same, as an object, and as a method."""

    def __call__(self, module: Any, inputs: Any, output: Any) -> Any:
        return output + 1.0

    def push(self, module: Any, inputs: Any, output: Any) -> Any:
        """As it is."""
        return output + 1.0


class OtherMLP(LlamaMLP):  # type: ignore[misc]
    """Has the weights of its base, and computes otherwise."""

    def forward(self, x: torch.Tensor) -> Any:
        """Twice as much."""
        return 2 * super().forward(x)


class Doubling(ModelHook):  # type: ignore[misc]
    """One of accelerate's kind that changes what it gets."""

    def post_forward(self, module: Any, output: Any) -> Any:
        """Twice as much."""
        return 2 * output


@contextmanager
def _hook(model: Any, hook: Any = steer) -> Iterator[None]:
    handle = model.model.layers[1].mlp.register_forward_hook(hook)
    yield
    handle.remove()


@contextmanager
def _pre_hook(model: Any) -> Iterator[None]:
    hook = functools.partial(lambda scale, module, inputs: (inputs[0] * scale,), 2.0)
    handle = model.model.layers[1].mlp.register_forward_pre_hook(hook)
    yield
    handle.remove()


@contextmanager
def _hook_on_all(model: Any) -> Iterator[None]:
    handle = register_module_forward_hook(lambda module, inputs, output: None)
    yield
    handle.remove()


@contextmanager
def _forward(model: Any) -> Iterator[None]:
    mlp = model.model.layers[1].mlp
    mlp.forward = MethodType(lambda self, x: 2 * LlamaMLP.forward(self, x), mlp)
    yield
    del mlp.forward


@contextmanager
def _forward_of_a_class(model: Any) -> Iterator[None]:
    before = LlamaMLP.forward
    LlamaMLP.forward = lambda self, x: 2 * before(self, x)
    yield
    LlamaMLP.forward = before


@contextmanager
def _class(model: Any) -> Iterator[None]:
    mlp = model.model.layers[1].mlp
    mlp.__class__ = OtherMLP
    yield
    mlp.__class__ = LlamaMLP


@contextmanager
def _accelerated(model: Any) -> Iterator[None]:
    mlp = model.model.layers[1].mlp
    add_hook_to_module(mlp, AlignDevicesHook("cpu"))
    add_hook_to_module(mlp, Doubling(), append=True)
    yield
    del mlp.forward, mlp._hf_hook, mlp._old_forward


FOREIGN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook": (_hook, r"model: model\.layers\.1\.mlp has a forward hook, steer"),
    "object": (lambda model: _hook(model, Steering()), r"mlp has a forward hook, Steering,"),
    "method": (lambda model: _hook(model, Steering().push), r"forward hook, Steering\.push"),
    "pre-hook": (_pre_hook, r"mlp has a forward hook, _pre_hook\.<locals>"),
    "global hook": (_hook_on_all, r"torch: every module has a forward hook"),
    "forward": (_forward, r"model: model\.layers\.1\.mlp has another forward"),
    "forward of a class": (_forward_of_a_class, r"model\.layers\.0\.mlp has another forward"),
    "class": (_class, r"mlp is a .*test_transformers_modules\.OtherMLP; only modules of"),
    "accelerate's": (_accelerated, r"model\.layers\.1\.mlp has another forward"),
}


@pytest.mark.parametrize("which", FOREIGN)
def test_code_that_is_none_of_the_models_is_refused(which: str, scripted: NodeThread) -> None:
    """Before anything is loaded, and in a session before anything of it is stored."""
    change, message = FOREIGN[which]
    model = tiny_model("llama", seed=12)
    with patient(model, scripted.endpoint) as cache:
        with change(model), pytest.raises(ValueError, match=message):
            cache.session(TOKENS)
        with cache.session(TOKENS) as session, change(model):
            within = f"{message}|a module, since the session began"
            with pytest.raises(ValueError, match=within):
                answer(model, **session.inputs)
        assert ask(cache, model, TOKENS)[0] == 0
        assert ask(cache, model, TOKENS)[0] == 2 * CHUNK


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_hangs_into_a_model_is_harmless(
    family: str, scripted: NodeThread
) -> None:
    """Hooks that collect outputs stay there once some were asked for; and those of training."""
    model = tiny_model(family, seed=12)
    with patient(model, scripted.endpoint) as cache:
        ask(cache, model, TOKENS)
        model(TOKENS, output_hidden_states=True)
        model.enable_input_require_grads()
        hooks = [hook for module in model.modules() for hook in module._forward_hooks]
        assert len(hooks) > 1
        assert ask(cache, model, TOKENS)[0] == 2 * CHUNK


def test_what_accelerate_hangs_into_a_model_on_one_device_is_harmless(
    scripted: NodeThread,
) -> None:
    """It moves to that device what is there."""
    model = tiny_model("llama", seed=12)
    expected = plain(model, TOKENS)[0]
    with patient(model, scripted.endpoint) as cache:
        ask(cache, model, TOKENS)
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
        assert any("forward" in vars(module) for module in model.modules())
        assert ask(cache, model, TOKENS)[0] == 2 * CHUNK
        assert plain(model, TOKENS)[0] == expected

"""What a model's modules compute beside what their weights say.

Code that was hung into a model, or put in the place of its own, changes keys and values, and has no
digest: a model that has some is refused. What its own classes are, and how each module is set, is
part of its name.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

_OURS = "kvstore_client.transformers."
_PACKAGES = ("torch", "transformers", "peft")
"""Their modules compute what classes, settings and weights say; of adapters see `Adapters`."""
_GRADIENTS = "make_inputs_require_grad"
"""A hook that peft hangs on embeddings, for training; it changes no value."""
_BASE = ".base_layer"


def check_modules(model: Any) -> None:
    """Raises ValueError, naming it, for code beside that of transformers, torch and peft.

    Hooks of their own that change nothing may stay: those that collect outputs, that ask for
    gradients, and accelerate's for a model on one device. Quick enough to be asked before each
    pass. What is patched into the libraries themselves is not seen.
    """
    everywhere = (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks)
    _check_hooks("torch: every module", *everywhere)
    for name, module in model.named_modules():
        kind, what = type(module), name or "it"
        if _package(kind) not in _PACKAGES:
            raise ValueError(
                f"model: {what} is a {kind.__module__}.{kind.__qualname__}; only modules of "
                "transformers, torch and peft are supported"
            )
        replaced = "forward" in vars(module) and not _is_of_accelerate(module)
        if replaced or _package(kind.forward) not in _PACKAGES:
            raise ValueError(
                f"model: {what} has another forward than its class once had, by which keys and "
                "values may be others; put that one back"
            )
        _check_hooks(f"model: {what}", module._forward_pre_hooks, module._forward_hooks)


def module_classes(model: Any) -> tuple[type, ...]:
    """It differs when a module was replaced by another kind of one. As quick as `check_modules`."""
    return tuple(map(type, model.modules()))


def module_settings(model: Any) -> dict[str, str]:
    """Of each module, by its name without adapters: its class, and the numbers that it keeps."""
    settings: dict[str, str] = {}
    adapted: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if _package(type(module)) == "peft":
            adapted += (f"{name}.",)
        elif not name.startswith(adapted) or _BASE in name:
            settings[name.replace(_BASE, "")] = _settings(module)
    return settings


def _check_hooks(whose: str, *hooks: Mapping[int, Any]) -> None:
    for each in hooks:
        # Another thread may begin or end a session meanwhile.
        for hook in tuple(each.values()) if each else ():
            if not _is_harmless(hook):
                raise ValueError(
                    f"{whose} has a forward hook, {_named(hook)}, by which keys and values may be "
                    "others; remove it while stored prompts are used"
                )


def _is_harmless(hook: Any) -> bool:
    function = _function(hook)
    return (
        str(function.__module__).startswith(_OURS)
        or _package(function) == "transformers"
        or (_package(function) == "peft" and _named(hook).endswith(_GRADIENTS))
    )


def _is_of_accelerate(module: Any) -> bool:
    """Whether `forward` was replaced by accelerate's, and moves to one device what is there."""
    hook = getattr(module, "_hf_hook", None)
    former = getattr(module, "_old_forward", None)
    return (
        _is_aligning(hook)
        and _function(vars(module)["forward"]).__module__ == "accelerate.hooks"
        and getattr(former, "__func__", None) is type(module).forward
    )


def _is_aligning(hook: Any) -> bool:
    if type(hook).__module__ != "accelerate.hooks":
        return False
    if type(hook).__name__ == "SequentialHook":
        return all(map(_is_aligning, hook.hooks))
    return type(hook).__name__ == "AlignDevicesHook" and not hook.offload


def _settings(module: Any) -> str:
    kind = type(module)
    kept: Iterable[tuple[str, Any]] = () if isinstance(module, PreTrainedModel) else _public(module)
    numbers = sorted((name, value) for name, value in kept if isinstance(value, int | float))
    return f"{kind.__module__}.{kind.__qualname__} {numbers}"


def _public(module: Any) -> Iterable[tuple[str, Any]]:
    return ((name, value) for name, value in vars(module).items() if not name.startswith("_"))


def _function(hook: Any) -> Any:
    """What a hook is, out of what it is bound to; of an object that is called, its class."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    hook = getattr(hook, "__func__", hook)
    return hook if hasattr(hook, "__qualname__") else type(hook)


def _named(hook: Any) -> str:
    return str(_function(hook).__qualname__)


def _package(code: Any) -> str:
    return str(code.__module__).partition(".")[0]

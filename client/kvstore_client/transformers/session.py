"""One prompt, or several of equal length, from what is stored of them to what is new."""

import inspect
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from operator import is_
from types import TracebackType
from typing import Any, Self

import torch
from transformers.cache_utils import DynamicCache

from kvstore_client.transformers.modules import check_modules
from kvstore_client.transformers.restore import Restored
from kvstore_client.transformers.saving import Saving
from kvstore_client.transformers.supported import check_autocast, check_others

_KNOWN = {"input_ids", "attention_mask", "position_ids", "cache_position"}
"""Tensors that a forward pass may be given; each is checked."""
_CACHE_NAMES = ("cache", "past_key_values")
"""What a model calls its cache, since transformers 5.24 and before."""

_log = logging.getLogger("kvstore.transformers.session")


class Session:
    """Follows the forward passes over its cache: what they are given must be its own prompts.

    Another prompt, padding or other positions in the same cache would make stored blocks wrong,
    or restored ones; so they raise ValueError, whether or not a node is there. Use as a context
    manager, or close it: one that nobody holds any more follows no more. The cache stays the
    caller's, and usable.
    """

    def __init__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        cache: DynamicCache,
        chunk_tokens: int,
        restored: Restored,
        saving: Saving,
        changed: Callable[[], bool],
    ) -> None:
        self.cache = cache
        """Holds the restored tokens, and all others once they are computed."""
        self.inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            _cache_name(model): cache,
            "prefill_chunk_size": chunk_tokens,
        }
        """What `generate` needs to be told: `model.generate(**session.inputs, ...)`."""
        self.prompt_tokens = input_ids.shape[1]
        """Of each row."""
        self.restored_tokens = restored.blocks * chunk_tokens
        """How many of them need not be computed."""
        self.restored_from = dict(restored.tiers)
        """Blocks by the tier that they lay in, over all rows and groups of layers."""
        self._tokens = input_ids.to(model.device, copy=True)
        self._saving = saving
        self._changed = changed
        self._start = 0
        self._kept: list[torch.Tensor | None] = _tensors(cache)
        """What the pass before left in the cache; given back while the next one runs."""
        self._hooks = _Hooks(model, self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops following; what was computed is on its way to the store. Idempotent."""
        self._hooks.remove()
        self._kept = []
        self._saving.finish()

    def _follows(self, named: Mapping[str, Any]) -> bool:
        return any(named.get(name) is self.cache for name in _CACHE_NAMES)

    def before(self, model: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """A pass begins. Raises ValueError unless it is one of this session, or of another."""
        if not self._follows(named):
            return
        self._start = self.cache.get_seq_length()
        if self._start < self.prompt_tokens:
            self._check(model, named.get("input_ids", arguments[0] if arguments else None), named)
            if not _same(self._kept, _tensors(self.cache)):
                # Its rows may have been put into another order.
                self._saving.disturbed()
        self._kept = []

    def after(self, named: Mapping[str, Any]) -> None:
        """A pass is over."""
        if not self._follows(named):
            return
        count = self.cache.get_seq_length() - self._start
        if self._start < self.prompt_tokens:
            if count:
                self._saving.computed(self._start, count, self.cache)
            self._kept = _tensors(self.cache)

    def _check(self, model: Any, tokens: Any, named: Mapping[str, Any]) -> None:
        """Raises ValueError unless the pass computes the next tokens of the session's prompts."""
        if not isinstance(tokens, torch.Tensor):
            raise ValueError("inputs_embeds: is not supported; only tokens are, input_ids")
        rows, count = tokens.shape
        end = self._start + count
        if rows != len(self._tokens):
            raise ValueError(
                f"num_beams, num_return_sequences: must be 1; the session has {len(self._tokens)} "
                f"rows, and {rows} are computed"
            )
        expected = self._tokens[:, self._start : end]
        if not torch.equal(tokens[:, : expected.shape[1]].to(expected.device), expected):
            raise ValueError("input_ids: other tokens are computed than those of the session")
        check_autocast(self._tokens.device)
        check_others({n: v for n, v in named.items() if n not in _KNOWN and _is_input(v)})
        if not _is_ones(named.get("attention_mask")):
            raise ValueError("attention_mask: only ones are supported, for all tokens")
        if not _count_from(self._start, end, named.get("position_ids")):
            raise ValueError("position_ids: must be those of the tokens, counted from 0")
        if self._changed():
            raise ValueError(
                "model: its weights or its adapter changed, or a module, since the session began"
            )
        check_modules(model)


class _Hooks:
    """Tells a session of its model's passes, as long as somebody holds the session."""

    def __init__(self, model: Any, session: Session) -> None:
        self._session = weakref.ref(session)
        self._handles = (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        )

    def remove(self) -> None:
        """Tells no more. Idempotent."""
        for handle in self._handles:
            handle.remove()

    def _before(self, model: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        session = self._session()
        if session is not None:
            session.before(model, arguments, named)
            return
        # Not when the session went: then, anyone may have been going through the hooks.
        self.remove()
        _log.warning("a session was dropped without being closed; the rest of it is not stored")

    def _after(
        self, model: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        session = self._session()
        if session is not None:
            session.after(named)


def _tensors(cache: DynamicCache) -> list[torch.Tensor | None]:
    return [half for layer in cache.layers for half in (layer.keys, layer.values)]


def _same(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _cache_name(model: Any) -> str:
    known = inspect.signature(model.forward).parameters
    return next(name for name in _CACHE_NAMES if name in known)


def _is_input(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _is_ones(mask: Any) -> bool:
    return mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2 and bool(mask.all()))


def _count_from(start: int, end: int, positions: torch.Tensor | None) -> bool:
    if positions is None:
        return True
    expected = torch.arange(start, end, device=positions.device)
    return positions.shape[-1] == end - start and bool((positions == expected).all())

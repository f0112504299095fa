"""What is stored of prompts, for one model that generates in this process."""

import threading
from collections import Counter
from types import TracebackType
from typing import Any, Self

import torch
from transformers.cache_utils import DynamicCache

from kvstore.api.hint import MAX_SESSION_ID_BYTES, Reuse, ReuseHint
from kvstore.api.keys import chain_keys, root_key
from kvstore_client.endpoint_options import DEFAULT_ENDPOINT
from kvstore_client.engine.options import EngineOptions
from kvstore_client.engine.uploads import Uploads
from kvstore_client.restore_gate import RestoreGate
from kvstore_client.space import Space
from kvstore_client.transformers.groups import layer_groups
from kvstore_client.transformers.identity import Identity, Look, describe_numerics
from kvstore_client.transformers.restore import Prompts, Restorer
from kvstore_client.transformers.saving import Saving
from kvstore_client.transformers.session import Session
from kvstore_client.transformers.supported import check_inputs, check_state, supported_model

CHUNK_TOKENS = 256


class PromptCache:
    """Makes the sessions of one model. Any thread may call; a session belongs to one.

    What a caller does wrong raises ValueError, naming the field. The store never raises, and never
    holds a session up for longer than `match_budget_s` and `load_budget_s`. Close it, or use it as
    a context manager.
    """

    def __init__(
        self,
        model: Any,
        endpoint: str = DEFAULT_ENDPOINT,
        *,
        chunk_tokens: int = CHUNK_TOKENS,
        **options: Any,
    ) -> None:
        """Reads the model's weights once, to name them. The node need not be there yet.

        Prompts are computed, stored and restored in pieces of `chunk_tokens`. `options` are those
        of `EngineOptions`.
        """
        self._options = EngineOptions.read({"endpoint": endpoint, **options}, "PromptCache")
        if not isinstance(chunk_tokens, int) or chunk_tokens < 1:
            raise ValueError(f"PromptCache.chunk_tokens: must be 1 or more, got {chunk_tokens}")
        self._model = supported_model(model)
        self._groups = layer_groups(self._model.config, self._model.dtype, chunk_tokens)
        self._chunk_tokens = chunk_tokens
        self._identity = Identity(self._model, self._options.model_revision)
        self._lock = threading.Lock()
        """Guards the identity while it is brought up to date."""
        self._counters: Counter[str] = Counter()
        block_bytes = self._groups[0].block_bytes
        gate = RestoreGate(chunk_tokens, block_bytes) if self._options.restore_gate else None
        self._gate = gate
        self._client = self._options.connect()
        self._uploads = Uploads(
            self._client, self._options.max_saving_bytes, scope=self._options.scope
        )
        self._restorer = Restorer(self._client, self._options, self._groups, gate)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def counters(self) -> Counter[str]:
        """What happened so far, by the names in docs/transformers.md."""
        tokens = self._restorer.counters + self._counters
        return Counter(
            {f"{name}_tokens": count for name, count in tokens.items()}
            | {f"{name}_blocks": count for name, count in self._uploads.counters.items()}
            | dict(self._client.counters)
        )

    def session(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        salt: bytes = b"",
        session_id: bytes = b"",
        final: bool = False,
        **others: Any,
    ) -> Session:
        """Loads what is stored of the prompts, and follows `generate` to store the rest.

        `input_ids`, [row, token], are whole prompts of equal length, from their first token on.
        `salt` separates callers who must not share. `session_id` (up to 32 bytes) names a
        conversation, `final` says that nobody will continue it: advice for what to keep. `others`
        are what a tokenizer gave beside; what is not known to be harmless raises ValueError.
        """
        model = self._model
        # The caller may fill his own with the next prompt, before this one is computed.
        tokens = check_inputs(model, input_ids, attention_mask, others).clone()
        check_state(model)
        hint = _hint(session_id, final)
        look = self._look()
        prompts = self._prompts(tokens, salt, hint, look)
        cache = DynamicCache(config=model.config)
        restored = self._restorer.restore(prompts, cache, model.device)
        saving = Saving(
            prompts,
            self._groups,
            self._uploads,
            restored.blocks,
            counters=self._counters,
            gate=self._gate,
        )
        return Session(
            model,
            tokens,
            cache,
            self._chunk_tokens,
            restored,
            saving,
            lambda: self._identity.changed(look),
        )

    def drain(self, timeout_s: float) -> bool:
        """Waits until what was computed so far is stored; False if it was not in time."""
        return self._uploads.drain(timeout_s)

    def close(self, timeout_s: float = 5.0) -> None:
        """Waits so long for what is still to be stored, drops the rest, and hangs up. Idempotent.

        Sessions may go on; they store no more.
        """
        self._uploads.close(timeout_s)
        self._client.close()

    def _look(self) -> Look:
        with self._lock:
            return self._identity.look()

    def _prompts(
        self, tokens: torch.Tensor, salt: bytes, hint: ReuseHint | None, look: Look
    ) -> Prompts:
        root = root_key(salt, look.adapter)
        rows, length = tokens.shape
        common = {
            "model": type(self._model).__qualname__,
            "revision": look.revision,
            "numerics": describe_numerics(self._model, self._chunk_tokens, rows),
        }
        return Prompts(
            spaces=[Space.of(group.describe(**common)) for group in self._groups],
            keys=[chain_keys(root, row, self._chunk_tokens) for row in tokens.tolist()],
            restorable_blocks=(length - 1) // self._chunk_tokens,
            hint=hint,
        )


def _hint(session_id: bytes, final: bool) -> ReuseHint | None:
    if len(session_id) > MAX_SESSION_ID_BYTES:
        raise ValueError(f"session_id: at most {MAX_SESSION_ID_BYTES} bytes, got {len(session_id)}")
    if not session_id and not final:
        return None
    return ReuseHint(session_id, Reuse.FINAL if final else Reuse.UNKNOWN)

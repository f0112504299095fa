"""The settings: `--hicache-storage-backend-extra-config`, less what SGLang takes of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from kvstore_client.engine.options import EngineOptions

WHERE = "hicache-storage-backend-extra-config"
FACTORY = ("backend_name", "module_path", "class_name", "interface_v1")
"""Fields of the same mapping that SGLang reads and leaves in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SGLangOptions(EngineOptions):
    """What every adapter has, and what SGLang does not tell a storage backend.

    `max_saving_bytes` has no effect here: SGLang's own threads wait for stores, and its host pool
    holds the bytes meanwhile.
    """

    model_path: str = ""
    """Where the weights are; empty: where the engine says it loaded them from."""
    adapters_revision: str = ""
    """What names the weights of all LoRA adapters together; empty: found out from their files."""
    variant: str = ""
    """Whatever else decides the bytes of KV and is not known here; another text, another space."""
    prefill_tokens_per_s: float = 0.0
    """How fast this engine computes a prompt, for the restore gate; 0: not known, and all that
    is found is loaded."""
    untested_engine: bool = False
    """Whether a version of SGLang that was not tested may run with this."""

    def __post_init__(self) -> None:
        EngineOptions.__post_init__(self)
        if not (math.isfinite(self.prefill_tokens_per_s) and self.prefill_tokens_per_s >= 0):
            raise ValueError(
                f"prefill_tokens_per_s: must be 0 or more, got {self.prefill_tokens_per_s}"
            )

    @classmethod
    def of_extra_config(cls, extra_config: Mapping[str, Any] | None) -> Self:
        """The settings of an extra config. Raises ValueError, naming the field."""
        own = {name: value for name, value in (extra_config or {}).items() if name not in FACTORY}
        return cls.read(own, WHERE)

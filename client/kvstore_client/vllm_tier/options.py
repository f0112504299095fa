"""The settings of the tier, as they stand in `secondary_tiers`."""

from dataclasses import dataclass

from kvstore_client.engine.options import EngineOptions

LOCALITIES = ("", "LOCAL", "REMOTE")


@dataclass(frozen=True, slots=True, kw_only=True)
class TierOptions(EngineOptions):
    """Those of every adapter; where the tier takes one otherwise, it says so here."""

    max_saving_bytes: int = 4 << 30
    """Rows of the primary tier that wait to be stored and are pinned meanwhile, not copies; what
    comes while there are as many is not stored."""
    restore_gate: bool = False
    """Always false: nobody tells a tier how fast the engine computes."""
    locality: str = ""
    """What vLLM's events and a request's `kv_load_tiers` call this tier: LOCAL, REMOTE or empty."""

    def __post_init__(self) -> None:
        EngineOptions.__post_init__(self)
        if self.restore_gate:
            raise ValueError(
                "restore_gate: a tier is not told how fast the engine computes; "
                "KVStoreConnector is, and has it"
            )
        if self.locality not in LOCALITIES:
            raise ValueError(f"locality: LOCAL, REMOTE or empty, got {self.locality!r}")

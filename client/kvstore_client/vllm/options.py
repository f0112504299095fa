"""What `kv_connector_extra_config` may say."""

from dataclasses import dataclass

from kvstore_client.engine.options import EngineOptions

MAX_LOAD_THREADS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectorOptions(EngineOptions):
    """The settings of every adapter, and those of this one."""

    load_async: bool = True
    """Whether requests wait for their load beside the steps of others. False holds the step up
    for as long as the load takes; models with several KV cache groups always load beside."""
    load_threads: int = 4
    """Loads under way at once, in each worker."""
    max_loading_bytes: int = 256 << 20
    """Host memory, in each worker, through which loads pass on their way to the KV cache."""
    save_output: bool = True
    """Whether blocks with generated tokens are stored, or those of prompts alone."""
    finish_hints: bool = True
    """Whether the node hears how a request ended, as evidence for what it keeps."""
    drain_timeout_s: float = 4.0
    """How long an engine that ends waits for what is still to be stored."""

    def __post_init__(self) -> None:
        EngineOptions.__post_init__(self)
        if not 1 <= self.load_threads <= MAX_LOAD_THREADS:
            raise ValueError(
                f"load_threads: must lie in 1 … {MAX_LOAD_THREADS}, got {self.load_threads}"
            )
        if self.max_loading_bytes < 1:
            raise ValueError(f"max_loading_bytes: must be 1 or more, got {self.max_loading_bytes}")
        if not 0 <= self.drain_timeout_s <= 60:
            raise ValueError(f"drain_timeout_s: must lie in 0 … 60, got {self.drain_timeout_s}")

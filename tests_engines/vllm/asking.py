"""What the tests ask of an engine run: models, connectors, prompts (see `engine_run.py`)."""

from pathlib import Path
from typing import Any

from tests_engines.vllm.models import prompt_of

BLOCK_TOKENS = 128
"""vLLM's on a CPU."""
MATCH_BUDGET_S = 10.0
LOAD_BUDGET_S = 30.0
"""Where nothing is meant to be late: the machine may be slow, and late is a miss."""

Prompt = dict[str, Any]
Request = dict[str, Any]


def prompt(seed: int, tokens: int, **more: Any) -> Prompt:
    """A prompt of so many tokens; `salt` and `adapter` go with it."""
    return {"tokens": prompt_of(seed, tokens), **more}


def full_blocks(*prompts: Prompt, block_tokens: int = BLOCK_TOKENS) -> int:
    """How many blocks of the prompts may come from elsewhere: one token is always computed."""
    return sum((len(each["tokens"]) - 1) // block_tokens for each in prompts)


def generate(name: str, *prompts: Prompt, together: bool = False, max_tokens: int = 8) -> Request:
    """A step that generates. One prompt after the other unless `together`: equal batch shapes."""
    step = {"generate": list(prompts), "name": name, "max_tokens": max_tokens}
    return step | {"one_by_one": not together}


def ask(event: str) -> Request:
    """A step that tells the test, and waits for it."""
    return {"ask": event}


FORGET: Request = {"forget": True}


def engine(
    name: str, model: Path, connector: dict[str, Any] | None, *steps: Request, **llm: Any
) -> dict[str, Any]:
    """One engine of a run; `plant` and `env` are the run's, all others go to `vllm.LLM`."""
    own: dict[str, Any] = {key: llm.pop(key) for key in ("plant", "env") if key in llm}
    llm["model"] = str(model)
    return own | {"name": name, "llm": llm, "kv_transfer_config": connector, "steps": steps}


def connector(name: str, **extra: Any) -> dict[str, Any]:
    """A connector with a witness (`recording.py`)."""
    return {
        "kv_connector": name,
        "kv_connector_module_path": "tests_engines.vllm.recording",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


def kvstore(endpoint: str, **extra: Any) -> dict[str, Any]:
    """Ours, patient, and without the gate: such small models compute sooner than any store loads.

    `extra` are settings of the connector.
    """
    patient = {"match_budget_s": MATCH_BUDGET_S, "load_budget_s": LOAD_BUDGET_S, "lease_ms": 60_000}
    settings = {"endpoint": endpoint, "restore_gate": False, "store_budget_s": LOAD_BUDGET_S}
    return connector("KVStoreConnector", **(settings | patient | extra))


def offloading(
    *tiers: dict[str, Any], name: str = "OffloadingConnector", primary_bytes: int = 256 << 20
) -> dict[str, Any]:
    """vLLM's own offloading over these tiers."""
    return connector(
        name,
        spec_name="CPUTieringSpec",
        spec_module_path="tests_engines.vllm.cpu_spec",
        cpu_bytes_to_use=primary_bytes,
        secondary_tiers=list(tiers),
    )


def tier(endpoint: str, **settings: Any) -> dict[str, Any]:
    """Ours, patient unless a test says otherwise."""
    patient = {"match_budget_s": 60, "load_budget_s": 60, "store_budget_s": 60}
    return {
        "type": "KVStoreTier",
        "module_path": "kvstore_client.vllm_tier",
        "endpoint": endpoint,
    } | (patient | settings)


def tiered(endpoint: str, **settings: Any) -> dict[str, Any]:
    """vLLM's offloading over KVStoreTier."""
    return offloading(tier(endpoint, **settings))

"""Runs engines as a JSON file says and writes what came out to another: `engine_run IN OUT`.

IN: `{"engines": [{"name", "llm", "kv_transfer_config", "steps", "plant", "env"}, ...]}`. They run
one after the other in this process, so that each pays only for its own start. `llm` goes to
`vllm.LLM` over `DEFAULTS`; `kv_transfer_config` is vLLM's own or null; a step is one of

* `{"generate": [PROMPT, ...], "name", "max_tokens", "one_by_one"}`, where PROMPT is
  `{"tokens", "salt", "adapter": {"name", "id", "path", "replaced"}}`: all prompts in one call, or
  each in one of its own;
* `{"forget": true}`: vLLM's own prefix cache is emptied;
* `{"ask": EVENT}`: tells the test and waits for its answer, as the witness does (`recording.py`).

OUT: `{"engines": [{"name", "init_s", "steps": [...], "lines": [...], "error"}]}`: of each step its
outputs, how vLLM's counters moved, and seconds; `lines` are what the witness wrote.
An error of an engine is its last word; later engines run all the same.
"""

import gc
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from tests_engines.vllm import environment

environment.prepare()

import vllm  # noqa: E402  Its settings are read from the environment when it is imported.
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.v1.metrics.reader import Counter  # noqa: E402

from tests_engines.vllm import recording  # noqa: E402

DEFAULTS: dict[str, Any] = {
    "enforce_eager": True,
    "distributed_executor_backend": "uni",
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 4,
    "prefix_caching_hash_algo": "sha256_cbor",
    "disable_log_stats": False,
    "seed": 0,
}
LABELS_LEFT_OUT = ("model_name", "engine")


def main() -> None:
    """Reads the one file, writes the other."""
    source, target = (Path(name) for name in sys.argv[1:])
    wanted = json.loads(source.read_text())
    engines = [_run(engine) for engine in wanted["engines"]]
    target.write_text(json.dumps({"engines": engines}))


def _run(wanted: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {"name": wanted["name"], "steps": [], "lines": [], "error": None}
    os.environ.update(wanted.get("env") or {})
    os.environ[recording.PLANT_VARIABLE] = wanted.get("plant") or ""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        os.environ[recording.RECORD_VARIABLE] = str(record)
        try:
            _run_steps(wanted, out)
        except Exception:  # noqa: BLE001  The test reads it.
            out["error"] = traceback.format_exc()
        _clean_up()
        if record.exists():
            out["lines"] = [json.loads(line) for line in record.read_text().splitlines()]
    return out


def _run_steps(wanted: dict[str, Any], out: dict[str, Any]) -> None:
    settings = DEFAULTS | wanted["llm"]
    if wanted.get("kv_transfer_config") is not None:
        settings["kv_transfer_config"] = wanted["kv_transfer_config"]
    begun_s = time.monotonic()
    llm = vllm.LLM(**settings)
    out["init_s"] = time.monotonic() - begun_s
    try:
        for step in wanted["steps"]:
            if "generate" in step:
                out["steps"].append(_generate(llm, step))
            elif step.get("forget"):
                assert llm.reset_prefix_cache()
            else:
                recording.asker()(step["ask"], {})
    finally:
        begun_s = time.monotonic()
        llm.llm_engine.engine_core.shutdown()
        out["shutdown_s"] = time.monotonic() - begun_s


def _generate(llm: vllm.LLM, step: dict[str, Any]) -> dict[str, Any]:
    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=step.get("max_tokens", 8), ignore_eos=True, logprobs=1
    )
    prompts = step["generate"]
    before, begun_s = _counters(llm), time.monotonic()
    outputs = []
    for part in [[one] for one in prompts] if step.get("one_by_one") else [prompts]:
        outputs += llm.generate(
            [_prompt(one) for one in part],
            sampling,
            lora_request=[_adapter(one) for one in part],
            use_tqdm=False,
        )
    seconds = time.monotonic() - begun_s
    moved = {name: value - before.get(name, 0) for name, value in _counters(llm).items()}
    return {
        "name": step.get("name", ""),
        "seconds": seconds,
        "counters": {name: value for name, value in moved.items() if value},
        "outputs": [_output(one) for one in outputs],
    }


def _prompt(wanted: dict[str, Any]) -> dict[str, Any]:
    prompt = {"prompt_token_ids": wanted["tokens"]}
    return prompt | ({"cache_salt": wanted["salt"]} if wanted.get("salt") else {})


def _adapter(wanted: dict[str, Any]) -> LoRARequest | None:
    adapter = wanted.get("adapter")
    if adapter is None:
        return None
    return LoRARequest(
        adapter["name"],
        adapter["id"],
        adapter["path"],
        load_inplace=bool(adapter.get("replaced")),
    )


def _output(output: Any) -> dict[str, Any]:
    [completion] = output.outputs
    chosen = zip(completion.token_ids, completion.logprobs, strict=True)
    times = output.metrics
    return {
        "tokens": list(completion.token_ids),
        "logprobs": [step[token].logprob for token, step in chosen],
        "finish_reason": completion.finish_reason,
        "cached_tokens": output.num_cached_tokens,
        "first_token_s": times.first_token_latency if times else None,
        "preemptions": times.num_preemptions if times else None,
        "kv_transfer_params": output.kv_transfer_params,
    }


def _counters(llm: vllm.LLM) -> dict[str, int]:
    """vLLM's counters by name and labels; those of earlier engines of the process are in them."""
    counters = {}
    for metric in llm.get_metrics():
        if isinstance(metric, Counter):
            labels = {k: v for k, v in metric.labels.items() if k not in LABELS_LEFT_OUT}
            words = ",".join(f"{name}={value}" for name, value in sorted(labels.items()))
            counters[metric.name + (f"{{{words}}}" if words else "")] = metric.value
    return counters


def _clean_up() -> None:
    """So that another engine can start in this process."""
    gc.collect()
    cleanup_dist_env_and_memory()
    gc.collect()


if __name__ == "__main__":
    main()

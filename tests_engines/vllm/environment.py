"""The environment variables of every process that imports vLLM here."""

import os

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # The number of threads decides how floats are summed, and vLLM would take one core less beside
    # a connector: so both sides of a comparison are told the same. One, as two tests run at once.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}


def prepare() -> None:
    """Sets what is not set; `PYTHONHASHSEED` would replace the seed of vLLM's block hashes."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ.pop("PYTHONHASHSEED", None)

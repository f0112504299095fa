"""`vllm serve`, stopped and started again: the second server is warm, and says so."""

from pathlib import Path

from tests_engines.vllm.asking import full_blocks, kvstore, prompt
from tests_engines.vllm.cores import cores
from tests_engines.vllm.models import Models
from tests_engines.vllm.rig import Node
from tests_engines.vllm.serving import Server

PROMPT = prompt(1, 700)
BLOCKS = full_blocks(PROMPT)


def test_a_second_server_reports_cached_tokens(home: Path, tiny: Models, node: Node) -> None:
    """The HTTP answer names them, with the same tokens; both kinds of metrics are at /metrics."""
    # As documentation tells users: the connector's own name, without a module path.
    connector = kvstore(node.endpoint)
    del connector["kv_connector_module_path"]
    with cores(), Server(home, tiny["llama"], connector, "first") as server:
        first = server.complete(PROMPT["tokens"])
        warm = server.complete(PROMPT["tokens"])
        node.wait_for(BLOCKS)
        counted = server.metrics()
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert counted["vllm:external_prefix_cache_hits_total"] == 0
    with cores(), Server(home, tiny["llama"], connector, "second") as server:
        second = server.complete(PROMPT["tokens"])
        salted = server.complete(PROMPT["tokens"], cache_salt="another")
        counted = server.metrics()
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == BLOCKS * 128
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["choices"][0]["text"] == first["choices"][0]["text"]
    logprobs = second["choices"][0]["logprobs"]
    assert logprobs == warm["choices"][0]["logprobs"]
    assert counted["vllm:external_prefix_cache_hits_total"] == BLOCKS * 128
    by_source = "vllm:prompt_tokens_by_source_total{source=%s}"
    assert counted[by_source % "external_kv_transfer"] == BLOCKS * 128
    assert counted["vllm:kvstore_loaded_blocks_total"] == BLOCKS
    assert counted["vllm:kvstore_loads_total{result=whole}"] == 1

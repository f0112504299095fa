"""The demo: its proof bites, and the command does what the README says of it."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("torch")

from kvstore.api.tier import Loaded
from kvstore_client import Client, Match, Space
from kvstore_workers.demo.documents import document_tokens, load_tokenizer
from kvstore_workers.demo.proof import Proof, prove
from kvstore_workers.demo_model import demo_model_dir
from kvstore_workers.link import StoreClient
from kvstore_workers.request import Completion, Request
from kvstore_workers.worker import Worker, WorkerConfig

Tamper = Callable[[Sequence[memoryview]], None]

PROMPT_TOKENS = 700
NEW_TOKENS = 8


class Tampering(Client):
    """A real client whose caller's buffers are changed after everything was verified.

    It maps no arena: what lies there cannot be changed.
    """

    def __init__(self, endpoint: str, token: str | None, tamper: Tamper) -> None:
        super().__init__(endpoint, token=token, shared_memory=False)
        self._tamper = tamper

    def load_stream(
        self,
        space: Space,
        keys: Sequence[bytes],
        buffers: Sequence[bytearray | memoryview],
        *,
        scopes: Sequence[str] = (),
        lease: Match | None = None,
        budget_s: float | None = None,
    ) -> Generator[list[Loaded], None, None]:
        arriving = super().load_stream(
            space, keys, buffers, scopes=scopes, lease=lease, budget_s=budget_s
        )
        loaded = [block for blocks in arriving for block in blocks]
        self._tamper([memoryview(buffer) for buffer in buffers[: len(loaded)]])
        yield loaded


def swap(buffers: Sequence[memoryview]) -> None:
    """Two blocks of one chain change places."""
    first, second = bytes(buffers[1]), bytes(buffers[2])
    buffers[1][:], buffers[2][:] = second, first


def plant(foreign: bytes, buffers: Sequence[memoryview]) -> None:
    """A valid block of another prompt takes the place of one of this."""
    buffers[3][:] = foreign


def flip(buffers: Sequence[memoryview]) -> None:
    """The lowest bit of one element changes."""
    buffers[0][1000] ^= 1


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A store node in a process of its own."""
    home = tmp_path_factory.mktemp("store")
    command = [sys.executable, "-m", "kvstore", "serve", "--supervised"]
    command += ["--server-listen", "127.0.0.1:0", "--server-metrics-listen", ""]
    command += ["--memory-capacity-bytes", "32MiB", "--memory-slab-bytes", "1MiB"]
    command += ["--disk-path", str(home / "blocks")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        yield str(json.loads(process.stdout.readline())["endpoint"])
        process.stdin.close()
        assert process.wait(30) == 0


def worker(endpoint: str, tamper: Tamper | None = None) -> Worker:
    """A worker with the demo model; `tamper` gets at what its client loads."""
    config = WorkerConfig(
        checkpoint=demo_model_dir(),
        vram_blocks=96,
        store_endpoint=endpoint,
        record_spill_digests=True,
        restore_gate=False,
    )
    if tamper is None:
        return Worker(config)

    def connect(address: str, token: str | None) -> StoreClient:
        return Tampering(address, token, tamper)

    return Worker(config, connect=connect)


def prompt(module: str) -> list[int]:
    """The beginning of a document."""
    return document_tokens(load_tokenizer(demo_model_dir()), module, "tests", PROMPT_TOKENS)


def ask(tokens: list[int], *, use_cache: bool) -> Request:
    """A request whose answer can be proven."""
    return Request(
        tokens, NEW_TOKENS, ignore_eos=True, use_cache=use_cache, logits_tokens=1,
        record_digests=use_cache,
    )  # fmt: skip


@pytest.fixture(scope="module")
def produced(endpoint: str) -> dict[bytes, bytes]:
    """What a first worker stored of two prompts: key to SHA-256."""
    with worker(endpoint) as producer:
        for module in ("argparse.py", "tarfile.py"):
            producer.generate([ask(prompt(module), use_cache=True)])
        assert producer.flush_spills(30.0)
        return producer.spill_digests()


def restored_and_reference(endpoint: str, tamper: Tamper | None) -> tuple[Completion, Completion]:
    """One request of another worker, with the store and without."""
    with worker(endpoint, tamper) as consumer:
        [restored] = consumer.generate([ask(prompt("argparse.py"), use_cache=True)])
        [reference] = consumer.generate([ask(prompt("argparse.py"), use_cache=False)])
    assert sum(restored.restored_tokens.values()) >= 512
    return restored, reference


def test_an_honest_restore_is_identical(endpoint: str, produced: dict[bytes, bytes]) -> None:
    """Digests, tokens and first logits equal those of a run without cache, to the bit."""
    restored, reference = restored_and_reference(endpoint, None)
    assert prove(restored, reference, produced) == Proof(True, True, True)


@pytest.mark.parametrize("fault", ["foreign block", "swapped blocks", "flipped bit"])
def test_a_tampered_restore_is_not_identical(
    endpoint: str, produced: dict[bytes, bytes], fault: str
) -> None:
    """A planted foreign block, two swapped blocks and one flipped bit each turn it false."""
    foreign = foreign_block(endpoint)
    faults: dict[str, Tamper] = {
        "foreign block": partial(plant, foreign),
        "swapped blocks": swap,
        "flipped bit": flip,
    }
    restored, reference = restored_and_reference(endpoint, faults[fault])
    proof = prove(restored, reference, produced)
    assert not proof.identical
    assert not proof.blocks_equal


def foreign_block(endpoint: str) -> bytes:
    """The first block of the other prompt, as the store has it."""
    from kvstore.api.keys import chain_keys, root_key

    with worker(endpoint) as other, Client(endpoint) as client:
        space = client.open_space(other.descriptor)
        keys = chain_keys(root_key(), prompt("tarfile.py"), space.descriptor.block_tokens)
        buffer = bytearray(space.block_bytes)
        assert len(client.load(space, keys[:1], [memoryview(buffer)])) == 1
        return bytes(buffer)


def test_a_restore_without_recorded_digests_proves_nothing(
    endpoint: str, produced: dict[bytes, bytes]
) -> None:
    """Blocks whose producer is unknown do not count as equal."""
    restored, reference = restored_and_reference(endpoint, None)
    assert not prove(restored, reference, {}).identical


def test_the_demo_models_files_are_as_they_were_trained() -> None:
    """The digest beside the weights is theirs, and the held-out losses are within the limit."""
    folder = demo_model_dir()
    digest = json.loads((folder / "digest.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == digest["sha256"]
    assert len(weights) <= 8 << 20
    assert digest["held_out_loss_256"] <= 3.6
    assert digest["held_out_loss_3000"] <= 3.6


@pytest.mark.timeout(500)
def test_the_demo_command_shows_all_tiers_and_both_special_restores(tmp_path: Path) -> None:
    """`kvstore demo --json`: ok, four tiers, another worker's blocks, the disk after SIGKILL."""
    report_file = tmp_path / "demo.json"
    ran = subprocess.run(
        [sys.executable, "-m", "kvstore", "demo", "--json", str(report_file), "--out", tmp_path],
        capture_output=True,
        text=True,
        timeout=480,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads(report_file.read_text())
    assert report["ok"]
    assert (tmp_path / "ttft.png").stat().st_size > 10_000
    requests = report["requests"]
    assert all(request["identical"] for request in requests)
    for tier in ("vram", "memory", "redis", "disk"):
        assert any(request["restored_tokens"][tier] for request in requests), tier
    for request in requests:
        restored = sum(request["restored_tokens"].values())
        assert restored + request["computed_tokens"] == request["prompt_tokens"]
    assert report["cross_worker_restored_tokens"] > 0
    assert report["restored_after_kill_tokens"] > 0
    assert report["ttft_speedup_median"] > 1.0

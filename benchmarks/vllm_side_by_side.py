"""vLLM without a store, over its own ways to files, over LMCache, and over kvstore: side by side.

Each keeps the KV of the same prompts of the same model in files. Then a fresh process asks again:
how many prompt tokens it computes, how long the first token takes, how many bytes lie on disk. Then
one bit of the stored files is turned, and another fresh process asks once more.

It runs in the environment of `make test-vllm`, `.venv-vllm/bin/python`. LMCache stands beside if
`--lmcache-python` names a Python that has it and vLLM. The model is tiny and made on the spot: the
times tell of the ways, not of a real model.
"""

import contextlib
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.proof import machine
from tests_engines.vllm.asking import (
    BLOCK_TOKENS,
    Prompt,
    connector,
    engine,
    generate,
    kvstore,
    prompt,
)
from tests_engines.vllm.models import make_llama
from tests_engines.vllm.report import COMPUTED, Engine
from tests_engines.vllm.rig import Node, Runner, clean, until

PROMPT_TOKENS = 1900
LLM: dict[str, Any] = {
    # All of a prompt in one chunk: vLLM's ExampleConnector stores the first chunk only.
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 1,
}
WARM_UP = prompt(99, 300)
EXPONENTS = range(0x38, 0x40)
"""The upper byte of a float32 below 2, without its sign: with bit 6 turned it is huge."""
CLOSE = 1e-3


@dataclass
class Way:
    """One way to keep KV, in a directory of its own."""

    home: Path
    name: str = ""
    note: str = ""
    python: str = sys.executable
    environ: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> Path:
        """Where the bytes lie in the end."""
        return self.home / "files"

    def config(self) -> dict[str, Any] | None:
        """What vLLM is told; None: nothing."""
        return None

    def llm(self) -> dict[str, Any]:
        """How vLLM is set up, where it must differ."""
        return {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While engines run. At its end all is in files."""
        yield


class Nothing(Way):
    """No store."""


class Example(Way):
    """vLLM's ExampleConnector: a directory a prompt, a file a layer."""

    def config(self) -> dict[str, Any] | None:
        return connector("ExampleConnector", shared_storage_path=str(self.files))


class NativeFiles(Way):
    """vLLM's own offloading with its file system tier."""

    def config(self) -> dict[str, Any] | None:
        return connector(
            "OffloadingConnector",
            spec_name="CPUTieringSpec",
            spec_module_path="tests_engines.vllm.cpu_spec",
            cpu_bytes_to_use=512 << 20,
            secondary_tiers=[{"type": "fs", "root_dir": str(self.files)}],
        )


class LMCache(Way):
    """LMCache's multi-process server with its file system adapter."""

    def config(self) -> dict[str, Any] | None:
        where = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": self._port()}
        told = connector("LMCacheMPConnector", **where)
        del told["kv_connector_module_path"]
        return told

    def llm(self) -> dict[str, Any]:
        # Its import of numba breaks an engine that shares the process.
        return {"distributed_executor_backend": "mp"}

    def _port(self) -> int:
        path = self.home / "port"
        if not path.exists():
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                path.write_text(str(probe.getsockname()[1]))
        return int(path.read_text())

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self.files.mkdir(exist_ok=True)
        adapter = {"type": "fs", "base_path": str(self.files)}
        arguments = [
            "--host", "127.0.0.1", "--port", str(self._port()), "--chunk-size", "128",
            "--disable-observability", "--l1-size-gb", "1", "--eviction-policy", "LRU",
            "--supported-transfer-mode", "auto", "--l2-adapter", json.dumps(adapter),
        ]  # fmt: skip
        with (self.home / "server.log").open("a") as words:
            server = subprocess.Popen(
                [self.python, "-m", "lmcache.v1.multiprocess.server", *arguments],
                stdout=words, stderr=subprocess.STDOUT, env=clean(**self.environ),
            )  # fmt: skip
        try:
            until(self._listens, "LMCache's server listens")
            yield
            _settled(self.files)
        finally:
            server.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(20)
            server.kill()
            server.wait()

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port())) == 0


class Ours(Way):
    """kvstore: a node with memory and a disk tier, which is stopped in between."""

    @cached_property
    def _node(self) -> Node:
        return Node(self.home)

    @property
    def files(self) -> Path:
        return self._node.blocks_path

    def config(self) -> dict[str, Any] | None:
        return kvstore(self._node.endpoint)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with self._node:
            yield
            self._node.stop()


def _settled(folder: Path) -> None:
    """Returns when no file has grown for two seconds: nothing says when all is written."""
    before, since_s = -1, time.monotonic()
    while time.monotonic() - since_s < 2:
        time.sleep(0.2)
        if (size := _size(folder)) != before:
            before, since_s = size, time.monotonic()


def _size(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def turn_one_bit(folder: Path) -> str:
    """Turns one bit near the end of the newest large file; says where.

    The newest is of what was asked for, not of the warm-up; near its end values lie behind keys;
    and there it is the uppermost bit of a float32's exponent, if there are floats. So it is felt
    wherever nobody checks: a key that is wrong may only be one that nobody heeds.
    """
    large = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 1 << 16]
    if not large:
        return "no file"
    path = max(large, key=lambda each: (each.stat().st_mtime_ns, str(each)))
    content = path.read_bytes().rstrip(b"\0")
    start = len(content) * 15 // 16
    near = [range(start + offset, min(start + 4096, len(content)), 4) for offset in range(4)]
    common = [[at for at in places if content[at] & 0x7F in EXPONENTS] for places in near]
    place = max(common, key=len)[0] if any(common) else start
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes([content[place] ^ 0x40]))
    return f"bit 6 of byte {place} of a file of {path.stat().st_size}"


def measure(way: Way, model: Path, prompts: list[Prompt]) -> dict[str, Any]:
    """A row: what storing, restoring, and restoring what was spoiled came to."""
    row: dict[str, Any] = {"name": way.name, "command": f"vLLM, {way.note}", "ok": None}
    runner = Runner(way.home)
    wanted = way.config()
    begun_s = time.monotonic()

    def ask() -> Engine:
        with way.running():
            steps = (generate("warm up", WARM_UP), generate("asked", *prompts))
            [made] = runner.run(
                engine(way.name, model, wanted, *steps, **(LLM | way.llm())),
                may_fail=True, python=way.python, environ=way.environ,
            )  # fmt: skip
        return made

    cold = ask()
    row["cold"] = _figures(cold)
    row["bytes_on_disk"] = _size(way.files) if way.files.exists() else 0
    warm = ask()
    row["warm"] = _figures(warm)
    if way.files.exists():
        row["spoiled_at"] = turn_one_bit(way.files)
        row["spoiled"] = _figures(ask())
    row["seconds"] = round(time.monotonic() - begun_s, 1)
    return row


def _figures(made: Engine) -> dict[str, Any]:
    if made.error is not None or "asked" not in made.steps:
        return {"error": (made.error or "").strip().splitlines()[-1:]}
    step = made["asked"]
    return {
        "prompt_tokens_computed": step.prompt_tokens(COMPUTED),
        "first_token_s": statistics.median(output["first_token_s"] for output in step.outputs),
        "tokens": step.tokens,
        "logprobs": [output["logprobs"] for output in step.outputs],
        "blocks_restored": len(made.restored_blocks),
    }


def judge(spoiled: dict[str, Any] | None, warm: dict[str, Any], oracle: dict[str, Any]) -> str:
    """What one bit did, in words: against the same way unspoiled, and vLLM without a store."""
    if spoiled is None:
        return ""
    if "error" in spoiled:
        return f"the engine failed: {spoiled['error']}"
    # vLLM does not count again what it computes because a load has failed; the witness tells.
    again = spoiled["prompt_tokens_computed"] - warm["prompt_tokens_computed"]
    again += (warm["blocks_restored"] - spoiled["blocks_restored"]) * BLOCK_TOKENS
    noticed = f"noticed, {again} tokens computed" if again > 0 else "not noticed"
    if spoiled["tokens"] != oracle["tokens"]:
        return f"{noticed}; WRONG TOKENS"
    change = max(
        abs(mine - theirs)
        for one, another in zip(spoiled["logprobs"], oracle["logprobs"], strict=True)
        for mine, theirs in zip(one, another, strict=True)
    )
    if not change < CLOSE:
        return f"{noticed}; log probabilities off by {change:.2g}"
    return f"{noticed}; same output"


def show(rows: list[dict[str, Any]]) -> Table:
    """As people read it."""
    table = Table(title="The same prompts in a fresh process, over what another one stored")
    for name in ("", "tokens computed", "first token", "cold", "on disk", "one flipped bit"):
        table.add_column(name, overflow="fold")
    for row in rows:
        warm, cold = row.get("warm", {}), row.get("cold", {})
        if "error" in warm or not warm:
            table.add_row(row["name"], f"failed: {warm.get('error') or row.get('reason')}")
            continue
        table.add_row(
            row["name"],
            f"{warm['prompt_tokens_computed']} of {row['prompt_tokens']}",
            f"{warm['first_token_s'] * 1e3:.0f} ms",
            f"{cold['first_token_s'] * 1e3:.0f} ms",
            f"{row['bytes_on_disk'] / 2**20:.1f} MiB",
            row["one_flipped_bit"],
        )
    return table


def ways(home: Path, lmcache_python: str) -> list[Way]:
    """All of them, the oracle first."""
    apart = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "LMCACHE_TRACK_USAGE": "false"}
    made: list[tuple[type[Way], str, str, dict[str, Any]]] = [
        (Nothing, "no cache", "no connector", {}),
        (Example, "vLLM ExampleConnector", "shared_storage_path", {}),
        (NativeFiles, "vLLM fs tier", "OffloadingConnector; its CPU copies are ours", {}),
    ]
    if lmcache_python:
        own = {"python": lmcache_python, "environ": apart}
        made.append((LMCache, "LMCache", "LMCacheMPConnector, engine in its own process", own))
    made.append((Ours, "kvstore", "KVStoreConnector over a node with a disk", {}))
    for number, (_, _, _, _) in enumerate(made):
        (home / str(number)).mkdir()
    return [
        kind(home / str(number), name, note, **more)
        for number, (kind, name, note, more) in enumerate(made)
    ]


@click.command()
@click.option("--prompts", default=2, show_default=True, help=f"Of {PROMPT_TOKENS} tokens each.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write figures there.")
@click.option("--only", default="", help="Of all ways those whose name has this, and the oracle.")
@click.option("--lmcache-python", default="", help="A Python that has LMCache and vLLM.")
def main(prompts: int, json_file: Path | None, only: str, lmcache_python: str) -> None:
    """Prints the table."""
    asked = [prompt(seed, PROMPT_TOKENS) for seed in range(prompts)]
    with tempfile.TemporaryDirectory(prefix="kvstore-side-") as folder:
        home = Path(folder)
        model = make_llama(home / "model", hidden=1024)
        rows = []
        oracle, *others = ways(home, lmcache_python)
        for way in [oracle, *(way for way in others if only in way.name)]:
            try:
                row = measure(way, model, asked)
            except (AssertionError, OSError, subprocess.SubprocessError) as error:
                row = {"name": way.name, "command": way.note, "ok": None, "seconds": 0.0}
                row["reason"] = str(error).strip()[-300:]
            click.echo(f"{way.name}: {row['seconds']} s", err=True)
            row["prompt_tokens"] = prompts * PROMPT_TOKENS
            rows.append(row)
    for row in rows:
        row["one_flipped_bit"] = judge(row.get("spoiled"), row.get("warm", {}), rows[0]["cold"])
    Console(width=140).print(f"{machine()}\n", show(rows))
    if json_file is not None:
        for row in rows:
            for part in ("cold", "warm", "spoiled"):
                for bulky in ("tokens", "logprobs"):
                    row.get(part, {}).pop(bulky, None)
        json_file.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

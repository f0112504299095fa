"""What a test needs beside the engine: a store node and a Redis that really run, and a way in.

The node and Redis come from the project's own environment (`.venv`), as processes; the tests and
the engines run in `.venv-vllm`.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvstore_client import Client
from kvstore_workers.redis_server import RedisServer
from tests_engines.vllm.cores import cores
from tests_engines.vllm.report import Engine

ROOT = Path(__file__).resolve().parents[2]
SERVER_PYTHON = ROOT / ".venv" / "bin" / "python"
PATIENCE_S = 60.0
RUN_TIMEOUT_S = 300.0
POLL_S = 0.05

NODE: dict[str, str] = {
    "server.metrics-listen": "",
    "memory.capacity-bytes": "512MiB",
    "memory.slab-bytes": "8MiB",
    "disk.capacity-bytes": "1GiB",
    "disk.segment-bytes": "32MiB",
    # A machine that runs an engine beside the node is slow at times: late is not lost here.
    "disk.lookup-timeout-s": "10",
    "disk.timeout-s": "30",
    "redis.lookup-timeout-s": "10",
    "redis.timeout-s": "30",
}


def until(condition: Callable[[], Any], what: str, within_s: float = PATIENCE_S) -> Any:
    """The first true answer of `condition`. Raises AssertionError, naming `what`, if none comes."""
    end_s = time.monotonic() + within_s
    while True:
        answer = condition()
        if answer:
            return answer
        assert time.monotonic() < end_s, f"not within {within_s:g} s: {what}"
        time.sleep(POLL_S)


class Node:
    """A `kvstore serve` with a directory and a port of its own, which outlive its processes."""

    def __init__(self, home: Path, **flags: str) -> None:
        self.home = home
        self.flags = flags
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def blocks_path(self) -> Path:
        """Where its disk tier keeps its files."""
        return self.home / "blocks"

    def start(self, **flags: str) -> Self:
        """Returns when it serves. `flags` are further settings, `section_name="value"`."""
        self.home.mkdir(parents=True, exist_ok=True)
        named = {f.replace("_", ".", 1): value for f, value in (self.flags | flags).items()}
        settings = NODE | {name.replace("_", "-"): value for name, value in named.items()}
        settings |= {"server.listen": self.endpoint, "disk.path": str(self.blocks_path)}
        arguments = [f"--{name.replace('.', '-')}={value}" for name, value in settings.items()]
        errors = (self.home / "node.log").open("a")
        self._process = subprocess.Popen(
            [str(SERVER_PYTHON), "-m", "kvstore", "serve", *arguments],
            stdout=subprocess.PIPE, stderr=errors, cwd=self.home, env=clean(), text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, (self.home / "node.log").read_text()
        return self

    def stop(self) -> None:
        """Ends it in order: what only memory has is written to disk first."""
        if self._process is not None:
            self._process.terminate()
            assert self._process.wait(PATIENCE_S) == 0, (self.home / "node.log").read_text()
            self._process = None

    def kill(self) -> None:
        """Ends it without warning, frozen or not."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Makes it hang: its sockets accept, and nobody answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets a frozen node go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def restart(self, **flags: str) -> Self:
        """As an upgrade does: its memory is empty, its disk is not."""
        self.stop()
        return self.start(**flags)

    def counters(self) -> Mapping[str, float]:
        """Its counters and gauges by name and labels."""
        with Client(self.endpoint) as client:
            return dict(client.status().counters)

    def blocks(self, tier: str) -> int:
        """How many blocks a tier holds."""
        return int(self.counters().get(f'kvstore_tier_blocks{{tier="{tier}"}}', 0))

    def wait_for(self, blocks: int, tier: str = "memory") -> int:
        """Returns how many blocks a tier holds once these are as many as expected, or more."""
        what = f"{blocks} blocks in {tier}"
        return int(until(lambda: (n := self.blocks(tier)) >= blocks and n, what))

    def flip_bits(self, at: float = 0.5) -> int:
        """Turns one bit in every segment file that has something there; the node must be down."""
        assert self._process is None
        return flip_bits(self.blocks_path, "*", at)


def flip_bits(folder: Path, pattern: str, at: float = 0.5) -> int:
    """Turns one bit of every matching file above 64 KiB, at this fraction of what is written.

    Returns how many. Files that were allocated and not yet written end in zeros.
    """
    flipped = 0
    for path in sorted(folder.rglob(pattern)):
        if not path.is_file():
            continue
        content = path.read_bytes().rstrip(b"\0")
        if len(content) < 1 << 16:
            continue
        place = int(len(content) * at)
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([content[place] ^ 0x10]))
        flipped += 1
    return flipped


def redis_server(**settings: Any) -> RedisServer:
    """A Redis with the binary that the project's own environment has."""
    found = subprocess.run(
        [
            str(SERVER_PYTHON), "-c",
            "from kvstore_workers.redis_server import embedded_binary; print(embedded_binary())",
        ],
        check=True, capture_output=True, text=True, env=clean(),
    )  # fmt: skip
    return RedisServer(binary=Path(found.stdout.strip()), **settings)


def spoil_values(url: str) -> int:
    """Turns one bit in the middle of every large value that a Redis keeps; returns how many."""
    script = (
        "import redis, sys\n"
        "server, turned = redis.from_url(sys.argv[1]), 0\n"
        "for key in server.scan_iter(count=1000):\n"
        "    if server.type(key) != b'string' or (size := server.strlen(key)) < 65536:\n"
        "        continue\n"
        "    old = server.getrange(key, size // 2, size // 2)\n"
        "    server.setrange(key, size // 2, bytes([old[0] ^ 16]))\n"
        "    turned += 1\n"
        "print(turned)\n"
    )
    ran = subprocess.run(
        [str(SERVER_PYTHON), "-c", script, url], check=True, capture_output=True, text=True,
        env=clean(),
    )  # fmt: skip
    return int(ran.stdout)


class Events:
    """Hears what witnesses in engines say (`recording.py`); they wait until it has acted."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvstore-events-")
        self.path = Path(self._folder.name) / "socket"
        self.heard: list[dict[str, Any]] = []
        self._actions: dict[str, Callable[[], None]] = {}
        self.errors: list[BaseException] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        self._folder.cleanup()
        if error is None and self.errors:
            raise self.errors[0]

    def on(self, event: str, action: Callable[[], Any]) -> None:
        """Acts once, at the first time from now that this happens, while the engine waits."""

        def once() -> None:
            self._actions.pop(event, None)
            action()

        self._actions[event] = once

    @property
    def waiting(self) -> list[str]:
        """What was to be acted upon and has not happened."""
        return list(self._actions)

    def forget(self) -> None:
        """Acts upon nothing any more."""
        self._actions.clear()

    def count(self, event: str) -> int:
        """How often it has happened."""
        return sum(told["event"] == event for told in self.heard)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # It is over.
            with connection:
                told = json.loads(connection.makefile().readline())
                self.heard.append(told)
                try:
                    if (action := self._actions.get(told["event"])) is not None:
                        action()
                except BaseException as error:  # noqa: BLE001  The test raises it at its end.
                    self.errors.append(error)
                with contextlib.suppress(OSError):
                    connection.sendall(b".")


def clean(**more: str) -> dict[str, str]:
    """The environment for a process that is not part of this test run."""
    path = os.pathsep.join(str(ROOT / part) for part in ("", "client", "workers"))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KVSTORE_", "PYTEST_"))}
    return kept | {"PYTHONPATH": path} | more


@dataclass
class Runner:
    """Runs engines in fresh processes and reads what came out; keeps their words for failures."""

    home: Path
    runs: int = field(default=0)

    def run(
        self,
        *engines: dict[str, Any],
        events: Events | None = None,
        timeout_s: float = RUN_TIMEOUT_S,
        may_fail: bool = False,
        python: str = sys.executable,
        environ: Mapping[str, str] | None = None,
    ) -> list[Engine]:
        """One process for all these engines (`engine_run.py`).

        None of them may have failed, unless `may_fail`; the process must not.
        """
        self.runs += 1
        stem = self.home / f"run-{self.runs}"
        source, target, log = (stem.with_suffix(end) for end in (".in", ".out", ".log"))
        source.write_text(json.dumps({"engines": list(engines)}))
        ranks = max(each["llm"].get("tensor_parallel_size", 1) for each in engines)
        listening = {"KVSTORE_WITNESS_EVENTS": str(events.path)} if events is not None else {}
        with cores(alone=ranks > 1), log.open("w") as words, _ended(
            subprocess.Popen(
                [python, "-m", "tests_engines.vllm.engine_run", str(source), str(target)],
                stdout=words, stderr=subprocess.STDOUT, cwd=ROOT,
                env=clean(**listening, **(environ or {})), start_new_session=True,
            )
        ) as process:  # fmt: skip
            status = process.wait(timeout_s)
        assert status == 0, f"the engines' process ended with {status}: {_tail(log)}"
        made = [Engine.read(one) for one in json.loads(target.read_text())["engines"]]
        for engine in made:
            assert may_fail or engine.error is None, f"{engine.name}: {engine.error}\n{_tail(log)}"
        return made


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Leaves nothing behind of a process and its children."""
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-6000:]

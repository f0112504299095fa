"""`vllm serve` as users run it: three processes, HTTP, /metrics."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests_engines.vllm.rig import clean, until

START_TIMEOUT_S = 240.0
CALL_TIMEOUT_S = 120.0
_SAMPLE = re.compile(r"^(?P<name>[a-z_:]+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$", re.M)


class Server:
    """A server of one model, ended with all its processes at the end of the context."""

    def __init__(self, home: Path, model: Path, connector: dict[str, Any], name: str) -> None:
        self._log = home / f"{name}.log"
        self._model = str(model)
        self._connector = connector
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        arguments = [
            "serve", self._model, "--port", str(self._port), "--host", "127.0.0.1",
            "--enforce-eager", "--dtype", "float32", "--max-model-len", "2048",
            "--max-num-batched-tokens", "512", "--enable-prompt-tokens-details",
            "--prefix-caching-hash-algo", "sha256_cbor",
            "--kv-transfer-config", json.dumps(self._connector),
        ]  # fmt: skip
        binary = Path(sys.executable).with_name("vllm")
        with self._log.open("wb") as words:
            self._process = subprocess.Popen(
                [sys.executable, str(binary), *arguments],
                stdout=words, stderr=subprocess.STDOUT, env=_environment(),
                start_new_session=True,
            )  # fmt: skip
        until(self._is_up, "a server that answers", START_TIMEOUT_S)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(60)
        finally:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def complete(self, tokens: list[int], **more: Any) -> dict[str, Any]:
        """A completion of eight tokens with their log probabilities."""
        asked = {
            "model": self._model, "prompt": tokens, "max_tokens": 8, "temperature": 0,
            "logprobs": 1, "ignore_eos": True, "return_token_ids": True, **more,
        }  # fmt: skip
        answer: dict[str, Any] = json.loads(self._call("/v1/completions", asked))
        return answer

    def metrics(self) -> dict[str, float]:
        """The samples at /metrics by name, added up over their labels, and by name and label."""
        found: dict[str, float] = {}
        for sample in _SAMPLE.finditer(self._call("/metrics")):
            name, value = sample["name"], float(sample["value"])
            found[name] = found.get(name, 0) + value
            for label in re.findall(r'(\w+)="([^"]*)"', sample["labels"] or ""):
                key = f"{name}{{{label[0]}={label[1]}}}"
                found[key] = found.get(key, 0) + value
        return found

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text(errors="replace")[-6000:]
        try:
            self._call("/health")
        except (urllib.error.URLError, ConnectionError):
            return False
        return True

    def _call(self, path: str, body: dict[str, Any] | None = None) -> str:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}",
            data=json.dumps(body).encode() if body else None,
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=CALL_TIMEOUT_S) as answer:
            text: str = answer.read().decode()
        return text


def _environment() -> dict[str, str]:
    from tests_engines.vllm.environment import SETTINGS

    # As users run it: the engine in a process of its own.
    own = {k: v for k, v in SETTINGS.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    return clean(**own | {"VLLM_LOGGING_LEVEL": "INFO"})

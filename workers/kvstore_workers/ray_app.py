"""Ray actors: a worker on its GPU, and a store node beside it. The only file that imports ray.

    worker = WorkerActor.options(num_gpus=1).remote(config)
    completions = ray.get(worker.generate.remote([Request(prompt, 64)]))

Ray places actors and moves small values. Blocks never cross it: they go over the client.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any

import ray

from kvstore.api.errors import Unavailable
from kvstore_workers.request import Completion, Request
from kvstore_workers.worker import Worker, WorkerConfig


class WorkerProcess:
    """A `Worker` in a process of its own. The constructor loads the model."""

    def __init__(self, config: WorkerConfig) -> None:
        self._worker = Worker(config)

    def ready(self) -> dict[str, bool]:
        """For each tenant, whether the store is connected; the answer means that the model is."""
        return self._worker.connected()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See `Worker.generate`."""
        return self._worker.generate(requests)

    def flush_spills(self, timeout_s: float) -> bool:
        """See `Worker.flush_spills`."""
        return self._worker.flush_spills(timeout_s)

    def forget_vram(self) -> None:
        """See `Worker.forget_vram`."""
        self._worker.forget_vram()

    def spill_digests(self) -> dict[bytes, bytes]:
        """See `Worker.spill_digests`."""
        return self._worker.spill_digests()

    def stats(self) -> dict[str, float]:
        """See `Worker.stats`."""
        return self._worker.stats()

    def close(self) -> None:
        """See `Worker.close`. `ray.kill` alone loses what is not spilled yet, nothing else."""
        self._worker.close()


class StoreProcess:
    """A store node as a child process. It drains and stops when this actor is gone.

    The node is not started by the constructor: an actor that Ray restarted must not bring up a
    second node on the first one's files unasked.
    """

    def __init__(self, config: str | Path, *, start_timeout_s: float = 30.0) -> None:
        self._command = [sys.executable, "-m", "kvstore", "serve"]
        self._command += ["--config", str(config), "--supervised"]
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._announced: dict[str, Any] = {}

    def start(self) -> str:
        """The node's endpoint, once it is ready; starts it unless it runs.

        Raises `Unavailable` if it exits or is silent for `start_timeout_s`.
        """
        if self._process is not None and self._process.poll() is None:
            return self.endpoint()
        self._process = subprocess.Popen(  # noqa: S603  our own module, no shell
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            self._announced = self._read_announcement(self._process)
        except Unavailable:
            self.kill()
            raise
        return self.endpoint()

    def endpoint(self) -> str:
        """host:port of the node that runs, or ran last."""
        return str(self._announced["endpoint"])

    def metrics(self) -> str:
        """Where the node's metrics are served; empty: nowhere."""
        return str(self._announced.get("metrics") or "")

    def pid(self) -> int:
        """The process id of the node."""
        return int(self._announced["pid"])

    def stop(self, timeout_s: float = 30.0) -> int:
        """The node's exit status after it drained; kills it if that takes longer."""
        if self._process is None:
            return 0
        _hang_up(self._process)
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        """The node's exit status after SIGKILL: what a crash of the process looks like."""
        if self._process is None:
            return 0
        self._process.kill()
        _hang_up(self._process)
        return self._process.wait()

    def _read_announcement(self, process: "subprocess.Popen[str]") -> dict[str, Any]:
        assert process.stdout is not None
        line: Future[str] = Future()
        threading.Thread(target=_follow, args=(process.stdout, line), daemon=True).start()
        try:
            announced = json.loads(line.result(self._start_timeout_s))
        except TimeoutError:
            raise Unavailable(f"the node is silent for {self._start_timeout_s:g} s") from None
        except ValueError:
            raise Unavailable(f"the node did not start; exit status {process.poll()}") from None
        if not isinstance(announced, dict) or not {"endpoint", "pid"} <= announced.keys():
            raise Unavailable(f"the node announced {announced!r}")
        return announced


def _hang_up(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.close()


def _follow(output: IO[str], first: "Future[str]") -> None:
    first.set_result(output.readline())
    # Whatever else it says is dropped, so that a full pipe never holds the node up.
    with output:
        for _ in output:
            pass


WorkerActor = ray.remote(WorkerProcess)
StoreActor = ray.remote(StoreProcess)

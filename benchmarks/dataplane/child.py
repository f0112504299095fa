"""A process of the benchmark: told and heard in lines of JSON, and ended with it."""

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

END_S = 15.0
LAST_WORDS_BYTES = 2000


class ChildGone(Exception):
    """When a process ended, or said nothing for too long; the message has its last words."""


class Child:
    """`python -m MODULE ARGUMENTS`, which ends when its standard input does.

    It is in a process group of its own: Ctrl-C reaches the benchmark alone, which then ends it.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self._module = module
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `end`
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, process_group=0,
        )  # fmt: skip
        self._heard = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end(patient=kind is None)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def tell(self, words: Mapping[str, Any]) -> None:
        """Says one thing."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(words).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ChildGone(self._last_words("has ended")) from None

    def hear(self, timeout_s: float) -> dict[str, Any]:
        """The next thing that it says."""
        assert self._process.stdout is not None
        out = self._process.stdout.fileno()
        end_s = time.monotonic() + timeout_s
        while b"\n" not in self._heard:
            if not select.select([out], [], [], max(0.0, end_s - time.monotonic()))[0]:
                raise ChildGone(self._last_words(f"said nothing for {timeout_s:g} s"))
            part = os.read(out, 1 << 16)
            if not part:
                raise ChildGone(self._last_words("has ended"))
            self._heard += part
        line, _, self._heard = self._heard.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        return said

    def end(self, *, patient: bool = True) -> None:
        """Closes its input and waits for it; without patience, or if it stays, kills it."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        if not patient:
            process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self._errors.close()

    def _last_words(self, what: str) -> str:
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - LAST_WORDS_BYTES))
        words = self._errors.read().decode(errors="replace").strip()
        return f"{self._module} {what}: {words or 'it said nothing'}"


def cpu_s(pids: Sequence[int]) -> float:
    """CPU seconds that processes have taken so far, to the nanosecond.

    Linux makes the number of a process's CPU clock from its id (clock_getcpuclockid(3)).
    """
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)

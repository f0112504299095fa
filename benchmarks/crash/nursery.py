"""Nodes as processes of their own, started in milliseconds: a warm parent forks one for each.

The parent has imported everything and started nothing; a child runs `kvstore serve` from its
command line on, in a process that nobody shares. `python -m benchmarks.crash.nursery` is that
parent, for `Nursery`, which talks to it through its standard input and output.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn, Self

START_TIMEOUT_S = 30.0
DEATH_TIMEOUT_S = 10.0
POLL_S = 0.002
_PR_SET_PDEATHSIG = 1


class NotStarted(Exception):
    """When a node ended before it was ready."""


class Nursery:
    """Starts nodes and leaves none behind. `module` is run as the warm parent."""

    def __init__(self, module: str = "benchmarks.crash.nursery") -> None:
        self._module = module
        self._process: Process | None = None
        self._living: set[int] = set()

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", self._module, stdin=PIPE, stdout=PIPE, stderr=DEVNULL
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        for pid in list(self._living):
            await self.kill(pid)
        async with asyncio.timeout(DEATH_TIMEOUT_S):
            await self._process.wait()

    async def fork(self, flags: Sequence[str]) -> int:
        """The process id of a node that is about to start."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(list(flags)).encode() + b"\n")
        while "forked" not in (said := await self._hear()):
            pass  # What nodes say that were killed while they started.
        self._living.add(said["pid"])
        return int(said["pid"])

    async def ready(self, pid: int) -> dict[str, Any]:
        """What a node says once it answers: its endpoint and more. Raises NotStarted."""
        while (said := await self._hear())["pid"] != pid:
            pass
        if "error" in said:
            raise NotStarted(said["error"])
        return said

    async def _hear(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                said: dict[str, Any] = json.loads(await self._process.stdout.readline())
        except (TimeoutError, ValueError) as error:
            raise NotStarted(f"a node said nothing: {error}") from None
        return said

    async def kill(self, pid: int) -> None:
        """SIGKILL; returns when the process is gone, and with it its locks and sockets."""
        self._living.discard(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            async with asyncio.timeout(DEATH_TIMEOUT_S):
                while True:  # It is the nursery's child; its end shows when its number is free.
                    os.kill(pid, 0)
                    await asyncio.sleep(POLL_S)


def fork_for_each_line() -> None:
    """The warm parent: one child for each line of flags, until there are no more lines."""
    from kvstore import serve_command, server

    assert server
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # The system forgets children that ended.
    for line in sys.stdin:
        if not os.fork():
            _serve(json.loads(line), serve_command.serve)


def _serve(flags: list[str], command: Any) -> NoReturn:
    """The child: a node, as if its command had been typed."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        _say(forked=True)
        command.main(flags, standalone_mode=False)
        status = 0
    except BaseException as error:  # noqa: BLE001 - whoever waits has to hear of it
        _say(error=f"{type(error).__name__}: {error}")
    finally:
        os._exit(status)


def _say(**words: object) -> None:
    """One line to whoever holds the other end, in one write, so that lines stay whole."""
    os.write(1, json.dumps({"pid": os.getpid(), **words}).encode() + b"\n")


if __name__ == "__main__":
    fork_for_each_line()

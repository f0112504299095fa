"""A node as its own process, for tests that have no event loop."""

import json
import signal
import subprocess
import sys
from pathlib import Path

PATIENCE_S = 60.0
SMALL = {
    "--server-listen": "127.0.0.1:0",
    "--server-metrics-listen": "",
    "--memory-capacity-bytes": "32MiB",
    "--memory-slab-bytes": "1MiB",
    "--disk-capacity-bytes": "64MiB",
    "--disk-segment-bytes": "4MiB",
    "--disk-lookup-timeout-s": "30",
    "--disk-timeout-s": "30",
    "--server-drain-timeout-s": "30",
}


class NodeProcess:
    """Runs `kvstore serve` over one directory, which it finds again when it is started again."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.endpoint = ""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *switches: str) -> str:
        """The endpoint of a node that is ready."""
        options = SMALL | {"--disk-path": str(self.home / "blocks")}
        arguments = [part for option in options.items() for part in option]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvstore", "serve", *arguments, *switches],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            cwd=self.home,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the node did not start; its own words are above"
        self.endpoint = str(json.loads(line)["endpoint"])
        return self.endpoint

    def stop(self) -> None:
        """In order: what memory holds is on disk afterwards."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """At once."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """It is there and does nothing any more."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def _end(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(PATIENCE_S)
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

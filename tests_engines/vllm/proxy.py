"""A line to a node that can be made slow, cut after so many bytes, or held."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

CHUNK_BYTES = 16 << 10


class Proxy:
    """Passes TCP on between engines and a node, both ways; each connection takes two threads.

    What comes from the node is `answers`, what goes there is `requests`.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.cuts = 0
        """How often a cut was made."""
        self._answer_bytes_per_s = 0.0
        self.passed_bytes = {"answers": 0, "requests": 0}
        self._cut: dict[str, tuple[int, Callable[[], object]]] = {}
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._start(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.disconnect()
        for thread in self._threads:
            thread.join()

    def cut_after(self, way: str, more_bytes: int, action: Callable[[], object]) -> None:
        """Once so many more bytes went this `way`, acts and cuts every connection."""
        with self._lock:
            self._cut[way] = (self.passed_bytes[way] + more_bytes, action)

    def slow_down(self, bytes_per_s: float) -> None:
        """From now on each connection brings answers no faster."""
        self._answer_bytes_per_s = bytes_per_s

    def recover(self) -> None:
        """As good as new; connections that were made are cut."""
        with self._lock:
            self._cut.clear()
            self.cuts = 0
            self._answer_bytes_per_s = 0.0
        self.disconnect()

    def disconnect(self) -> None:
        """Cuts every connection; new ones are accepted."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target)
            except OSError:
                near.close()  # The node is down, and so is the line.
                continue
            with self._lock:
                self._sockets += [near, far]
            self._start(self._pass, far, near, "answers")
            self._start(self._pass, near, far, "requests")

    def _pass(self, source: socket.socket, target: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(CHUNK_BYTES):
                if way == "answers" and self._answer_bytes_per_s:
                    time.sleep(len(chunk) / self._answer_bytes_per_s)
                if self._is_cut(way, len(chunk)):
                    break
                target.sendall(chunk)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _is_cut(self, way: str, size_bytes: int) -> bool:
        with self._lock:
            self.passed_bytes[way] += size_bytes
            limit = self._cut.get(way)
            if limit is None or self.passed_bytes[way] < limit[0]:
                return False
            del self._cut[way]
            self.cuts += 1
        limit[1]()
        self.disconnect()
        return True

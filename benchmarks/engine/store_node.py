"""A store node in a process of its own, which can be started again with nothing but its disk."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.dataplane.child import Child
from benchmarks.dataplane.through_client import arguments_for
from kvstore.api.space import SpaceDescriptor
from kvstore_client import Client

START_S = 30.0
SLAB_BYTES = 4 << 20
FLAGS = {
    "--server-listen": "127.0.0.1:0",
    "--server-metrics-listen": "",
    "--leases-memory-fraction": "0.9",
    "--log-level": "warning",
}


class StoreNode:
    """`kvstore serve` on files in `home`; ends with the `with` block."""

    def __init__(self, home: Path, *, memory_bytes: int, slab_bytes: int = SLAB_BYTES) -> None:
        flags = FLAGS | {
            "--disk-path": str(home / "blocks"),
            "--memory-capacity-bytes": str(-(-memory_bytes // slab_bytes) * slab_bytes),
            "--memory-slab-bytes": str(slab_bytes),
        }
        self._words = [word for flag in flags.items() for word in flag]
        self._child: Child | None = None
        self.endpoint = ""
        """host:port of the node that runs."""

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end(patient=kind is None)

    def restart(self, *, flush: bool) -> None:
        """Another node on the same files, with nothing in memory. This one is killed, or ends in
        order and writes what only memory has."""
        self._end(patient=flush)
        self._start()

    def _start(self) -> None:
        self._child = Child("kvstore", "serve", "--supervised", *self._words)
        self.endpoint = str(self._child.hear(START_S)["endpoint"])

    @property
    def pid(self) -> int:
        """Of the node that runs."""
        assert self._child is not None
        return self._child.pid

    def connect(self, path: str, descriptor: SpaceDescriptor) -> Client:
        """A client whose blocks take this path ("shm", "grpc"), with the space open."""
        arguments: dict[str, Any] = {**arguments_for(path)}
        client = Client(self.endpoint, **arguments)
        client.open_space(descriptor)
        return client

    def _end(self, *, patient: bool) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end(patient=patient)

"""The other end of the floors that need one: raw sockets and bare gRPC, in one process.

`python -m benchmarks.dataplane.floor_server` says its ports in a line of JSON and ends with its
standard input.
"""

import asyncio
import json
import sys

from benchmarks.dataplane.bare_grpc import BareGrpcServer
from benchmarks.dataplane.raw_socket import RawSocketServer
from kvstore.heap import keep_freed_memory


async def serve() -> None:
    """Until standard input ends."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), stop.set)
    sockets, grpc = RawSocketServer(), BareGrpcServer()
    await grpc.start()
    sys.stdout.write(json.dumps({"socket_port": sockets.port, "grpc_port": grpc.port}) + "\n")
    sys.stdout.flush()
    await stop.wait()
    await grpc.stop()


if __name__ == "__main__":
    keep_freed_memory()  # As a node does: the floor shall be as good as it can be.
    asyncio.run(serve())

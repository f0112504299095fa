"""How a connection of the bulk path is opened: asked for over gRPC, dialled, and greeted."""

import asyncio
import socket
import ssl

from kvstore.api.bulk import GREETING, WELCOME, BulkSocket, prepare, unblocked
from kvstore.api.errors import KvstoreError
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore_client.budgets import Deadline
from kvstore_client.caller import Caller


async def connect(
    caller: Caller, dialled_host: str, tls: ssl.SSLContext | None, deadline: Deadline
) -> BulkSocket | None:
    """A connection to the node that a caller calls; None if it has no bulk path.

    Raises KvstoreError, OSError, or as `Caller.unary`, where something goes wrong.
    """
    invitation = await caller.unary(caller.stub.Connect, pb.ConnectRequest(), deadline)
    if not invitation.port:
        return None
    if invitation.tls != (tls is not None):
        # A ticket is not said in the clear, nor bytes taken from somebody who shows no name.
        raise KvstoreError(
            "the bulk path has TLS" if invitation.tls else "the bulk path has no TLS"
        )
    host = invitation.host or dialled_host
    connection = await _dial(host, invitation.port)
    try:
        prepare(connection)
        if tls is not None:
            connection = tls.wrap_socket(
                connection, server_hostname=dialled_host, do_handshake_on_connect=False
            )
        if isinstance(connection, ssl.SSLSocket):
            await unblocked(connection, connection.do_handshake)
        greeting = GREETING + invitation.ticket
        sent = await unblocked(connection, lambda: connection.send(greeting))
        answer = await unblocked(connection, lambda: connection.recv(len(WELCOME)))
        if sent != len(greeting) or answer != WELCOME:
            raise KvstoreError(f"{host}:{invitation.port}: the node does not let this client in")
        return BulkSocket(connection)
    except BaseException:
        connection.close()
        raise


def host_of(endpoint: str) -> str:
    """The host that an endpoint names; empty: none that could be dialled for more connections."""
    scheme, separator, rest = endpoint.rpartition(":///")
    if separator and scheme != "dns":
        return ""
    address = rest if separator else endpoint.removeprefix("dns:")
    host, _, port = address.rpartition(":")
    return host.strip("[]") if port.isdigit() and "/" not in host else ""


async def _dial(host: str, port: int) -> socket.socket:
    """Connects to the first address of the host that answers. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    failure: OSError | None = None
    for family, kind, protocol, _, address in found:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.setblocking(False)
            await loop.sock_connect(connection, address)
        except OSError as error:
            connection.close()
            failure = error
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise failure or OSError(f"{host}: no such host")

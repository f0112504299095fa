"""The asking end of a bulk connection: how it is opened, and how the blocks of a read come in."""

import asyncio
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import NamedTuple

import grpc
from google.protobuf.message import DecodeError

from kvstore.api.bulk import GREETING, WELCOME, BulkSocket, Parcel, prepare, unblocked
from kvstore.api.errors import KvstoreError, from_status
from kvstore.api.tier import Loaded
from kvstore.api.v1 import kvstore_pb2 as pb

_STATUS = {status.value[0]: status for status in grpc.StatusCode}


class Received(NamedTuple):
    """What a node has answered to a question for blocks."""

    answered: int
    """So many of the blocks, the first ones; of the others it has said nothing."""
    damaged: list[int]
    """The places of those that came, and were not what was written."""


class Nonsense(Exception):
    """When the node said on a connection what no honest node says there."""


def host_of(endpoint: str) -> str:
    """The host that an endpoint names; empty: none that could be dialled for more connections."""
    scheme, separator, rest = endpoint.rpartition(":///")
    if separator and scheme != "dns":
        return ""
    address = rest if separator else endpoint.removeprefix("dns:")
    host, _, port = address.rpartition(":")
    return host.strip("[]") if port.isdigit() and "/" not in host else ""


async def enter(
    invitation: pb.ConnectReply, dialled_host: str, tls: ssl.SSLContext | None
) -> BulkSocket | None:
    """A connection to which a node has invited; None if it has no bulk path.

    `dialled_host` is where its gRPC was reached. Raises KvstoreError or OSError where something
    goes wrong.
    """
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
            raise KvstoreError(f"{host}:{invitation.port}: the node does not let this caller in")
        return BulkSocket(connection)
    except BaseException:
        connection.close()
        raise


def receive_windows(
    wire: BulkSocket,
    request: pb.BulkRequest,
    parcels: Sequence[Parcel],
    here: Callable[[int, Loaded], None],
) -> Received:
    """Receives what a request asks for into the parcels' buffers.

    For a thread: it blocks. `here` hears of each block that is complete and good, also when this
    raises in the end: Hangup or Nonsense where the connection is of no further use, and
    KvstoreError as the node refuses, after which it is.
    """
    wire.send_message(request.SerializeToString())
    index, is_last = 0, False
    damaged: list[int] = []
    while not is_last:
        window = hear(wire, "window").window
        places = range(index, index + len(window.blocks))
        if places.stop > len(parcels):
            raise Nonsense(f"window: {places.stop} blocks for {len(parcels)} that were asked for")
        coming = [
            (place, block.tier) for place, block in zip(places, window.blocks, strict=True)
            if block.here
        ]  # fmt: skip
        digests = wire.receive_blocks([parcels[place] for place, _ in coming])
        for (place, tier), digest in zip(coming, digests, strict=True):
            if digest:
                here(place, Loaded(tier, digest))
            else:
                damaged.append(place)
        index, is_last = places.stop, window.last
        if not places and not is_last:
            raise Nonsense("window: it is empty, and not the last one")
    return Received(index, damaged)


def hear(wire: BulkSocket, field: str) -> pb.BulkReply:
    """The reply that is due, which has this field. Raises as `receive_windows`."""
    try:
        reply = pb.BulkReply.FromString(wire.receive_message())
    except DecodeError:
        raise Nonsense("a message that cannot be read") from None
    except KvstoreError as error:
        raise Nonsense(str(error)) from None
    if reply.status:
        status = _STATUS.get(reply.status, grpc.StatusCode.UNKNOWN)
        raise from_status(status, reply.details)
    if not reply.HasField(field):  # type: ignore[arg-type]
        raise Nonsense(f"the {field} that was due has not come")
    return reply


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

"""How a connection of the bulk path is opened: asked for over gRPC, dialled, and greeted."""

import ssl

from kvstore.api.asking import enter
from kvstore.api.bulk import BulkSocket
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
    return await enter(invitation, dialled_host, tls)

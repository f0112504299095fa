"""What requests say of blocks, checked, for the shells that take them from gRPC and the socket."""

from kvstore.api.errors import InvalidArgument
from kvstore.api.keys import KEY_BYTES
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.wire import check_space_id, hint_from_wire, unpack_keys
from kvstore.node import Node
from kvstore.offer import Offer
from kvstore.tenants import Tenant

MAX_SCOPES = 16
KEY_COST_BYTES = 256
"""What one key of a request costs while it is worked on, as an object with its name and place."""


async def begin_offer(node: Node, tenant: Tenant, begin: pb.WriteBegin) -> Offer:
    """The run that a write begins with. Raises InvalidArgument, naming the field."""
    if len(begin.parent_key) not in (0, KEY_BYTES):
        raise InvalidArgument(f"begin.parent_key: {KEY_BYTES} bytes are needed, or none")
    return await node.offer(
        tenant,
        begin.scope,
        check_space_id(begin.space_id),
        unpack_keys(begin.keys, "begin.keys", least=1),
        parent_key=begin.parent_key,
        parent_scope=begin.parent_scope,
        hint=hint_from_wire(begin.hint) if begin.HasField("hint") else None,
    )


def check_count(field: str, count: int, least: int, most: int) -> None:
    """Raises InvalidArgument, naming the field, for more or fewer than are allowed."""
    if not least <= count <= most:
        raise InvalidArgument(f"{field}: {least} … {most} are allowed, got {count}")

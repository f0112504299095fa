"""The gRPC shell of what a node does for its peers."""

from collections.abc import Awaitable, Callable, Sequence

from kvstore.api.errors import InvalidArgument
from kvstore.api.v1 import kvstore_pb2 as pb
from kvstore.api.v1 import kvstore_pb2_grpc
from kvstore.api.wire import unpack_keys
from kvstore.calls import Calls, Context, authorization
from kvstore.names import TAG_BYTES
from kvstore.peers.credentials import LEAST_NONCE_BYTES, MOST_NONCE_BYTES, Credentials
from kvstore.requests import KEY_COST_BYTES, check_count

Forget = Callable[[Sequence[bytes], bytes], Awaitable[int]]
"""Forgets the blocks of some names, and all under a tag; how many copies there were."""


class PeerServicer(kvstore_pb2_grpc.PeerServicer):
    """Answers `kvstore.v1.Peer` for one node."""

    def __init__(
        self,
        calls: Calls,
        credentials: Credentials,
        invite: Callable[[str | None, str], pb.ConnectReply],
        forget: Forget,
    ) -> None:
        self._calls = calls
        self._credentials = credentials
        self._invite = invite
        self._forget = forget

    async def Connect(
        self, request: pb.PeerConnectRequest, context: Context
    ) -> pb.PeerConnectReply:
        authenticate = self._credentials.authenticate
        async with self._calls.call("peer_connect", context, authenticate=authenticate):
            check_count("nonce", len(request.nonce), LEAST_NONCE_BYTES, MOST_NONCE_BYTES)
            invitation = self._invite(authorization(context), context.peer())
            proof = self._credentials.proof(request.nonce, invitation.ticket)
            reply = pb.PeerConnectReply(invitation=invitation, proof=proof)
        return reply

    async def Forget(self, request: pb.PeerForgetRequest, context: Context) -> pb.PeerForgetReply:
        authenticate = self._credentials.authenticate
        async with self._calls.call("peer_forget", context, authenticate=authenticate) as call:
            names = unpack_keys(request.names, "names")
            if len(request.tag) not in (0, TAG_BYTES):
                raise InvalidArgument(f"tag: {TAG_BYTES} bytes are needed, or none")
            async with self._calls.admitted(call, KEY_COST_BYTES * max(1, len(names))):
                forgotten = await self._forget(names, request.tag)
                reply = pb.PeerForgetReply(forgotten_blocks=forgotten)
        return reply

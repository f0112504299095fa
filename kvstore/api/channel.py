"""The connection to a node."""

import grpc

from kvstore.api.tls import Trust
from kvstore.api.wire import MESSAGE_BYTES, STREAM_OPTIONS

_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    # A node that vanished without closing its socket is noticed within 15 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A node that was restarted is found again within about a second; gRPC's own limit is 2 min.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A new client does not wait for what another one in this process was refused a moment ago.
    ("grpc.use_local_subchannel_pool", 1),
    # Nodes are reached directly; a proxy for the web would only swallow the bytes.
    ("grpc.enable_http_proxy", 0),
    *STREAM_OPTIONS,
]


def open_channel(endpoint: str, trust: Trust | None = None) -> grpc.aio.Channel:
    """A channel that connects when it is first used; without `trust` it has no TLS.

    `endpoint` is host:port or unix:/path. Must be called in the event loop that will use it.
    """
    if not endpoint.strip():
        raise ValueError("endpoint: must be host:port or unix:/path, got an empty text")
    if trust is not None:
        return grpc.aio.secure_channel(endpoint, trust.credentials, options=_OPTIONS)
    return grpc.aio.insecure_channel(endpoint, options=_OPTIONS)

"""Every error that a caller can meet, and its status on the wire.

A miss is not an error. These are mistakes, missing rights, and a node that cannot serve now.
"""

import grpc


class KvstoreError(Exception):
    """What all errors of kvstore have in common."""


class InvalidArgument(KvstoreError):
    """When a field of a request is out of its range; the message names the field."""


class Unauthenticated(KvstoreError):
    """When a call brings no bearer token, or one that no tenant owns."""


class PermissionDenied(KvstoreError):
    """When the tenant may not use the scope that it named."""


class UnknownSpace(KvstoreError):
    """When the node has not opened the space since its start: open it, then repeat."""


class ResourceExhausted(KvstoreError):
    """When a limit is reached or the node sheds load; a client treats it as a miss."""


class Shed(ResourceExhausted):
    """When a node has too much to do; nothing is wrong with the call.

    `reason` names the limit in metrics; after `retry_s` it is worth another try.
    """

    def __init__(self, message: str, reason: str, retry_s: float) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_s = retry_s


class Unavailable(KvstoreError):
    """When the node is draining or gone; a client treats it as a miss."""


class TierError(KvstoreError):
    """When a tier is broken or late. It never leaves the node: `Guarded` makes it a miss."""


class ConfigError(KvstoreError):
    """When a setting is unknown or out of range; the message names it and the fix."""


STATUS: dict[type[KvstoreError], grpc.StatusCode] = {
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    UnknownSpace: grpc.StatusCode.FAILED_PRECONDITION,
    ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
}
_ERRORS = {status: error for error, status in STATUS.items()}


def from_status(status: grpc.StatusCode, message: str) -> KvstoreError:
    """The error that a status stands for; a status of another origin is `Unavailable`."""
    error = _ERRORS.get(status)
    if error is None:
        return Unavailable(f"{status.name}: {message}")
    return error(message)

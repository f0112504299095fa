"""The standard health service, with a limit on those who watch it."""

from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2


class Health(health.aio.HealthServicer):  # type: ignore[misc]  # It brings no types.
    """Anybody may ask and watch, without a token; `max_watchers` at once do."""

    def __init__(self, max_watchers: int) -> None:
        super().__init__()
        self._max_watchers = max_watchers
        self._watchers = 0

    async def Watch(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        if self._watchers >= self._max_watchers:
            what = f"server.max_watchers: {self._max_watchers} calls watch the health"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, what)
        self._watchers += 1
        try:
            await super().Watch(request, context)
        finally:
            self._watchers -= 1

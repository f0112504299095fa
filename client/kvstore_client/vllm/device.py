"""Order between the engine's stream on a GPU and ours; on a CPU there is nothing to order."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class Side:
    """A stream of ours beside the engine's, for one thread at a time. On a CPU it does nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Copies that are enqueued inside go to this stream."""
        if self._stream is None:
            yield
        else:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                yield

    def after(self, event: Any) -> None:
        """What is enqueued here from now on runs after the event."""
        if event is not None:
            self._stream.wait_event(event)

    def mark(self) -> Any:
        """An event after all that is enqueued here by now; None on a CPU."""
        return self._stream.record_event() if self._stream is not None else None

    def finish(self) -> None:
        """Waits until all that is enqueued here has run."""
        if self._stream is not None:
            self._stream.synchronize()


def engine_mark(device: torch.device) -> Any:
    """An event after all that the engine has enqueued by now; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_stream(device).record_event()


def engine_waits(device: torch.device, event: Any) -> None:
    """What the engine enqueues from now on runs after the event."""
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)

"""Whether it is worth asking a tier: not for a while after several failures in a row."""

FAILURES_TO_OPEN = 3
OPEN_S = 1.0


class Breaker:
    """Closed until three attempts in a row have failed; then one attempt a second, until one works.

    Plain bookkeeping. Each attempt that `begin` was told of ends with one of the other three.
    """

    def __init__(self) -> None:
        self._failures = 0
        self._retry_at_s = 0.0
        self._probing = False

    @property
    def closed(self) -> bool:
        """Whether everybody may try."""
        return self._failures < FAILURES_TO_OPEN

    def admits(self, now_s: float) -> bool:
        """Whether an attempt may begin now."""
        return self.closed or (not self._probing and now_s >= self._retry_at_s)

    def begin(self, now_s: float) -> None:
        """An attempt begins; while the breaker is open it is the only one of this second."""
        if not self.closed:
            self._probing = True
            self._retry_at_s = now_s + OPEN_S

    def succeeded(self) -> None:
        """An attempt worked: the breaker closes."""
        self._failures, self._probing = 0, False

    def failed(self, now_s: float) -> bool:
        """An attempt failed. True if this opened the breaker."""
        self._failures += 1
        self._probing = False
        if not self.closed:
            self._retry_at_s = now_s + OPEN_S
        return self._failures == FAILURES_TO_OPEN

    def abandoned(self) -> None:
        """An attempt ended without telling anything: its caller went away."""
        self._probing = False

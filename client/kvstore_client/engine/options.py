"""How an engine's adapter reaches its node, as the engine's own configuration says it."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from kvstore_client.budgets import Budgets
from kvstore_client.client import Client
from kvstore_client.endpoint_options import DEFAULT_ENDPOINT

_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The settings that every adapter has; an adapter with more of them inherits from this.

    Read from a mapping (JSON, say) with `read`, which names the field that is wrong.
    """

    endpoint: str = DEFAULT_ENDPOINT
    """HOST:PORT of the node."""
    token: str = field(default="", repr=False)
    """The bearer token; empty: none, or the one in `token_file`."""
    token_file: str = ""
    """A file that holds the bearer token, as `kvstore token` printed it."""
    tls_ca_file: str = ""
    """Certificates (PEM) that the node's is signed with; empty: no TLS."""
    scope: str = ""
    """Who may read what is stored; empty: this tenant alone. Loads look there and nowhere else."""
    model_revision: str = ""
    """What names the weights; empty: found out, for a local checkpoint by reading it whole."""
    match_budget_s: float = 0.1
    """How long a request may wait to hear what is stored of it."""
    load_budget_s: float = 2.0
    """How long one load may take; past it the rest is computed."""
    store_budget_s: float = 5.0
    """How long one store may take, behind the engine's back."""
    lease_ms: int = 10_000
    """How long matched blocks stay readable at most, should their load be late."""
    max_saving_bytes: int = 256 << 20
    """Copies of blocks that wait to be stored; what comes while they are full is not stored."""
    restore_gate: bool = True
    """Whether what would take longer to load than to compute is computed."""
    shared_memory: bool = True
    """Whether a node on the same host may share its memory."""
    bulk: bool = True
    """Whether bytes may move beside gRPC, on connections of their own."""

    def __post_init__(self) -> None:
        if self.token and self.token_file:
            raise ValueError("token, token_file: one of them, not both")
        if not 0 < self.lease_ms < 2**32:
            raise ValueError(f"lease_ms: must lie in 1 … {2**32 - 1}, got {self.lease_ms}")
        if self.max_saving_bytes < 0:
            raise ValueError(f"max_saving_bytes: must be 0 or more, got {self.max_saving_bytes}")
        self.budgets  # noqa: B018 - raises for one that is out of range

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str) -> Self:
        """The settings of a mapping. Raises ValueError, naming `where` and the field."""
        known = {each.name: each for each in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"{where}.{name}: no such setting{_nearest(name, known)}")
            _check_type(f"{where}.{name}", value, type(known[name].default))
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{where}.{error}") from None

    @property
    def budgets(self) -> Budgets:
        """What the client may take for each call."""
        names = ("match", "load", "store")
        for name in names:
            if not (math.isfinite(value := getattr(self, f"{name}_budget_s")) and value > 0):
                raise ValueError(f"{name}_budget_s: must lie above 0, got {value}")
        return Budgets(**{f"{name}_s": getattr(self, f"{name}_budget_s") for name in names})

    @property
    def scopes(self) -> tuple[str, ...]:
        """Where matches and loads look."""
        return (self.scope,)

    def connect(self) -> Client:
        """A client of the node, which need not be there yet.

        Raises ValueError for a file that cannot be read, naming the setting.
        """
        try:
            return Client(
                self.endpoint,
                token=self._token() or None,
                budgets=self.budgets,
                shared_memory=self.shared_memory,
                bulk=self.bulk,
                tls_ca_file=Path(self.tls_ca_file) if self.tls_ca_file else None,
            )
        except OSError as error:
            raise ValueError(f"tls_ca_file: {error}") from None

    def _token(self) -> str:
        if not self.token_file:
            return self.token
        try:
            return Path(self.token_file).read_text().strip()
        except OSError as error:
            raise ValueError(f"token_file: {error}") from None


def _nearest(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"


def _check_type(where: str, value: object, wanted: type) -> None:
    fits = isinstance(value, wanted) or (wanted is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and wanted is not bool):
        raise ValueError(f"{where}: {_TYPES[wanted]} is needed, got {value!r}")

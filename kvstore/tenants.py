"""Who may call: bearer tokens and the tenants that own them.

The file holds hashes only (`kvstore token` writes it):

    [tenants.acme]
    token_sha256 = ["<64 hex digits>"]
"""

import hashlib
import hmac
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvstore.api.errors import ConfigError, InvalidArgument, Unauthenticated

LOCAL_TENANT = "local"
PRIVATE_SCOPE = ""

_TENANT = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_SCOPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Tenant:
    """An authenticated caller."""

    name: str


def check_scope(scope: str) -> str:
    """The scope itself. Raises InvalidArgument unless it is empty (private) or a plain name."""
    if scope != PRIVATE_SCOPE and not _SCOPE.fullmatch(scope):
        raise InvalidArgument("scope: 1–63 letters, digits, '.', '_' or '-', or empty for private")
    return scope


def check_tenant_name(name: str) -> str:
    """The name itself. Raises ConfigError unless it is plain."""
    if not _TENANT.fullmatch(name):
        raise ConfigError(f"tenant {name!r}: 1–63 lower-case letters, digits, '.', '_' or '-'")
    return name


def token_hash(token: str) -> str:
    """What the file keeps of a token. Tokens are random, so that a plain hash is enough."""
    return hashlib.sha256(token.encode()).hexdigest()


class Tenants:
    """Finds the tenant of a token. Without a file everybody is the one local tenant."""

    def __init__(self, hashes: Mapping[str, str] | None = None) -> None:
        self._tenants = None if hashes is None else {h: Tenant(n) for h, n in hashes.items()}

    @classmethod
    def from_file(cls, path: Path) -> "Tenants":
        """The tenants of a file. Raises ConfigError, naming the entry, for anything unexpected."""
        try:
            content = tomllib.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"auth.tokens_file: {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"auth.tokens_file: {path}: {error}") from None
        if set(content) - {"tenants"}:
            raise ConfigError(f"auth.tokens_file: {path}: only [tenants.NAME] tables are allowed")
        hashes: dict[str, str] = {}
        for value, name in _entries(path, content.get("tenants", {})):
            if hashes.setdefault(value, name) != name:
                raise ConfigError(
                    f"auth.tokens_file: tenants.{name}.token_sha256: one of these is also a token "
                    f"of {hashes[value]}; delete it from both"
                )
        return cls(hashes)

    @property
    def open_to_all(self) -> bool:
        """True where nobody has to show a token."""
        return self._tenants is None

    @property
    def count(self) -> int:
        """How many tenants there are."""
        return 1 if self._tenants is None else len(set(self._tenants.values()))

    def authenticate(self, authorization: str | None) -> Tenant:
        """The tenant of an `authorization` header. Raises Unauthenticated."""
        if self._tenants is None:
            return Tenant(LOCAL_TENANT)
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("authorization: 'Bearer TOKEN' is needed in the call's metadata")
        presented = token_hash(token)
        # Every entry is compared, so that the time tells nothing of which one came close.
        owners = [t for h, t in self._tenants.items() if hmac.compare_digest(h, presented)]
        if not owners:
            raise Unauthenticated("authorization: no tenant owns this token")
        return owners[0]


def _entries(path: Path, tenants: object) -> Iterable[tuple[str, str]]:
    if not isinstance(tenants, dict):
        raise ConfigError(f"auth.tokens_file: {path}: tenants must be a table")
    for name, entry in tenants.items():
        check_tenant_name(name)
        hashes = entry.get("token_sha256") if isinstance(entry, dict) else None
        if not isinstance(hashes, list) or set(entry) != {"token_sha256"}:
            raise ConfigError(f"auth.tokens_file: tenants.{name}: needs token_sha256 = [...] alone")
        for value in hashes:
            if not isinstance(value, str) or not _HASH.fullmatch(value):
                raise ConfigError(
                    f"auth.tokens_file: tenants.{name}.token_sha256: 64 hex digits each"
                )
            yield value, name

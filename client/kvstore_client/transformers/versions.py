"""Which versions of the libraries this adapter was tried with; the others are refused."""

from importlib.metadata import PackageNotFoundError, version

SUPPORTED = {"torch": ((2, 6), (3,)), "transformers": ((5, 21), (6,))}
"""For each package the first version, and the first that is too new."""


def check_versions(installed: dict[str, str] | None = None) -> None:
    """Raises ImportError, naming the package, unless all are there in a supported version."""
    for package, (first, beyond) in SUPPORTED.items():
        wanted = f"{package}>={_text(first)},<{_text(beyond)}"
        found = _version(package) if installed is None else installed.get(package)
        if found is None:
            raise ImportError(
                f"kvstore_client.transformers needs {wanted}, which is not installed; "
                "pip install 'kvstore-llm[transformers]'"
            )
        if not first <= _numbers(found) < beyond:
            raise ImportError(f"kvstore_client.transformers needs {wanted}, found {found}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))

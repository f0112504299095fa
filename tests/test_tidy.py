"""What holds for the repository as a whole: direction, weight, freshness, lint and types."""

import ast
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "kvstore.api": ROOT / "kvstore" / "api",
    "kvstore": ROOT / "kvstore",
    "kvstore_client": ROOT / "client" / "kvstore_client",
    "kvstore_workers": ROOT / "workers" / "kvstore_workers",
}
ALLOWED = {
    "kvstore.api": {"kvstore.api"},
    "kvstore": {"kvstore.api", "kvstore"},
    "kvstore_client": {"kvstore.api", "kvstore_client"},
    "kvstore_workers": {"kvstore.api", "kvstore_client", "kvstore_workers"},
}
HEAVY = {"torch", "ray", "redis", "numpy", "pydantic", "transformers", "numcodecs", "matplotlib"}


def _package_of(module: str) -> str | None:
    """Which of our packages a module belongs to; None for other people's."""
    owners = [p for p in PACKAGES if module == p or module.startswith(p + ".")]
    return max(owners, key=len, default=None)


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.lineno


def _wrong_imports(package: str, path: Path) -> list[str]:
    return [
        f"{path}:{line}: {package} must not import {module}"
        for module, line in _imports(path)
        if (owner := _package_of(module)) is not None
        and owner not in ALLOWED[package]
        # The version alone may be asked of the package that imports nothing.
        and not (module == "kvstore" and package == "kvstore")
    ]


def _sources(package: str) -> list[Path]:
    files = [path for path in PACKAGES[package].rglob("*.py") if "/v1/" not in path.as_posix()]
    if package == "kvstore":
        files = [path for path in files if "kvstore/api/" not in path.as_posix()]
    return files


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    """workers → client → api ← node, and nothing else."""
    sources = _sources(package)
    assert sources
    assert [wrong for path in sources for wrong in _wrong_imports(package, path)] == []


def test_a_forbidden_import_is_noticed(tmp_path: Path) -> None:
    """The check bites: a client that imports the node's memory tier is named."""
    planted = tmp_path / "planted.py"
    planted.write_text("from kvstore.tiers.memory import Memory\nimport kvstore_workers.pool\n")
    assert len(_wrong_imports("kvstore_client", planted)) == 2


def _modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    return set(output.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import kvstore.api.tier, kvstore.api.keys, kvstore.api.space, kvstore.api.wire",
        "import kvstore_client, kvstore_client.remote_tier",
        "import kvstore.cli",
    ],
)
def test_api_client_and_command_line_are_light(statement: str) -> None:
    """They load nothing that only the node or the workers need."""
    assert _modules_after(statement) & HEAVY == set()


def test_the_base_install_is_little_more_than_grpc() -> None:
    """Whoever adds a base dependency has to change this list, and think."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {requirement.split(">=")[0] for requirement in project["dependencies"]}
    assert names == {"grpcio", "protobuf", "xxhash", "click", "rich"}


def test_proto_is_no_python_package() -> None:
    """proto-plus installs a package of that name, which ours would shadow."""
    assert not list((ROOT / "proto").rglob("__init__.py"))


@pytest.mark.timeout(600)
def test_the_generated_code_is_fresh(tmp_path: Path) -> None:
    """`make proto` would change nothing."""
    for name in ("Makefile", "proto", "deploy", "pyproject.toml", "constraints.txt"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    (tmp_path / "kvstore/api/v1").mkdir(parents=True)
    generator = ROOT / ".gen-venv"
    assert (generator / ".installed").exists(), "`make test` sets up .gen-venv; run it once"
    (tmp_path / ".gen-venv").symlink_to(generator)
    subprocess.run(
        ["make", "-C", str(tmp_path), "-o", ".gen-venv/.installed", "proto"],
        check=True,
        capture_output=True,
    )
    written = {path.name: path.read_bytes() for path in (tmp_path / "kvstore/api/v1").glob("*.py*")}
    committed = {
        path.name: path.read_bytes() for path in (ROOT / "kvstore/api/v1").glob("kvstore_pb2*")
    }
    assert written == committed


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_lint_and_types_are_clean(command: list[str]) -> None:
    """ruff finds nothing, the formatting is its own, and mypy is content with strict types."""
    ran = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr

"""Tenants: tokens are found by their hashes alone, and files that are not as expected refuse."""

import hashlib
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvstore.api.errors import ConfigError, InvalidArgument, Unauthenticated
from kvstore.tenants import LOCAL_TENANT, Tenants, check_scope, check_tenant_name, token_hash
from kvstore.token_command import token


def tenants_of(tmp_path: Path, text: str) -> Tenants:
    """The tenants of a file with this text."""
    path = tmp_path / "tokens.toml"
    path.write_text(text)
    return Tenants.from_file(path)


def entry(name: str, *tokens: str) -> str:
    """A tenant with the hashes of tokens."""
    hashes = ", ".join(f'"{hashlib.sha256(each.encode()).hexdigest()}"' for each in tokens)
    return f"[tenants.{name}]\ntoken_sha256 = [{hashes}]\n"


def test_a_token_finds_its_tenant(tmp_path: Path) -> None:
    """Any of the tenant's tokens; the scheme's case does not matter."""
    tenants = tenants_of(tmp_path, entry("acme", "one", "two") + entry("rival", "three"))
    assert not tenants.open_to_all
    for authorization, name in (
        ("Bearer one", "acme"), ("bearer two", "acme"), ("BEARER three", "rival"),
    ):  # fmt: skip
        assert tenants.authenticate(authorization).name == name


@pytest.mark.parametrize(
    "authorization",
    [None, "", "one", "Bearer", "Bearer ", "Bearer  one", "Basic one", "Bearer One", "Bearer one ",
     "Bearer " + hashlib.sha256(b"one").hexdigest()],
)  # fmt: skip
def test_anything_else_is_nobody(tmp_path: Path, authorization: str | None) -> None:
    """Also the hash itself: who reads the file cannot call."""
    tenants = tenants_of(tmp_path, entry("acme", "one"))
    with pytest.raises(Unauthenticated, match="authorization: "):
        tenants.authenticate(authorization)


def test_without_a_file_there_is_one_local_tenant() -> None:
    """Whatever the caller shows."""
    tenants = Tenants()
    assert tenants.open_to_all
    for authorization in (None, "", "Bearer anything"):
        assert tenants.authenticate(authorization).name == LOCAL_TENANT


def test_a_file_without_tenants_lets_nobody_in(tmp_path: Path) -> None:
    """Empty is not open."""
    for text in ("", "[tenants]\n", "[tenants.acme]\ntoken_sha256 = []\n"):
        tenants = tenants_of(tmp_path, text)
        assert not tenants.open_to_all
        with pytest.raises(Unauthenticated):
            tenants.authenticate("Bearer one")


HASH = hashlib.sha256(b"one").hexdigest()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tenants", "auth.tokens_file"),
        ("tenants = 1", "tenants must be a table"),
        ("[tenant.acme]\n", r"only \[tenants.NAME\]"),
        (f"[tenants.acme]\ntoken = '{HASH}'\n", "tenants.acme: needs token_sha256"),
        (f"[tenants.acme]\ntoken_sha256 = '{HASH}'\n", "tenants.acme: needs token_sha256"),
        (f"[tenants.acme]\ntoken_sha256 = ['{HASH}']\nadmin = true\n", "tenants.acme: needs"),
        ("[tenants]\nacme = 1\n", "tenants.acme: needs token_sha256"),
        (f"[tenants.acme]\ntoken_sha256 = ['{HASH[:-1]}']\n", "tenants.acme.token_sha256: 64 hex"),
        (f"[tenants.acme]\ntoken_sha256 = ['{HASH.upper()}']\n", "tenants.acme.token_sha256"),
        ("[tenants.acme]\ntoken_sha256 = ['one']\n", "tenants.acme.token_sha256"),
        ("[tenants.acme]\ntoken_sha256 = [1]\n", "tenants.acme.token_sha256"),
        (f"[tenants.Acme]\ntoken_sha256 = ['{HASH}']\n", "tenant 'Acme'"),
        (f"[tenants.'a b']\ntoken_sha256 = ['{HASH}']\n", "tenant 'a b'"),
    ],
)
def test_a_file_that_is_not_as_expected_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """The message names the entry; nothing is guessed where rights are concerned."""
    with pytest.raises(ConfigError, match=message):
        tenants_of(tmp_path, text)


def test_one_token_of_two_tenants_is_refused(tmp_path: Path) -> None:
    """It would make of one of them the other."""
    with pytest.raises(ConfigError, match="rival"):
        tenants_of(tmp_path, entry("acme", "one") + entry("rival", "two", "one"))


@pytest.mark.parametrize("name", ["a", "acme", "a.b-c_d", "0", "a" * 63])
def test_plain_tenant_names(name: str) -> None:
    """Lower case, digits and a few signs."""
    assert check_tenant_name(name) == name


@pytest.mark.parametrize("name", ["", "A", "-a", ".a", "a b", "a/b", "ä", "a" * 64, "a\n"])
def test_strange_tenant_names(name: str) -> None:
    """Anything that could be mistaken for something else."""
    with pytest.raises(ConfigError, match="tenant"):
        check_tenant_name(name)


def test_scopes() -> None:
    """Plain names, or none for the private one."""
    for scope in ("", "team", "Team.2-x_y", "a" * 63):
        assert check_scope(scope) == scope
    for scope in (" ", "-a", "a b", "a" * 64, "a\n", "../a", "ü"):
        with pytest.raises(InvalidArgument, match="scope"):
            check_scope(scope)


# The command.


def made(path: Path, tenant: str) -> str:
    """A new token of a tenant."""
    ran = CliRunner().invoke(token, [tenant, "--file", str(path)])
    assert ran.exit_code == 0, ran.output
    (line,) = ran.output.splitlines()
    return line


def test_the_command_makes_tokens_that_work(tmp_path: Path) -> None:
    """Several tenants, several tokens each; the file holds their hashes alone."""
    path = tmp_path / "tokens.toml"
    names = ["acme", "rival", "acme", "a.b", "rival", "acme", "a.b"]
    tokens = [(name, made(path, name)) for name in names]
    assert len({value for _, value in tokens}) == len(names)
    tenants = Tenants.from_file(path)
    for name, value in tokens:
        assert len(value) >= 32
        assert tenants.authenticate(f"Bearer {value}").name == name
        assert value not in path.read_text()
        assert token_hash(value) in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_command_keeps_what_is_in_the_file(tmp_path: Path) -> None:
    """Comments, other tenants, and entries that were written by hand."""
    path = tmp_path / "tokens.toml"
    path.write_text("# ours\n" + entry("acme", "one") + "\n# theirs\n" + entry('"rival"', "two"))
    value = made(path, "acme")
    other = made(path, "rival")
    tenants = Tenants.from_file(path)
    for authorization, name in (
        ("one", "acme"), (value, "acme"), ("two", "rival"), (other, "rival"),
    ):  # fmt: skip
        assert tenants.authenticate(f"Bearer {authorization}").name == name
    assert path.read_text().count("# ours") == path.read_text().count("# theirs") == 1
    assert len(tomllib.loads(path.read_text())["tenants"]) == 2


@pytest.mark.parametrize("text", ["[tenants.acme", "[tenants.acme]\ntoken_sha256 = ['short']\n"])
def test_the_command_does_not_touch_a_file_that_is_wrong(tmp_path: Path, text: str) -> None:
    """It says what is wrong with it, as the node would."""
    path = tmp_path / "tokens.toml"
    path.write_text(text)
    ran = CliRunner().invoke(token, ["acme", "--file", str(path)])
    assert ran.exit_code == 1
    assert "auth.tokens_file" in ran.output
    assert path.read_text() == text


def test_the_command_refuses_strange_names(tmp_path: Path) -> None:
    """And makes no file for them."""
    path = tmp_path / "tokens.toml"
    ran = CliRunner().invoke(token, ["A B", "--file", str(path)])
    assert (ran.exit_code, path.exists()) == (1, False)
    assert "tenant" in ran.output


def test_hand_written_arrays_of_any_shape_keep_working(tmp_path: Path) -> None:
    """Spaces, line ends and inline tables are TOML too; the file never becomes unreadable."""
    hashes = [hashlib.sha256(word).hexdigest() for word in (b"one", b"two")]
    shapes = [
        f"[tenants.acme]\ntoken_sha256=['{hashes[0]}']\n",
        f'[ tenants . acme ]\n# why\ntoken_sha256 = [\n  "{hashes[0]}",\n]\n',
        f'[tenants]\nacme = {{ token_sha256 = ["{hashes[0]}"] }}\n',
        f'[tenants]\nacme.token_sha256 = ["{hashes[0]}"]\n',
        f'[tenants."acme"]\ntoken_sha256 = []\n[tenants.rival]\ntoken_sha256 = ["{hashes[0]}"]',
    ]
    for text in shapes:
        path = tmp_path / "tokens.toml"
        path.write_text(text)
        ran = CliRunner().invoke(token, ["acme", "--file", str(path)])
        tenants = Tenants.from_file(path)
        assert tenants.authenticate("Bearer one").name in ("acme", "rival")
        if ran.exit_code == 0:
            value = ran.output.strip()
            assert tenants.authenticate(f"Bearer {value}").name == "acme"
        else:
            assert path.read_text() == text
            assert "token_sha256" in ran.output

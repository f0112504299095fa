"""Settings: what is unknown or bad is named, and what is given comes from where it should."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from kvstore.api.errors import ConfigError
from kvstore.config import Settings, fields, load_settings
from kvstore.config_command import config, sample
from kvstore.server import NodeServer
from tests.sim.nodes import Nodes

NAMES = [(section, name) for section, name, _ in fields()]
SECTIONS = sorted({section for section, _ in NAMES})


def loaded(
    tmp_path: Path,
    text: str = "",
    environ: Mapping[str, str] | None = None,
    flags: Mapping[tuple[str, str], str] | None = None,
) -> Settings:
    """The settings of a file with this text, an environment and flags."""
    file = tmp_path / "kvstore.toml"
    file.write_text(text)
    return load_settings(file, environ or {}, flags or {})


def complaint(flags: Mapping[tuple[str, str], str]) -> str:
    """What is said about settings that do not start."""
    with pytest.raises(ConfigError) as error:
        load_settings(None, {}, flags)
    return str(error.value)


def test_without_any_setting_there_are_defaults() -> None:
    """A node starts without a file, on loopback, with one local tenant."""
    settings = load_settings(None, {}, {})
    assert settings == Settings()
    assert settings.server.listen == "127.0.0.1:7070"
    assert settings.auth.tokens_file is None
    assert settings.disk.path.is_absolute()


@pytest.mark.parametrize("section", SECTIONS)
def test_an_unknown_setting_is_named(tmp_path: Path, section: str) -> None:
    """In each section, from each source."""
    message = rf"{section}\.nonsense: there is no such setting"
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, f"[{section}]\nnonsense = 1\n")
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, environ={f"KVSTORE_{section.upper()}__NONSENSE": "1"})
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, flags={(section, "nonsense"): "1"})


def test_an_unknown_section_is_named(tmp_path: Path) -> None:
    """A misspelt section is no section."""
    with pytest.raises(ConfigError, match="memry: there is no such setting"):
        loaded(tmp_path, "[memry]\ncapacity_bytes = 1\n")
    with pytest.raises(ConfigError, match="capacity_bytes: settings stand in tables"):
        loaded(tmp_path, "capacity_bytes = 1\n")


BAD: dict[tuple[str, str], list[str]] = {
    ("server", "listen"): [
        "",
        "localhost",
        ":7070",
        "host:port",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
    ],
    ("server", "metrics_listen"): ["9464", "127.0.0.1:x"],
    ("memory", "policy"): ["fifo", "LRU"],
    ("disk", "scrub_bytes_per_s"): ["0", "fast"],
    ("disk", "direct_io"): ["perhaps", "2"],
    ("server", "max_message_bytes"): ["1MiB", "65 MiB", "many"],
    ("server", "max_concurrent_calls"): ["0", "65537", "1.5", "x"],
    ("server", "max_watchers"): ["0", "65536", "1.5", "513"],
    ("server", "max_data_calls"): ["0", "2048", "x"],
    ("server", "inflight_bytes"): ["0", "3 MiB", "much"],
    ("server", "inflight_bytes_per_client"): ["0", "3 MiB", "1 GiB"],
    ("server", "waiting_calls"): ["-1", "65537"],
    ("server", "wait_s"): ["-1", "61", "nan"],
    ("server", "max_deadline_s"): ["0", "3601", "inf"],
    ("server", "drain_timeout_s"): ["-1", "601", "soon"],
    ("server", "reflection"): ["perhaps"],
    ("cluster", "node_id"): ["a b", "n" * 64, "a/b"],
    ("memory", "capacity_bytes"): ["0", "65535", "-1", "1 GiBB"],
    ("memory", "slab_bytes"): ["4095", "2 GiB"],
    ("redis", "blocks_url"): ["localhost:6379", "http://localhost"],
    ("redis", "directory_url"): ["localhost:6379"],
    ("redis", "capacity_bytes"): ["-1", "x"],
    ("redis", "part_bytes"): ["4095", "65 MiB"],
    ("redis", "ttl_s"): ["0", "-1", "x"],
    ("redis", "lookup_timeout_s"): ["0", "61"],
    ("redis", "timeout_s"): ["0", "61"],
    ("redis", "codec"): ["zip", "", "int8"],
    ("redis", "lossy"): ["raw", "", "fp4"],
    ("disk", "enabled"): ["perhaps"],
    ("disk", "capacity_bytes"): ["262143", "x"],
    ("disk", "segment_bytes"): ["65535", "3 GiB"],
    ("disk", "lookup_timeout_s"): ["0", "61"],
    ("disk", "timeout_s"): ["0", "nan", "61"],
    ("disk", "threads"): ["0", "65"],
    ("disk", "codec"): ["zip"],
    ("disk", "lossy"): ["perhaps", "auto"],
    ("leases", "memory_fraction"): ["-0.1", "0.91", "nan"],
    ("leases", "max_lease_s"): ["0", "3601", "inf"],
    ("shared_memory", "enabled"): ["perhaps"],
    ("shared_memory", "memory_fraction"): ["0", "0.91", "nan"],
    ("shared_memory", "client_fraction"): ["0", "0.91", "nan"],
    ("bulk", "enabled"): ["perhaps"],
    ("bulk", "listen"): ["7071", "localhost", "localhost:x", "localhost:65536"],
    ("bulk", "max_connections"): ["0", "4097", "x"],
    ("cluster", "advertised_endpoint"): ["7070", "host", "host:0", "host:65536"],
    ("peers", "enabled"): ["perhaps"],
    ("peers", "lookup_timeout_s"): ["0", "61"],
    ("peers", "timeout_s"): ["0", "nan", "61"],
    ("peers", "inflight_bytes"): ["1 MiB", "x"],
    ("peers", "announced_blocks"): ["0", "x", "16777217"],
}
PATHS = {
    ("auth", "tokens_file"),
    ("cluster", "secret_file"),
    ("disk", "path"),
    ("shared_memory", "directory"),
    ("server", "tls_certificate_file"),
    ("server", "tls_key_file"),
    ("peers", "tls_ca_file"),
}
PERIODS = {name for name in NAMES if name[0] == "disk" and name[1].endswith("_after_s")}
BAD |= {name: ["0", "-1", "86401"] for name in PERIODS}


def test_every_setting_has_its_bad_values_here() -> None:
    """Whoever adds a setting says what it does not accept."""
    assert set(BAD) | PATHS == set(NAMES)


@pytest.mark.parametrize("name", BAD, ids=".".join)
def test_a_bad_value_is_named(name: tuple[str, str]) -> None:
    """By section and field, in words, with the value that was given."""
    section, field = name
    for value in BAD[name]:
        message = complaint({name: value})
        assert re.search(rf"{section}(\.|: ){field}: ", message), (value, message)
        assert "\n" not in message


def test_all_bad_values_are_named_at_once() -> None:
    """Nobody has to start three times to learn of three mistakes."""
    message = complaint(
        {("server", "listen"): "x", ("disk", "threads"): "0", ("redis", "nonsense"): "1"}
    )
    assert all(word in message for word in ("server.listen", "disk.threads", "redis.nonsense"))


def test_flags_go_before_environment_before_file_before_defaults(tmp_path: Path) -> None:
    """Field by field, not section by section."""
    text = "[redis]\nttl_s = 1\npart_bytes = 5000\ncapacity_bytes = 5\n"
    environ = {"KVSTORE_REDIS__TTL_S": "2", "KVSTORE_REDIS__PART_BYTES": "6000", "PATH": "/bin"}
    settings = loaded(tmp_path, text, environ, {("redis", "ttl_s"): "3"})
    assert settings.redis.ttl_s == 3
    assert settings.redis.part_bytes == 6000
    assert settings.redis.capacity_bytes == 5
    assert settings.redis.timeout_s == Settings().redis.timeout_s


def test_other_variables_are_none_of_ours(tmp_path: Path) -> None:
    """Only KVSTORE_SECTION__NAME is a setting."""
    environ = {"KVSTORE_TEST_SEED": "1", "KVSTORE_": "x", "XKVSTORE_DISK__PATH": "x", "A__B": "c"}
    assert loaded(tmp_path, environ=environ) == Settings()


def test_sizes_are_read_with_their_units(tmp_path: Path) -> None:
    """Bytes, or with a unit, from a file as from a flag."""
    for value, size in (("2 GiB", 2 << 30), ("2147483648", 2 << 30), ("64MiB", 64 << 20)):
        assert (
            load_settings(None, {}, {("memory", "capacity_bytes"): value}).memory.capacity_bytes
            == size
        )
    assert (
        loaded(tmp_path, "[memory]\ncapacity_bytes = 134217728\n").memory.capacity_bytes
        == 128 << 20
    )


def test_an_empty_text_takes_an_optional_setting_away(tmp_path: Path) -> None:
    """In every source, and over those that come after it."""
    text = '[server]\nmetrics_listen = ""\n[redis]\nblocks_url = "redis://localhost"\n'
    settings = loaded(tmp_path, text, {"KVSTORE_REDIS__BLOCKS_URL": ""})
    assert settings.server.metrics_listen is None
    assert settings.redis.blocks_url is None
    for name in [("cluster", "node_id"), ("auth", "tokens_file"), ("redis", "directory_url")]:
        assert load_settings(None, {}, {name: ""}) == Settings(), name


def test_the_sample_is_all_settings_at_their_defaults(tmp_path: Path) -> None:
    """As it is, and with every line uncommented, it changes nothing."""
    text = sample()
    assert loaded(tmp_path, text) == Settings()
    uncommented = re.sub(r"(?m)^# (\w+ = )", r"\1", text)
    content = tomllib.loads(uncommented)
    assert {(section, name) for section in content for name in content[section]} == set(NAMES)
    assert loaded(tmp_path, uncommented) == Settings()
    for section, name, field in fields():
        assert field.description, f"{section}.{name} has no meaning"


def test_every_default_can_be_given_as_a_flag(tmp_path: Path) -> None:
    """What the sample shows is what a flag and a variable accept."""
    content = tomllib.loads(re.sub(r"(?m)^# (\w+ = )", r"\1", sample()))
    given = {(s, n): str(value) for s, table in content.items() for n, value in table.items()}
    assert load_settings(None, {}, given) == Settings()
    environ = {f"KVSTORE_{s.upper()}__{n.upper()}": value for (s, n), value in given.items()}
    assert load_settings(None, environ, {}) == Settings()


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:7070", "[::]:7070", "10.0.0.1:7070", "example.org:7070", "[fe80::1]:1"]
)
def test_who_can_be_reached_needs_tokens(tmp_path: Path, listen: str) -> None:
    """A node without tokens serves its own host alone; with a tokens file it may listen."""
    message = complaint({("server", "listen"): listen})
    assert f"server.listen: {listen} is reachable from other hosts" in message
    assert "auth.tokens_file" in message
    tokens = str(tmp_path / "tokens.toml")
    settings = load_settings(None, {}, {
        ("server", "listen"): listen, ("auth", "tokens_file"): tokens,
    })  # fmt: skip
    assert settings.server.listen == listen


def test_a_bulk_port_that_others_can_reach_needs_tokens_too(tmp_path: Path) -> None:
    """Also where gRPC itself listens on loopback."""
    message = complaint({("bulk", "listen"): "0.0.0.0:7071"})
    assert "bulk.listen: 0.0.0.0:7071 is reachable from other hosts" in message
    flags = {("bulk", "listen"): "0.0.0.0:7071", ("auth", "tokens_file"): str(tmp_path / "tokens")}
    assert load_settings(None, {}, flags).bulk.listen == "0.0.0.0:7071"


@pytest.mark.parametrize("lacking", ["tls_certificate_file", "tls_key_file"])
def test_tls_takes_a_certificate_and_its_key(lacking: str) -> None:
    """One without the other is named."""
    flags = {("server", name): name for name in ("tls_certificate_file", "tls_key_file")}
    del flags["server", lacking]
    assert f"{lacking}: is needed as well" in complaint(flags)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.8.9.1:7", "[::1]:7070", "localhost:7070"])
def test_loopback_needs_no_tokens(listen: str) -> None:
    """All of its names."""
    assert load_settings(None, {}, {("server", "listen"): listen}).server.listen == listen


def test_what_others_are_told_must_be_an_address(tmp_path: Path) -> None:
    """In a cluster a node announces where it listens, so that cannot be everywhere."""
    flags = {
        ("server", "listen"): "0.0.0.0:7070",
        ("auth", "tokens_file"): str(tmp_path / "tokens.toml"),
        ("redis", "directory_url"): "redis://localhost",
    }
    assert "server.listen: other nodes cannot reach 0.0.0.0:7070" in complaint(flags)


def test_a_node_that_listens_everywhere_may_say_where_it_is_reached(tmp_path: Path) -> None:
    """At an address of another machine that leads to it, say; everywhere is no such address."""
    flags = {
        ("server", "listen"): "0.0.0.0:7070",
        ("auth", "tokens_file"): str(tmp_path / "tokens.toml"),
        ("redis", "directory_url"): "redis://localhost",
        ("cluster", "advertised_endpoint"): "store-1.example:7070",
    }
    settings = load_settings(None, {}, flags)
    assert settings.cluster.advertised_endpoint == "store-1.example:7070"
    flags["cluster", "advertised_endpoint"] = "[::]:7070"
    assert "other nodes cannot reach [::]:7070" in complaint(flags)


PEERS = {
    ("peers", "enabled"): "true",
    ("redis", "directory_url"): "redis://localhost",
    ("cluster", "secret_file"): "secret",
}


@pytest.mark.parametrize(
    ("lacking", "value"),
    [
        (("redis", "directory_url"), ""),
        (("cluster", "secret_file"), ""),
        (("bulk", "enabled"), "false"),
    ],
    ids=str,
)
def test_peers_take_what_they_find_each_other_by(lacking: tuple[str, str], value: str) -> None:
    """Without it a node would be alone, and nobody would be told."""
    assert load_settings(None, {}, PEERS).peers.enabled
    message = complaint(PEERS | {lacking: value})
    assert f"peers.enabled: {'.'.join(lacking)} is needed as well" in message


def test_peers_have_tls_as_their_nodes_have() -> None:
    """A node with TLS has to say whom it trusts; one without trusts nobody by certificates."""
    tls = {("server", "tls_certificate_file"): "cert", ("server", "tls_key_file"): "key"}
    trust = {("peers", "tls_ca_file"): "ca"}
    assert load_settings(None, {}, PEERS | tls | trust).peers.tls_ca_file == Path("ca")
    for flags in (PEERS | tls, PEERS | trust):
        assert "peers.tls_ca_file: goes with server.tls_certificate_file" in complaint(flags)


def test_settings_do_not_change() -> None:
    """Nobody adjusts them on the way."""
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.disk.threads = 1  # type: ignore[misc]


@pytest.mark.parametrize("text", ["[memory", "memory = 1 = 2", "\0"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, text: str) -> None:
    """With the place of the mistake."""
    with pytest.raises(ConfigError, match=r"kvstore\.toml: "):
        loaded(tmp_path, text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Missing, a directory, or no text."""
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            load_settings(path, {}, {})
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.toml"):
        load_settings(tmp_path / "binary.toml", {}, {})


# The command.


def test_the_command_prints_the_sample() -> None:
    """To be redirected into a file."""
    ran = CliRunner().invoke(config)
    assert (ran.exit_code, ran.output) == (0, sample())


def test_the_command_checks_a_file(tmp_path: Path) -> None:
    """It says that all is well, or what is not."""
    file = tmp_path / "kvstore.toml"
    file.write_text("[disk]\nthreads = 8\n")
    ran = CliRunner().invoke(config, ["--check", str(file)])
    assert (ran.exit_code, "all settings are valid" in ran.output) == (0, True)
    file.write_text("[disk]\nthreads = 800\n")
    ran = CliRunner().invoke(config, ["--check", str(file)])
    assert ran.exit_code == 1
    assert "disk.threads" in ran.output
    ran = CliRunner(env={"KVSTORE_MEMORY__SLAB_BYTES": "1"}).invoke(config, ["--check", str(file)])
    assert "memory.slab_bytes" in ran.output


# The cluster's secret.


@pytest.mark.parametrize("size", [0, 31, 33, 64])
async def test_a_secret_of_another_length_is_refused(
    nodes: Nodes, tmp_path: Path, size: int
) -> None:
    """With the command that makes one."""
    path = tmp_path / "short.secret"
    path.write_bytes(bytes(size))
    with pytest.raises(ConfigError, match=rf"cluster\.secret_file: .*32 bytes .* got {size}"):
        await NodeServer.start(nodes.settings(cluster={"secret_file": path}))


async def test_a_missing_secret_is_named(nodes: Nodes, tmp_path: Path) -> None:
    """A file that was named is not made up."""
    settings = nodes.settings(cluster={"secret_file": tmp_path / "absent"})
    with pytest.raises(ConfigError, match=r"cluster\.secret_file: .*absent"):
        await NodeServer.start(settings)
    assert not (tmp_path / "absent").exists()


async def test_a_node_makes_its_secret_once(nodes: Nodes, tmp_path: Path) -> None:
    """Beside its disk, for itself alone, and keeps it."""
    secrets = set()
    for _ in range(2):
        server = await nodes.start(cluster={"secret_file": None})
        path = tmp_path / "cluster.secret"
        assert path.stat().st_mode & 0o777 == 0o600
        secrets.add(path.read_bytes())
        await nodes.stop(server)
    assert [len(secret) for secret in secrets] == [32]


async def test_tokens_that_cannot_be_read_are_named(nodes: Nodes, tmp_path: Path) -> None:
    """A node that should ask for tokens does not start without them."""
    settings = nodes.settings(auth={"tokens_file": tmp_path / "absent.toml"})
    with pytest.raises(ConfigError, match=r"auth\.tokens_file: .*absent\.toml"):
        await NodeServer.start(settings)

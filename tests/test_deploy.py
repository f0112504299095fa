"""Everything under deploy/: it parses, it fits its schema, and it agrees with the code."""

import copy
import functools
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml

from kvstore import __version__
from kvstore.cli import GROUP
from kvstore.config import Settings, load_settings
from kvstore.config_command import sample
from kvstore.metrics import Metrics

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
SCHEMAS = Path(__file__).parent / "schemas"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INSTALL = "pip install --constraint constraints.txt '.[server,workers]'"
MANIFESTS = sorted((DEPLOY / "kuberay").glob("*.yaml"))
SECRET = "kvstore-secrets"
FREE_NAMES = {"labels", "matchLabels", "data", "nodeSelector"}
"""Fields under which any name may stand."""

Document = dict[str, Any]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and what follows them, continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    pairs = (line.split(maxsplit=1) for line in joined if line.strip())
    return [(word, " ".join(rest.split())) for word, rest in pairs]


def of(word: str) -> list[str]:
    """What follows each such instruction."""
    return [rest for name, rest in instructions() if name == word]


def documents() -> list[tuple[str, Document]]:
    """Every object of every manifest, with a name for messages."""
    found = []
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text()):
            name = f"{path.name}:{document['kind']}:{document['metadata']['name']}"
            found.append((name, document))
    return found


DOCUMENTS = documents()


def document(kind: str, name: str) -> Document:
    """One object."""
    [found] = [
        one for _, one in DOCUMENTS if (one["kind"], one["metadata"]["name"]) == (kind, name)
    ]
    return found


def nodes(tree: Any) -> Iterator[Document]:
    """Every mapping inside a document."""
    if isinstance(tree, dict):
        yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from nodes(branch)


def containers(tree: Any) -> list[Document]:
    """Every container inside a document."""
    return [node for node in nodes(tree) if "image" in node]


@functools.cache
def validator(schema_name: str, definition: str = "") -> jsonschema.Draft202012Validator:
    """What says whether an instance fits a schema, or one definition of it."""
    schema = json.loads((SCHEMAS / schema_name).read_text())
    if definition:
        schema = {"$defs": schema["$defs"], "$ref": f"#/$defs/{definition}"}
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def check_command(arguments: list[str]) -> None:
    """Fails unless `kvstore` has the command and the command these flags."""
    declared = PROJECT["entry-points"][GROUP]
    command = EntryPoint(arguments[0], declared[arguments[0]], GROUP).load()
    assert isinstance(command, click.Command)
    command.make_context(arguments[0], arguments[1:])


# The image


def test_the_image_is_installed_as_the_readme_says() -> None:
    """One line, in both places, with extras that exist."""
    assert INSTALL in (ROOT / "README.md").read_text().splitlines()
    assert INSTALL in of("RUN")
    extras = re.search(r"\[([a-z,]+)\]", INSTALL)
    assert extras is not None
    assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])


def test_what_the_image_copies_exists_and_reaches_the_builder() -> None:
    """Also what the build itself reads: the README and the licence that pyproject.toml names."""
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    sources = [source for rest in of("COPY") for source in rest.split()[:-1]]
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored, source
    for needed in (
        "pyproject.toml",
        "constraints.txt",
        PROJECT["readme"],
        *PROJECT["license-files"],
    ):
        assert needed in sources
    where = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for folder in where["packages"]["find"]["where"]:
        assert ("kvstore" if folder == "." else folder) in sources
    assert not any(fnmatch("kvstore/cli.py", pattern) for pattern in ignored if pattern != "*")


def test_what_the_image_runs_exists() -> None:
    """Its command, its health check, and its settings."""
    assert json.loads(of("ENTRYPOINT")[0]) == ["kvstore"]
    assert PROJECT["scripts"] == {"kvstore": "kvstore.cli:main"}
    command = json.loads(of("CMD")[0])
    check_command(command)
    assert any(rest.endswith(command[-1]) for rest in of("COPY"))
    [health] = of("HEALTHCHECK")
    check_command(json.loads(health.partition("CMD ")[2])[1:])


def test_the_image_does_not_run_as_root() -> None:
    """By number, the same as in the manifests, and after everything that needs root."""
    [user] = of("USER")
    assert int(user) > 0
    words = [word for word, _ in instructions()]
    assert words.index("USER") > max(at for at, word in enumerate(words) if word == "RUN")
    assert any(f"--uid {user}" in rest for rest in of("RUN"))
    for name in ("store.yaml", "raycluster.yaml"):
        assert f"runAsUser: {user}" in (DEPLOY / "kuberay" / name).read_text()


def test_the_image_exposes_the_ports_of_the_settings() -> None:
    """gRPC and metrics, at their defaults."""
    server = Settings().server
    ports = [str(listen).rpartition(":")[2] for listen in (server.listen, server.metrics_listen)]
    assert shlex.split(of("EXPOSE")[0]) == ports == ["7070", "9464"]


def test_the_sample_of_settings_is_fresh() -> None:
    """`kvstore config > deploy/kvstore.toml` after a setting changed."""
    assert (DEPLOY / "kvstore.toml").read_text() == sample()


# Manifests


@pytest.mark.parametrize(("name", "manifest"), DOCUMENTS, ids=[name for name, _ in DOCUMENTS])
def test_manifests_fit_their_schema(name: str, manifest: Document) -> None:
    """Known fields only, each of the right kind."""
    validator("kubernetes.json", manifest["kind"]).validate(manifest)


def misspelt(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Copies of a document, each with one field misspelt, where not just any name may stand."""
    if isinstance(tree, list):
        for at, branch in enumerate(tree):
            for where, wrong in misspelt(branch, path):
                yield where, _with(tree, at, wrong)
    if isinstance(tree, dict):
        for field, value in tree.items():
            here = f"{path}.{field}"
            yield here, {(f"{name}s" if name == field else name): v for name, v in tree.items()}
            if field not in FREE_NAMES and not _selects(field, value):
                for where, wrong in misspelt(value, here):
                    yield where, _with(tree, field, wrong)


def _selects(field: str, value: Any) -> bool:
    """True for a Service's selector: labels, where a Deployment's holds `matchLabels`."""
    return field == "selector" and "matchLabels" not in value


@pytest.mark.parametrize(("name", "manifest"), DOCUMENTS, ids=[name for name, _ in DOCUMENTS])
def test_a_typo_anywhere_is_found(name: str, manifest: Document) -> None:
    """Each field of each mapping, misspelt in turn, is refused."""
    judge = validator("kubernetes.json", manifest["kind"])
    typos = list(misspelt(manifest))
    assert len(typos) > 5
    for path, wrong in typos:
        assert not judge.is_valid(wrong), f"{name}{path}: the typo was not found"


def _with(tree: Any, at: Any, new: Any) -> Any:
    changed = copy.copy(tree)
    changed[at] = new
    return changed


@pytest.mark.parametrize(
    ("field", "value"),
    [("replicas", "two"), ("minReplicas", -1), ("groupName", "GPU workers"), ("maxReplica", 3)],
)
def test_a_wrong_value_is_found(field: str, value: object) -> None:
    """A word for a number, a number out of range, a name that is none, a field that is none."""
    cluster = copy.deepcopy(document("RayCluster", "kvstore"))
    cluster["spec"]["workerGroupSpecs"][0][field] = value
    assert not validator("kubernetes.json", "RayCluster").is_valid(cluster)


def test_versions_agree() -> None:
    """The image is this version, and Ray the one that the image holds."""
    ours = {one["image"] for _, manifest in DOCUMENTS for one in containers(manifest)}
    assert ours == {f"kvstore:{__version__}", "redis:7.4"}
    assert f"kvstore:{__version__}" in (DEPLOY / "Dockerfile").read_text()
    version = document("RayCluster", "kvstore")["spec"]["rayVersion"]
    assert f"ray=={version}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert any(wish.startswith("ray[") for wish in PROJECT["optional-dependencies"]["workers"])


def test_the_head_runs_no_workers_and_each_worker_has_a_gpu() -> None:
    """And what a pod asks for is what it gets."""
    spec = document("RayCluster", "kvstore")["spec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        for container in containers(group):
            assert int(container["resources"]["limits"]["nvidia.com/gpu"]) >= 1
    for _, one in DOCUMENTS:
        for container in containers(one):
            assert container["resources"]["limits"] == container["resources"]["requests"]


def test_selectors_find_their_pods() -> None:
    """Services, policies and owners name labels that pods have."""
    pods = [
        node["template"]["metadata"]["labels"]
        for _, one in DOCUMENTS
        for node in nodes(one)
        if "metadata" in node.get("template", {})
    ]
    # The operator labels the pods of a RayCluster; Prometheus is deployed by others.
    pods += [{"ray.io/cluster": "kvstore"}, {"app.kubernetes.io/name": "prometheus"}]
    for name, one in DOCUMENTS:
        selectors = [node["matchLabels"] for node in nodes(one) if "matchLabels" in node]
        if one["kind"] == "Service":
            selectors.append(one["spec"]["selector"])
        for selector in selectors:
            assert any(selector.items() <= labels.items() for labels in pods), name


def test_ports_agree() -> None:
    """Services, policies and probes lead to ports that containers open."""
    opened = {
        port["name"]: port["containerPort"]
        for _, one in DOCUMENTS
        for container in containers(one)
        for port in container.get("ports", ())
    }
    assert (opened["grpc"], opened["metrics"], opened["redis"]) == (7070, 9464, 6379)
    for _, one in DOCUMENTS:
        if one["kind"] == "Service":
            for port in one["spec"]["ports"]:
                assert opened[port["targetPort"]] == port["port"]
        for node in nodes(one):
            if "grpc" in node:
                assert node["grpc"]["port"] == opened["grpc"]
            if "protocol" in node:
                assert node["port"] in opened.values()


def test_volumes_are_mounted_and_mounts_have_volumes() -> None:
    """Nothing dangles, in either direction."""
    for name, one in DOCUMENTS:
        for spec in (node for node in nodes(one) if "containers" in node):
            volumes = {volume["name"] for volume in spec.get("volumes", ())}
            mounts = {
                mount["name"] for node in containers(spec) for mount in node.get("volumeMounts", ())
            }
            assert volumes == mounts, name


def test_secrets_stand_in_no_file() -> None:
    """They are named, all in one Secret, and the comment that makes it makes every key."""
    assert all(one["kind"] != "Secret" for _, one in DOCUMENTS)
    keys = set()
    for _, one in DOCUMENTS:
        for node in nodes(one):
            if "secretKeyRef" in node:
                assert node["secretKeyRef"]["name"] == SECRET
                keys.add(node["secretKeyRef"]["key"])
            if "secretName" in node:
                assert node["secretName"] == SECRET
                keys |= {item["key"] for item in node["items"]}
    made = re.findall(r"--from-file=([\w.-]+)", (DEPLOY / "kuberay" / "store.yaml").read_text())
    assert keys == set(made)


def test_the_store_starts_with_its_settings(tmp_path: Path) -> None:
    """The ConfigMap and the environment of the pod are settings that the node accepts."""
    [container] = document("DaemonSet", "kvstore-store")["spec"]["template"]["spec"]["containers"]
    check_command(container["args"])
    values = {"POD_IP": "10.1.2.3", "NODE_NAME": "gpu-host-1", "redis-url": "redis://:x@r:6379/0"}
    environ: dict[str, str] = {}
    for variable in container["env"]:
        source = variable.get("valueFrom", {})
        text = variable.get("value") or values.get(
            source.get("secretKeyRef", {}).get("key") or variable["name"], ""
        )
        environ[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda m: environ[m[1]], text)
    file = tmp_path / "kvstore.toml"
    file.write_text(document("ConfigMap", "kvstore-store")["data"]["kvstore.toml"])
    settings = load_settings(file, environ, {})
    assert settings.server.listen == "10.1.2.3:7070"
    assert settings.cluster.node_id == "gpu-host-1"
    assert settings.redis.blocks_url == settings.redis.directory_url == values["redis-url"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    for path in (settings.auth.tokens_file, settings.cluster.secret_file, settings.disk.path):
        assert path is not None
        assert any(str(path).startswith(f"{mount}/") for mount in mounts), path
    limit = container["resources"]["limits"]["memory"]
    assert settings.memory.capacity_bytes < int(limit.removesuffix("Gi")) << 30
    grace_s = document("DaemonSet", "kvstore-store")["spec"]["template"]["spec"][
        "terminationGracePeriodSeconds"
    ]
    wait_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert wait_s + settings.server.drain_timeout_s < grace_s


def test_redis_is_only_a_cache() -> None:
    """Limited, evicting, keeping nothing, behind a password; its limit fits its container."""
    [container] = containers(document("Deployment", "kvstore-redis"))
    words = container["args"]
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert options["--save"] == ""
    assert options["--appendonly"] == "no"
    assert options["--maxmemory-policy"] == "allkeys-lru"
    assert options["--requirepass"] == f"$({container['env'][0]['name']})"
    limit = container["resources"]["limits"]["memory"]
    assert int(options["--maxmemory"].removesuffix("gb")) < int(limit.removesuffix("Gi"))


# Prometheus and Grafana


def exported() -> dict[str, set[str]]:
    """Every series that a node exports, with its labels."""
    series: dict[str, set[str]] = {}
    for name, metric in vars(Metrics()).items():
        labels = set(getattr(metric, "_labelnames", ()))
        kind = getattr(metric, "_type", "")
        base = f"kvstore_{name}"
        if kind == "counter":
            series[f"{base}_total"] = labels
        elif kind == "gauge":
            series[base] = labels
        elif kind == "histogram":
            series[f"{base}_bucket"] = labels | {"le"}
    return series


def check_expression(expression: str) -> None:
    """Fails unless every series and every label of an expression exists."""
    series = exported()
    names = re.findall(r"\bkvstore_\w+", expression)
    for name in names:
        assert name in series, f"{name}: no such metric"
    known = set().union(*(series[name] for name in names)) | {"instance", "job"}
    used = set(re.findall(r"(\w+)\s*=~?\s*\"", expression))
    for group in re.findall(r"\bby \(([^)]*)\)", expression):
        used |= set(re.findall(r"\w+", group))
    assert used <= known, f"{used - known}: no such label in {expression}"
    assert expression.count("(") == expression.count(")")


def test_prometheus_scrapes_the_metrics_port() -> None:
    """Of a node by hand and of the nodes in Kubernetes, whose Service exists."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    validator("prometheus.json").validate(config)
    by_hand, kubernetes = config["scrape_configs"]
    assert by_hand["static_configs"][0]["targets"] == [Settings().server.metrics_listen]
    [found] = kubernetes["dns_sd_configs"]
    service = document("Service", found["names"][0])
    assert service["spec"]["clusterIP"] == "None"
    assert found["port"] == service["spec"]["ports"][0]["port"]
    assert all((DEPLOY / "prometheus" / name).exists() for name in config["rule_files"])


def test_alerts_are_about_metrics_that_exist() -> None:
    """An alert on a metric that nobody exports never fires."""
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())
    validator("rules.json").validate(rules)
    for rule in rules["groups"][0]["rules"]:
        check_expression(rule["expr"])
    with pytest.raises(AssertionError, match="no such metric"):
        check_expression("rate(kvstore_corrupted_total[5m])")
    with pytest.raises(AssertionError, match="no such label"):
        check_expression('kvstore_corrupt_total{tenant="a"}')


def test_the_dashboard_shows_metrics_that_exist() -> None:
    """Panels fit their schema, do not overlap, and ask for series and labels that exist."""
    dashboard = json.loads((DEPLOY / "grafana" / "kvstore.json").read_text())
    validator("dashboard.json").validate(dashboard)
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        for target in panel["targets"]:
            check_expression(target["expr"])
            labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert labels, panel["title"]
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels)))
    assert used - {"__rate_interval", "__range"} == variables


def test_the_licence_is_complete() -> None:
    """The text that pyproject.toml and the image refer to."""
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    for part in ("Version 2.0, January 2004", "TERMS AND CONDITIONS", "APPENDIX", "limitations"):
        assert part in text

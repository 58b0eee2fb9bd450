"""The deployment files agree with each other, with the cluster's schemas and with the product.

A manifest fails at three in the morning in somebody else's cluster, so what can be known here is
checked here: field names, ports, probe targets, the shutdown budget, secret names, the image's
build. What only a cluster knows (image pulls, scheduling) is left to it.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from tests.support.process import serving

ROOT = Path(__file__).resolve().parent.parent
K8S = ROOT / "k8s"
BUILT_IN = ["sidecar.yaml", "networkpolicy.yaml"]
SIDECAR = "llm-sidecar"
MARGIN_S = 5

# A manifest is untyped by nature: the schemas of kubernetes_validate are its types.
Manifest = dict[str, Any]


def manifests(file: str) -> list[Manifest]:
    return list(yaml.safe_load_all((K8S / file).read_text()))


def manifest(kind: str, file: str = "sidecar.yaml") -> Manifest:
    (found,) = [each for each in manifests(file) if each["kind"] == kind]
    return found


@pytest.fixture(scope="module")
def pod() -> Manifest:
    template: Manifest = manifest("Deployment")["spec"]["template"]
    return template


@pytest.fixture(scope="module")
def spec(pod: Manifest) -> Manifest:
    found: Manifest = pod["spec"]
    return found


@pytest.fixture(scope="module")
def sidecar(spec: Manifest) -> Manifest:
    (found,) = [each for each in spec["initContainers"] if each["name"] == SIDECAR]
    return dict(found)


@pytest.fixture(scope="module")
def app(spec: Manifest) -> Manifest:
    (found,) = spec["containers"]
    return dict(found)


@pytest.fixture(scope="module")
def config() -> Manifest:
    found: Manifest = yaml.safe_load(manifest("ConfigMap")["data"]["config.yaml"])
    return found


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def environment(container: Manifest) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container["env"]}


def strings_in(value: object) -> Iterator[str]:
    """Every string anywhere below `value`."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from strings_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from strings_in(each)


# Schemas


@pytest.mark.parametrize("file", BUILT_IN)
def test_manifests_are_valid_to_the_newest_api_server(file: str) -> None:
    newest = str(kubernetes_validate.latest_version())
    for each in manifests(file):
        kubernetes_validate.validate(each, newest, strict=True)


def test_a_misspelt_field_does_not_pass_for_valid() -> None:
    deployment = manifest("Deployment")
    deployment["spec"]["template"]["spec"]["initContainers"][0]["restartPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            deployment, str(kubernetes_validate.latest_version()), strict=True
        )


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Selector(Strict):
    match_labels: dict[str, str] = Field(alias="matchLabels", min_length=1)


class Endpoint(Strict):
    port: str = Field(max_length=15, pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")
    path: str
    interval: str = Field(pattern=r"^[0-9]+s$")
    scrape_timeout: str = Field(alias="scrapeTimeout", pattern=r"^[0-9]+s$")


class PodMonitorSpec(Strict):
    selector: Selector
    pod_target_labels: list[str] = Field(alias="podTargetLabels")
    endpoints: list[Endpoint] = Field(alias="podMetricsEndpoints", min_length=1)


class Metadata(Strict):
    name: str


class PodMonitor(Strict):
    """The part of monitoring.coreos.com/v1 PodMonitor that we use.

    The type belongs to the Prometheus Operator, so the API server's schemas do not have it.
    """

    api_version: Literal["monitoring.coreos.com/v1"] = Field(alias="apiVersion")
    kind: Literal["PodMonitor"]
    metadata: Metadata
    spec: PodMonitorSpec


def test_pod_monitor_finds_the_pods_and_scrapes_the_admin_port(
    pod: Manifest, sidecar: Manifest
) -> None:
    monitor = PodMonitor.model_validate(manifest("PodMonitor", "podmonitor.yaml"))
    labels = pod["metadata"]["labels"]
    (endpoint,) = monitor.spec.endpoints
    assert monitor.spec.selector.match_labels.items() <= labels.items()
    assert set(monitor.spec.pod_target_labels) <= set(labels)
    assert endpoint.port in {each["name"] for each in sidecar["ports"]}
    assert endpoint.path == "/metrics"
    # Prometheus refuses a whole configuration in which one timeout exceeds its interval.
    assert int(endpoint.scrape_timeout[:-1]) <= int(endpoint.interval[:-1])


def test_kustomization_lists_every_manifest() -> None:
    (kustomization,) = manifests("kustomization.yaml")
    assert kustomization["apiVersion"] == "kustomize.config.k8s.io/v1beta1"
    assert kustomization["kind"] == "Kustomization"
    assert sorted([*kustomization["resources"], "kustomization.yaml"]) == sorted(
        path.name for path in K8S.glob("*.yaml")
    )


# The Pod


def test_sidecar_is_native(sidecar: Manifest) -> None:
    assert sidecar["restartPolicy"] == "Always"


def test_deployment_selects_its_own_pods(pod: Manifest) -> None:
    selected = manifest("Deployment")["spec"]["selector"]["matchLabels"]
    assert selected.items() <= pod["metadata"]["labels"].items()


def test_sidecar_image_is_the_version_of_this_project(sidecar: Manifest) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sidecar["image"] == f"{project['name']}:{project['version']}"


@pytest.mark.parametrize(
    ("probe", "path"),
    [("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/livez")],
)
def test_probes_ask_the_admin_port_that_the_config_binds(
    sidecar: Manifest, config: Manifest, probe: str, path: str
) -> None:
    numbers = {each["name"]: each["containerPort"] for each in sidecar["ports"]}
    asked = sidecar[probe]["httpGet"]
    assert asked["path"] == path
    assert numbers[asked["port"]] == port_of(config["admin"])


def test_the_kubelet_reaches_the_admin_port_and_only_the_pod_the_data_port(
    config: Manifest,
) -> None:
    assert config["admin"].startswith("0.0.0.0:")
    assert config["listen"].startswith("127.0.0.1:")


def test_sidecar_announces_no_port_but_the_admin_port(sidecar: Manifest, config: Manifest) -> None:
    assert [each["containerPort"] for each in sidecar["ports"]] == [port_of(config["admin"])]


def test_no_two_listeners_of_the_pod_share_a_port(app: Manifest, config: Manifest) -> None:
    taken = [each["containerPort"] for each in app["ports"]]
    taken += [port_of(config["listen"]), port_of(config["admin"])]
    assert len(taken) == len(set(taken))


def test_the_application_is_sent_to_the_data_port_with_keys_that_open_nothing(
    app: Manifest, config: Manifest
) -> None:
    env = environment(app)
    assert env["OPENAI_BASE_URL"] == f"http://{config['listen']}/v1"
    assert env["ANTHROPIC_BASE_URL"] == f"http://{config['listen']}"
    assert env["OPENAI_API_KEY"] == env["ANTHROPIC_API_KEY"] == "unused-the-sidecar-signs"


def test_grace_period_covers_both_drains_one_after_the_other(
    spec: Manifest, app: Manifest, config: Manifest
) -> None:
    needed_s = (
        app["lifecycle"]["preStop"]["sleep"]["seconds"]
        + int(environment(app)["APP_DRAIN_S"])
        + config["drain_s"]
        + MARGIN_S
    )
    assert spec["terminationGracePeriodSeconds"] >= needed_s


def test_no_container_may_gain_rights_or_write_to_its_root(spec: Manifest) -> None:
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for each in [*spec["initContainers"], *spec["containers"]]:
        context = each["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["runAsUser"] > 0


def test_no_container_gets_an_api_token(spec: Manifest) -> None:
    account = manifest("ServiceAccount")
    assert account["metadata"]["name"] == spec["serviceAccountName"]
    assert account["automountServiceAccountToken"] is False
    assert spec["automountServiceAccountToken"] is False


def test_sidecar_memory_is_bounded_and_its_cpu_is_not_throttled(sidecar: Manifest) -> None:
    assert sidecar["resources"]["requests"] == {"cpu": "100m", "memory": "128Mi"}
    assert sidecar["resources"]["limits"] == {"memory": "128Mi"}


def test_network_policy_keeps_the_admin_port_to_monitoring(pod: Manifest, app: Manifest) -> None:
    policy = manifest("NetworkPolicy", "networkpolicy.yaml")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    sources = {
        port["port"]: rule.get("from") for rule in policy["ingress"] for port in rule["ports"]
    }
    namespace = {"kubernetes.io/metadata.name": "monitoring"}
    assert sources == {
        app["ports"][0]["name"]: None,
        "sidecar-admin": [{"namespaceSelector": {"matchLabels": namespace}}],
    }


# Configuration and secrets


def mounted_files(spec: Manifest, sidecar: Manifest) -> dict[Path, str]:
    """Every file that the sidecar finds in its mounts: absolute path to content."""
    volumes = {each["name"]: each for each in spec["volumes"]}
    files: dict[Path, str] = {}
    for mount in sidecar["volumeMounts"]:
        volume = volumes[mount["name"]]
        assert "subPath" not in mount
        root = Path(mount["mountPath"])
        if "configMap" in volume:
            source = manifest("ConfigMap")
            assert volume["configMap"]["name"] == source["metadata"]["name"]
            for item in volume["configMap"]["items"]:
                files[root / item["path"]] = source["data"][item["key"]]
        elif "secret" in volume:
            source = manifest("Secret")
            assert volume["secret"]["secretName"] == source["metadata"]["name"]
            files |= {root / key: value for key, value in source["stringData"].items()}
        else:
            assert "emptyDir" in volume
    return files


def moved_to(root: Path, files: Mapping[Path, str]) -> None:
    """Write what is mounted below `root`, and let the Pod's absolute paths in it lead there."""
    for path, content in files.items():
        here = root / path.relative_to("/")
        here.parent.mkdir(parents=True, exist_ok=True)
        here.write_text(
            re.sub(r"(?=/etc/sidecar|/run/secrets|/var/lib/sidecar)", str(root), content)
        )


def test_every_secret_the_config_names_is_mounted_and_no_other(
    spec: Manifest, sidecar: Manifest, config: Manifest
) -> None:
    named = {Path(each[5:]) for each in strings_in(config) if each.startswith("file:")}
    secrets = {path for path in mounted_files(spec, sidecar) if path.match("/run/secrets/llm/*")}
    assert named == secrets


def test_the_application_does_not_see_the_keys(app: Manifest) -> None:
    assert "volumeMounts" not in app
    assert "envFrom" not in app
    assert not any("valueFrom" in each for each in app["env"])


def test_secret_holds_placeholders_only() -> None:
    assert all(each.startswith("REPLACE-ME-") for each in manifest("Secret")["stringData"].values())


def test_only_the_sidecars_group_may_read_the_keys(spec: Manifest, sidecar: Manifest) -> None:
    (keys,) = [each for each in spec["volumes"] if "secret" in each]
    assert keys["secret"]["defaultMode"] == 0o440
    assert spec["securityContext"]["fsGroup"] == sidecar["securityContext"]["runAsGroup"]


def test_the_fixed_team_has_a_mounted_team_file(
    spec: Manifest, sidecar: Manifest, config: Manifest
) -> None:
    teams = {
        yaml.safe_load(content)["team"]
        for path, content in mounted_files(spec, sidecar).items()
        if path.match(config["teams"])
    }
    assert config["team"] in teams


def test_sidecar_check_accepts_the_mounted_config(
    spec: Manifest, sidecar: Manifest, tmp_path: Path
) -> None:
    files = mounted_files(spec, sidecar)
    start = Path(sidecar["args"][sidecar["args"].index("--config") + 1])
    assert start in files
    moved_to(tmp_path, files)
    check = subprocess.run(
        [sys.executable, "-m", "sidecar", "check", str(tmp_path / start.relative_to("/"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert check.returncode == 0, check.stdout + check.stderr
    assert "REPLACE-ME" not in check.stdout + check.stderr


# What is written


def files_below(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_file()}


def volume_of(spec: Manifest, sidecar: Manifest, directory: str) -> Manifest:
    """The volume that is mounted there, writable."""
    (mount,) = [each for each in sidecar["volumeMounts"] if each["mountPath"] == directory]
    assert not mount.get("readOnly")
    (volume,) = [each for each in spec["volumes"] if each["name"] == mount["name"]]
    return dict(volume)


def test_data_directory_is_a_bounded_volume_on_disk(
    spec: Manifest, sidecar: Manifest, config: Manifest
) -> None:
    assert volume_of(spec, sidecar, config["data_dir"])["emptyDir"] == {"sizeLimit": "1Gi"}
    assert volume_of(spec, sidecar, "/tmp")["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Mi"}


def test_nothing_is_mounted_writable_but_data_and_tmp(sidecar: Manifest, config: Manifest) -> None:
    writable = {each["mountPath"] for each in sidecar["volumeMounts"] if not each.get("readOnly")}
    assert writable == {config["data_dir"], "/tmp"}


async def test_mounted_config_keeps_the_books_in_the_data_directory(
    spec: Manifest, sidecar: Manifest, config: Manifest, tmp_path: Path
) -> None:
    files = mounted_files(spec, sidecar)
    start = Path(sidecar["args"][sidecar["args"].index("--config") + 1])
    files[start] = re.sub(
        r"^(listen|admin): .*$", r"\1: 127.0.0.1:0", files[start], flags=re.MULTILINE
    )
    moved_to(tmp_path, files)
    before = files_below(tmp_path)
    async with serving(tmp_path / start.relative_to("/")) as process:
        assert await process.end() == 0
    written = files_below(tmp_path) - before
    data_dir = tmp_path / Path(config["data_dir"]).relative_to("/")
    assert {path.name for path in written} == {"ledger.db"}
    assert {path.parent for path in written} == {data_dir}


def test_books_of_a_week_fit_into_the_volume(config: Manifest) -> None:
    calls_per_s, bytes_per_call = 5, 160
    size = config["filters"]["ledger"]["keep_days"] * 86_400 * calls_per_s * bytes_per_call
    assert size < 2**30


def test_what_the_config_lets_the_process_keep_fits_into_its_memory(config: Manifest) -> None:
    filters, limit_mib, begins_with_mib, for_calls_mib = config["filters"], 128, 72, 20
    assert filters["token_counter"]["max_vocabularies"] == 0
    cache_mib = 2 * filters["cache"]["max_bytes"] / 2**20  # kept, and still coming
    assert begins_with_mib + cache_mib + for_calls_mib <= limit_mib


# The image


def dockerfile() -> list[list[str]]:
    """The instructions of the Dockerfile as words, comments and line continuations gone."""
    text = (ROOT / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [line.split() for line in "\n".join(lines).replace("\\\n", "").splitlines()]


def test_dockerfile_passes_hadolint() -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    lint = subprocess.run(
        [hadolint, "--no-color", "--failure-threshold", "style", ROOT / "Dockerfile"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert lint.returncode == 0, lint.stdout + lint.stderr


def test_image_runs_as_the_user_of_the_manifest(sidecar: Manifest) -> None:
    context = sidecar["securityContext"]
    (user,) = [words[1] for words in dockerfile() if words[0] == "USER"]
    assert user == f"{context['runAsUser']}:{context['runAsGroup']}"


def test_image_and_manifest_start_the_same_command(sidecar: Manifest) -> None:
    command = {words[0]: " ".join(words[1:]) for words in dockerfile()}
    assert yaml.safe_load(command["ENTRYPOINT"]) == ["sidecar"]
    assert yaml.safe_load(command["CMD"]) == sidecar["args"]


def test_image_has_a_data_directory_of_its_user_where_both_configs_want_it(
    config: Manifest,
) -> None:
    (run,) = [" ".join(words[1:]) for words in dockerfile() if words[1:2] == ["install"]]
    (user,) = [words[1] for words in dockerfile() if words[0] == "USER"]
    uid, gid = user.split(":")
    shipped = yaml.safe_load((ROOT / "config.yaml").read_text())["data_dir"]
    assert run.split(" && ") == [
        f"install -d -o {uid} -g {gid} -m 0700 {config['data_dir']}",
        f"ln -s {config['data_dir']} /etc/sidecar/{shipped}",
    ]


def test_image_is_not_built_without_time_zones() -> None:
    (words,) = [words for words in dockerfile() if "zoneinfo" in words]
    python, *arguments = yaml.safe_load(" ".join(words[1:]))
    assert python.startswith("/opt/sidecar/bin/")
    # Without its packages (-S), which might bring zones of their own.
    for zones, is_built in ((os.environ.get("PYTHONTZPATH"), True), ("", False)):
        environ = {} if zones is None else {"PYTHONTZPATH": zones}
        run = subprocess.run(
            [sys.executable, "-S", *arguments], env=environ, capture_output=True, timeout=30
        )
        assert (run.returncode == 0) == is_built


def test_image_has_the_licences_that_the_package_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    copied = {source for words in dockerfile() if words[0] == "COPY" for source in words[1:-1]}
    assert set(project["license-files"]) <= copied


@pytest.mark.parametrize("extra", ["redis", "tokens", "bloom"])
def test_image_has_the_packages_of_the_extra(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements/run.txt").read_text(), re.M))
    wanted = [re.match(r"[A-Za-z0-9-]+", each) for each in project["optional-dependencies"][extra]]
    assert {found[0] for found in wanted if found} <= locked


def test_what_the_dockerfile_copies_exists_and_is_in_the_build_context() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    admitted = {line[1:].rstrip("/") for line in ignore if line.startswith("!")}
    copied = {
        source.rstrip("/")
        for words in dockerfile()
        if words[0] == "COPY" and not words[1].startswith("--from")
        for source in words[1:-1]
    }
    assert "*" in ignore
    assert copied == admitted
    assert not [source for source in sorted(copied) if not (ROOT / source).exists()]


def test_image_installs_only_pinned_and_hashed_packages_from_no_named_index() -> None:
    text = (ROOT / "requirements/run.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    for package in "\n".join(lines).replace("\\\n", "").splitlines():
        assert re.match(r"^[a-z0-9-]+==[^ ]+ .*--hash=sha256:[0-9a-f]{64}", package), package
    for source in (text, (ROOT / "Dockerfile").read_text()):
        assert "://" not in source
        assert "index-url" not in source
    (locked,) = [
        words
        for words in dockerfile()
        if "requirements/run.txt" in words[-1:] and words[0] == "RUN"
    ]
    assert "--require-hashes" in locked

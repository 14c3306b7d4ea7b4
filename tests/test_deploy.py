"""What is in deploy/, and the Dockerfile, as far as it can be checked without running it."""

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml
from doc_blocks import PAGES, blocks

from qrank import Reranker
from qrank.cli import main
from qrank.serve.app import build
from qrank.serve.metrics import Metrics
from qrank.serve.residence import ServedModel

ROOT = Path(__file__).parent.parent
UNIT = (ROOT / "deploy/qrank.service").read_text("utf-8")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_accepts_the_unit_and_finds_little_exposed(tmp_path: Path) -> None:
    program = tmp_path / "qrank"
    program.write_text("#!/bin/sh\n", "utf-8")
    program.chmod(0o755)
    unit = tmp_path / "qrank.service"
    unit.write_text(UNIT.replace("/opt/qrank/bin/qrank", str(program)), "utf-8")

    def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["systemd-analyze", *arguments, str(unit)]
        return subprocess.run(command, capture_output=True, text=True)

    verified = analyze("verify")
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    # From 0, nothing is exposed, to 10; without any of it: 9.6.
    judged = analyze("security", "--offline=true", "--threshold=20")
    assert judged.returncode == 0, judged.stdout


def test_the_unit_starts_a_command_that_exists() -> None:
    (line,) = re.findall(r"^ExecStart=/opt/qrank/bin/qrank (.*)$", UNIT, re.MULTILINE)
    name, *arguments = line.replace("%d/keys", __file__).split()
    command = main.commands[name]
    command.make_parser(click.Context(command)).parse_args(arguments)


def test_the_image_gets_all_that_the_wheel_is_made_of() -> None:
    """An image that lacks a folder of a package cannot be built."""
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    sources = {name for line in copied for name in line.split()}
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines()
        if line.startswith("!")
    }
    assert sources <= allowed
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    places = setuptools["package-dir"]
    for package in setuptools["packages"]:
        known = [name for name in places if package == name or package.startswith(f"{name}.")]
        folder = places[known[0]] if known else package.replace(".", "/")
        assert any(f"{folder}/".startswith(f"{name}/") for name in sources), folder


def manifests() -> Iterator[dict[str, Any]]:
    """Those for Kubernetes: of deploy/ and of the pages."""
    for path in sorted((ROOT / "deploy/kubernetes").iterdir()):
        yield from yaml.safe_load_all(path.read_text("utf-8"))
    for page in PAGES:
        for block in blocks(page):
            if block.language == "yaml" and "apiVersion" in block.code:
                yield from yaml.safe_load_all(block.code)


@pytest.fixture(scope="module")
def kubernetes() -> dict[str, Any]:
    """What deploy/kubernetes describes, by kind."""
    return {manifest["kind"]: manifest for manifest in manifests()}


@pytest.mark.parametrize("version", ["1.29", kubernetes_validate.latest_version()])
def test_kubernetes_knows_every_field_of_the_manifests(version: str) -> None:
    kinds = []
    for manifest in manifests():
        kubernetes_validate.validate(manifest, version, strict=True)
        kinds.append(manifest["kind"])
    expected = ["Deployment", "HorizontalPodAutoscaler", "Job", "PodDisruptionBudget", "Service"]
    assert sorted(kinds) == expected


def test_a_field_that_kubernetes_does_not_know_is_found(kubernetes: dict[str, Any]) -> None:
    service = kubernetes["Service"]
    wrong = {**service, "spec": {**service["spec"], "selectors": {}}}
    with pytest.raises(kubernetes_validate.ValidationError, match="selectors"):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_the_pod_serves_where_kubernetes_asks(kubernetes: dict[str, Any]) -> None:
    pod = kubernetes["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    serve = main.commands["serve"]
    # After those of the image's ENTRYPOINT.
    context = serve.make_context("serve", ["--host", "0.0.0.0", *container["args"]])
    with Reranker("mini", backend="fakes:length") as reranker:
        routes = build([ServedModel.of("mini", reranker.engine)]).routes
    (port,) = container["ports"]
    assert port["containerPort"] == context.params["port"]
    assert int(pod["metadata"]["annotations"]["prometheus.io/port"]) == context.params["port"]
    assert pod["metadata"]["annotations"]["prometheus.io/path"] in routes
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["path"] in routes
        assert asked["port"] == port["name"]
    readiness = container["readinessProbe"]
    noticed = readiness["periodSeconds"] * readiness["failureThreshold"]
    delay, drain = context.params["drain_delay"], context.params["drain_timeout"]
    assert noticed < delay
    assert pod["spec"]["terminationGracePeriodSeconds"] > delay + drain
    paths = {mount["mountPath"] for mount in container["volumeMounts"]}
    image = (ROOT / "Dockerfile").read_text("utf-8")
    assert paths == {"/tmp", *re.findall(r"QRANK_CACHE=(\S+)", image)}


def test_services_and_scaling_find_the_pods(kubernetes: dict[str, Any]) -> None:
    deployment, scaler = kubernetes["Deployment"], kubernetes["HorizontalPodAutoscaler"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert kubernetes["Service"]["spec"]["selector"] == labels
    assert kubernetes["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    target = scaler["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    (metric,) = scaler["spec"]["metrics"]
    metrics = Metrics()
    metrics.of("mini", "onnx-int8@cpu")
    assert f"# TYPE {metric['pods']['metric']['name']} gauge" in metrics.text().decode()

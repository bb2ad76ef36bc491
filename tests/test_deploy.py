"""The files in deploy/ agree with the server: flags, port, health checks, and timeouts."""

import argparse
import fnmatch
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from mmjax.serve import command

from mmjax.cli import flags

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
IMAGES = ("Dockerfile", "Dockerfile.gpu")
MANIFESTS = ("gpu.yaml", "tpu.yaml")


def server_arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    parser.add_argument("model", nargs="?")
    command.add_flags(parser)
    flags.add_engine_flags(parser)
    return parser.parse_args(words)


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile, with continued lines joined."""
    text = "".join(line for line in (DEPLOY / name).read_text().splitlines(True) if not line.startswith("#"))
    lines = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines) if word]


@pytest.mark.parametrize("name", IMAGES)
def test_image(name: str) -> None:
    found = instructions(name)
    last = max(i for i, (word, _) in enumerate(found) if word == "FROM")
    final = dict(found[last:])
    assert final["ENTRYPOINT"] == '["tini", "--", "mmjax", "serve"]'
    assert final["USER"] not in ("root", "0") and int(final["USER"].split(":")[0]) >= 1000
    assert final["EXPOSE"] == str(server_arguments([]).port)
    assert f"'127.0.0.1', {final['EXPOSE']}" in final["HEALTHCHECK"] and "'/health'" in final["HEALTHCHECK"]
    assert final["VOLUME"] == "/cache" and "MMJAX_CACHE_ROOT=/cache/" in final["ENV"]
    code = re.search(r'"-c", "(.*)"\]$', final["HEALTHCHECK"])
    assert code is not None
    compile(code[1], name, "exec")
    stop = re.search(r"--stop-timeout (\d+)", (DEPLOY / name).read_text())
    assert stop is not None and int(stop[1]) >= server_arguments([]).drain_timeout + 10


def test_images_install_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for path in [*DEPLOY.rglob("*.yaml"), *(DEPLOY / name for name in IMAGES)]:
        for names in re.findall(r"EXTRAS=([\w,]+)", path.read_text()):
            assert set(names.split(",")) <= set(extras)


def test_the_context_holds_what_the_package_is_built_from() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored  # nothing but what is named
    kept = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = set(project["tool"]["setuptools"]["package-dir"].values())
    files = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert {name for name in folders | files if not any(fnmatch.fnmatch(name, each) for each in kept)} == set()


def documents(name: str) -> dict[str, Any]:
    """The documents of a manifest by kind, of which each has one."""
    found = list(yaml.safe_load_all((DEPLOY / "k8s" / name).read_text()))
    assert len({each["kind"] for each in found}) == len(found)
    return {each["kind"]: each for each in found}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest(name: str) -> None:
    found = documents(name)
    deployment, service = found["Deployment"]["spec"], found["Service"]["spec"]
    template = deployment["template"]
    pod = template["spec"]
    [container] = pod["containers"]
    labels = template["metadata"]["labels"]
    assert labels == deployment["selector"]["matchLabels"] == service["selector"]

    given = server_arguments(container["args"])
    [port] = container["ports"]
    assert given.model and port["containerPort"] == given.port
    assert service["ports"][0]["targetPort"] == port["name"]
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(given.port)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    start = container["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 20 * 60

    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= pause + given.drain_timeout + 10

    limits = container["resources"]["limits"]
    devices = next(int(count) for kind, count in limits.items() if kind in ("nvidia.com/gpu", "google.com/tpu"))
    assert devices == given.tensor_parallel_size
    topology = pod.get("nodeSelector", {}).get("cloud.google.com/gke-tpu-topology")
    if topology:
        columns, rows = topology.split("x")
        assert int(columns) * int(rows) == devices

    volumes = {volume["name"] for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert {"/cache", "/tmp"} <= set(mounts) and set(mounts.values()) == volumes
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [found["PersistentVolumeClaim"]["metadata"]["name"]]
    # Otherwise a service called mmjax sets variables such as MMJAX_PORT in every pod.
    assert pod["enableServiceLinks"] is False

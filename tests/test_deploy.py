"""The files in deploy/ agree with the server: flags, port, health checks, and timeouts."""

import argparse
import fnmatch
import importlib
import json
import re
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from mmjax.serve import command
from prometheus_client.parser import text_string_to_metric_families

from mmjax import CompletionOutput, RequestOutput
from mmjax.cli import flags
from mmjax.engine.engine import STEP_TOKENS, TOKEN_SECONDS
from mmjax.engine.histogram import Histogram
from mmjax.entrypoints.metrics import EngineMetrics

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
IMAGES = ("Dockerfile", "Dockerfile.gpu")
METRIC = re.compile(r"(?:vllm|mmjax):\w+")
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


def image_extras(name: str) -> set[str]:
    """The extras that the head of a manifest says its image is built with."""
    found = re.search(r"EXTRAS=([\w,]+)", (DEPLOY / "k8s" / name).read_text())
    assert found is not None
    return set(found[1].split(","))


def test_several_hosts() -> None:
    found = documents("tpu_hosts.yaml")
    group = found["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    leader, follower = group["leaderTemplate"], group["workerTemplate"]
    [first], [other] = leader["spec"]["containers"], follower["spec"]["containers"]
    for name in ("args", "env", "image", "resources"):  # hosts that differ refuse to start
        assert first[name] == other[name]
    for name in ("nodeSelector", "tolerations", "terminationGracePeriodSeconds"):
        assert leader["spec"][name] == follower["spec"][name]

    known = {"LWS_GROUP_SIZE": str(group["size"]), "LWS_WORKER_INDEX": "0", "LWS_LEADER_ADDRESS": "leader"}
    words = [re.sub(r"\$\((\w+)\)", lambda match: known[match[1]], word) for word in first["args"]]
    given = server_arguments(words)
    assert (int(given.nnodes), int(given.node_rank), given.master_addr) == (group["size"], 0, "leader")
    columns, rows = leader["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = int(first["resources"]["limits"]["google.com/tpu"])
    assert given.tensor_parallel_size == int(columns) * int(rows) == chips * group["size"]

    [port] = first["ports"]
    assert port["containerPort"] == given.port and "ports" not in other
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert first[probe]["httpGet"] == {"path": "/health", "port": port["name"]} and probe not in other
    pause = int(first["lifecycle"]["preStop"]["exec"]["command"][1])
    assert leader["spec"]["terminationGracePeriodSeconds"] >= pause + given.drain_timeout + 10
    selector = found["Service"]["spec"]["selector"]
    assert selector.items() <= leader["metadata"]["labels"].items()
    assert not selector.items() <= follower["metadata"]["labels"].items()
    assert "tpu" in image_extras("tpu_hosts.yaml")


def test_replicas_on_ray() -> None:
    spec = documents("ray.yaml")["RayService"]["spec"]
    config = yaml.safe_load(spec["serveConfigV2"])
    [application] = config["applications"]
    deployment = application["args"]["deployment_config"]
    [group] = spec["rayClusterConfig"]["workerGroupSpecs"]
    [worker] = group["template"]["spec"]["containers"]
    [head] = spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert head["image"] == worker["image"] and {"ray", "gpu"} <= image_extras("ray.yaml")
    # a replica fits a pod, and there is a pod for each replica
    gpus = int(worker["resources"]["limits"]["nvidia.com/gpu"])
    assert deployment["ray_actor_options"]["num_gpus"] == gpus
    assert deployment["ray_actor_options"]["num_cpus"] < int(worker["resources"]["requests"]["cpu"])
    assert group["maxReplicas"] == deployment["autoscaling_config"]["max_replicas"]
    for container in (head, worker):
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["serve"] == config["http_options"]["port"]
    assert worker["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": "serve"}

    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def served_samples() -> set[str]:
    """The names of all samples of a server's /metrics after one request."""
    engine = types.SimpleNamespace(
        step_tokens=Histogram(STEP_TOKENS),
        inter_token_latency=Histogram(TOKEN_SECONDS),
        block_pool=types.SimpleNamespace(block_size=16, num_blocks=9),
        scheduler=types.SimpleNamespace(prefix_caching=True),
    )
    model: Any = types.SimpleNamespace(
        max_model_len=128, engines=[engine], counters=dict, load=lambda: (0, 0, 0.0), sleep_state="awake"
    )
    metrics = EngineMetrics(model, "model")
    outputs = [CompletionOutput(0, "", [1], finish_reason="stop")]
    metrics.record(RequestOutput("0", "a", [1], None, outputs, finished=True))
    families = text_string_to_metric_families(metrics.text().decode())
    return {sample.name for family in families for sample in family.samples}


def test_dashboard() -> None:
    """Grafana asks for metrics that exist, and shows every one of them."""
    dashboard = json.loads((DEPLOY / "grafana" / "mmjax.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels) and all(panel["datasource"]["uid"] == "${datasource}" for panel in panels)
    asked = {name for panel in panels for target in panel["targets"] for name in METRIC.findall(target["expr"])}
    served = served_samples()
    assert asked and asked <= served
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert set(variables) == {"datasource", "model_name"}
    assert set(METRIC.findall(variables["model_name"]["query"]["query"])) <= served
    older = {"vllm:gpu_cache_usage_perc", "vllm:time_per_output_token_seconds", "vllm:lora_requests_info"}
    known = set(METRIC.findall((ROOT / "mmjax" / "entrypoints" / "metrics.py").read_text())) - older
    assert {name for name in known if not any(each.startswith(name) for each in asked)} == set()


def test_gateway() -> None:
    """The pool of a gateway consists of the pods of the other manifests."""
    found = documents("gateway.yaml")
    pool = found["InferencePool"]["spec"]
    for name in MANIFESTS:
        template = documents(name)["Deployment"]["spec"]["template"]
        assert pool["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        [port] = template["spec"]["containers"][0]["ports"]
        assert pool["targetPorts"] == [{"number": port["containerPort"]}]
    [rule] = found["HTTPRoute"]["spec"]["rules"]
    assert [ref["name"] for ref in rule["backendRefs"]] == [found["InferencePool"]["metadata"]["name"]]
    told = set(re.findall(r"vllm:\w+", (DEPLOY / "k8s" / "gateway.yaml").read_text()))
    assert told and told <= set(re.findall(r"vllm:\w+", (ROOT / "mmjax" / "entrypoints" / "metrics.py").read_text()))

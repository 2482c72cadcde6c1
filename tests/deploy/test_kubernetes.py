"""The Helm chart and the manifests made of it."""

import json
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import ValidationError, validate

from tests.deploy.conftest import Parse
from tests.support.chart import CHART, RELEASE, VALUES, install_chart, render_chart
from tests.support.deploy import DEPLOY, read_yaml
from think_vllm import __version__
from think_vllm.plan.parsing import parse_config
from think_vllm.plan.settings import ThinkConfig

MANIFEST = DEPLOY / "kubernetes" / "think-vllm.yaml"
Objects = dict[str, dict[str, Any]]


def by_kind(text: str) -> Objects:
    return {made["kind"]: made for made in yaml.safe_load_all(text) if made}


@pytest.fixture(scope="module")
def objects() -> Objects:
    return by_kind(MANIFEST.read_text(encoding="utf-8"))


def pod(objects: Objects) -> dict[str, Any]:
    return objects["Deployment"]["spec"]["template"]["spec"]


def container(objects: Objects) -> dict[str, Any]:
    [found] = pod(objects)["containers"]
    return found


def check_schemas(objects: Objects) -> None:
    known = {kind: made for kind, made in objects.items() if kind != "ServiceMonitor"}
    for made in known.values():
        kubernetes_validate.validate(made, "1.31", strict=True)


def schema() -> dict[str, Any]:
    return json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))


def values() -> dict[str, Any]:
    return read_yaml(CHART / "values.yaml")


def leaves(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, part in node["properties"].items():
        if "properties" in part:
            yield from leaves(part, f"{path}{name}.")
        else:
            yield f"{path}{name}", part


def test_manifest_fits_the_schemas(objects: Objects) -> None:
    assert set(objects) == {"Deployment", "Service", "PersistentVolumeClaim"}
    check_schemas(objects)


def test_arguments_are_flags_that_vllm_knows(objects: Objects, parse: Parse) -> None:
    namespace = parse(container(objects)["args"])
    assert parse_config(namespace.additional_config["think"]).enabled
    assert namespace.trust_remote_code is False
    assert namespace.shutdown_timeout < pod(objects)["terminationGracePeriodSeconds"]


def test_probes_ask_the_port_of_the_server(objects: Objects, parse: Parse) -> None:
    [port] = container(objects)["ports"]
    assert port["containerPort"] == parse(container(objects)["args"]).port
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container(objects)[probe]["httpGet"]
        assert asked == {"path": "/health", "port": port["name"]}
    startup = container(objects)["startupProbe"]
    waits = startup["failureThreshold"] * startup["periodSeconds"]
    assert waits == values()["probes"]["startupSeconds"]
    [service] = objects["Service"]["spec"]["ports"]
    assert service["targetPort"] == port["name"]
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert objects["Service"]["spec"]["selector"].items() <= labels.items()


def test_pod_has_no_privileges(objects: Objects) -> None:
    context = container(objects)["securityContext"]
    assert context == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod(objects)["securityContext"]["runAsNonRoot"] is True
    assert pod(objects)["automountServiceAccountToken"] is False
    mounts = {mount["mountPath"] for mount in container(objects)["volumeMounts"]}
    assert mounts == {"/cache", "/tmp", "/dev/shm"}
    # Secrets are references.
    for variable in container(objects)["env"]:
        assert set(variable) == {"name", "valueFrom"}
        assert variable["valueFrom"]["secretKeyRef"]["name"] == "think-vllm"
    _, _, tag = container(objects)["image"].partition(":")
    assert tag[:1].isdigit()


def test_schema_describes_every_value_and_no_other() -> None:
    described = dict(leaves(schema()))
    assert [path for path, part in described.items() if not part.get("description")] == []
    for path in described.keys() - {"global"}:
        reduce(getitem, path.split("."), values())
    validate(values(), schema())  # which allows no other names


def test_schema_has_all_our_settings_and_their_ranges() -> None:
    allowed = schema()["properties"]["think"]["properties"]
    del allowed["enabled"]
    ours = ThinkConfig.model_json_schema()["properties"]
    assert {setting(name) for name in allowed} == set(ours)
    for name, part in allowed.items():
        for bound in ("minimum", "maximum"):
            assert part.get(bound) == ours[setting(name)].get(bound), name
        choices = [choice for choice in part.get("enum", []) if choice is not None]
        assert choices == ours[setting(name)].get("enum", []), name


def setting(name: str) -> str:
    """What a value of the chart is called in our settings."""
    return "kv_" + "".join(f"_{c.lower()}" if c.isupper() else c for c in name)


@pytest.mark.parametrize(
    "wrong",
    [
        {"image": {"repository": "x", "tag": "latest", "pullPolicy": "Always"}},
        {"model": ""},
        {"extraArgs": ["--api-key=text"]},
        {"extraArgs": ["--port", "9000"]},
        {"think": {**values()["think"], "quant": "int8"}},
        {"think": {**values()["think"], "channelPrune": 0.9}},
        {"unknown": 1},
    ],
    ids=str,
)
def test_schema_rejects(wrong: dict[str, Any]) -> None:
    validate(values(), schema())
    with pytest.raises(ValidationError):
        validate(values() | wrong, schema())


def test_production_stack_values_have_flags_that_vllm_knows(parse: Parse) -> None:
    spec = read_yaml(DEPLOY / "production-stack.yaml")["servingEngineSpec"]
    [model] = spec["modelSpec"]
    namespace = parse([model["modelURL"], *model["vllmConfig"]["extraArgs"]])
    assert parse_config(namespace.additional_config["think"]).enabled
    assert model["tag"] == __version__
    assert model["lmcacheConfig"] == {"enabled": False}  # a KV connector, which we reject
    assert set(spec["vllmApiKey"]) == {"secretName", "secretKey"}


# What follows asks Helm's engine, whose package needs Python 3.12.


def test_manifest_is_the_chart_rendered() -> None:
    pytest.importorskip("helm_sdkpy")
    assert by_kind(render_chart(CHART, RELEASE, VALUES)) == by_kind(MANIFEST.read_text("utf-8"))


EVERYTHING: dict[str, Any] = {
    "think": {
        "channelPrune": 0.4,
        "valuePrune": 0.2,
        "select": "key-norm",
        "channelTables": "span",
        "quant": "kivi4",
        "quantGroup": 64,
        "recentWindow": 0,
        "observationWindow": 16,
        "planContext": 1024,
        "pruneDecode": False,
        "prefixCache": "dense",
    },
    "trustRemoteCode": True,
    "extraArgs": ["--max-num-seqs=64"],
    "extraEnv": [{"name": "VLLM_LOGGING_LEVEL", "value": "DEBUG"}],
    "apiKey": {"existingSecret": "keys"},
    "huggingFace": {"existingSecret": "hub", "offline": True},
    "modelVolume": {"existingClaim": "models"},
    "cache": {"persistent": False},
    "image": {"pullSecrets": [{"name": "registry"}]},
    "runtimeClassName": "nvidia",
    "nodeSelector": {"gpu": "yes"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "podLabels": {"team": "a"},
    "podAnnotations": {"note": "b"},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
}


def test_chart_with_every_value_renders(parse: Parse) -> None:
    pytest.importorskip("helm_sdkpy")
    release = install_chart(CHART, "demo", EVERYTHING)
    made = by_kind(release["manifest"])
    check_schemas(made)
    namespace = parse(container(made)["args"])
    wanted = {setting(name): value for name, value in EVERYTHING["think"].items()}
    assert parse_config(namespace.additional_config["think"]) == ThinkConfig(**wanted)
    assert namespace.max_num_seqs == 64
    assert namespace.trust_remote_code is True
    assert made["ServiceMonitor"]["spec"]["endpoints"][0]["port"] == "http"
    assert "PersistentVolumeClaim" not in made
    [test] = release["hooks"]
    check_schemas({"Pod": yaml.safe_load(test["manifest"])})
    selected = made["Service"]["spec"]["selector"]
    assert not selected.items() <= yaml.safe_load(test["manifest"])["metadata"]["labels"].items()


@pytest.mark.parametrize(
    "given",
    [
        {"quant": "k4v2", "prunePrefill": True},
        {"evict": "h2o", "evictBudget": 512},
        {"channelPrune": 0.3, "select": "static", "channelTablesFile": "/models/t.json"},
        {"channelPrune": 0.3, "pruneMaxLoss": 0.2},
        {},
    ],
    ids=str,
)
def test_chart_passes_what_was_given(parse: Parse, given: dict[str, Any]) -> None:
    pytest.importorskip("helm_sdkpy")
    values = {"think": {"channelPrune": None, **given, "enabled": bool(given)}}
    namespace = parse(container(by_kind(render_chart(CHART, "demo", values)))["args"])
    wanted = {setting(name): value for name, value in given.items()}
    assert namespace.additional_config == ({"think": wanted} if given else {})


def test_chart_rejects_values_that_do_not_fit() -> None:
    helm = pytest.importorskip("helm_sdkpy")
    with pytest.raises(helm.HelmError, match="channelPrune"):
        render_chart(CHART, "demo", {"think": {"channelPrune": 0.9}})

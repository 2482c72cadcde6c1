"""The compose files: what they start, with which flags, and who can reach it."""

from typing import Any

import pytest

from tests.support.deploy import (
    DEPLOY,
    compose_services,
    compose_variables,
    metric_names,
    read_yaml,
)
from tests.support.processes import run_python
from think_vllm.plan.parsing import parse_config

FILES = ["compose.yaml", "compose.cpu.yaml"]
SERVICES = [(file, name) for file in FILES for name in ("thin", "plain", "prometheus", "grafana")]
SECRETS = ("VLLM_API_KEY", "HF_TOKEN")


@pytest.fixture(params=FILES)
def services(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    return compose_services(request.param)


@pytest.mark.parametrize("file", FILES)
def test_compose_file_fits_the_schema(file: str) -> None:
    schema = ("--builtin-schema", "vendor.compose-spec")
    done = run_python("-m", "check_jsonschema", *schema, DEPLOY / file)
    assert done.returncode == 0, done.stdout


def test_thin_server_gets_flags_that_vllm_knows(services, parse):
    think = parse(services["thin"]["command"]).additional_config["think"]
    assert parse_config(think).enabled


def test_plain_server_differs_in_our_flags_only(services, parse):
    thin, plain = parse(services["thin"]["command"]), parse(services["plain"]["command"])
    assert plain.additional_config == {}
    thin.additional_config = {}
    assert vars(thin) == vars(plain)
    assert services["thin"]["image"] == services["plain"]["image"]
    assert services["plain"]["profiles"] == ["compare"]


@pytest.mark.parametrize(("file", "name"), SERVICES)
def test_services_are_confined(file: str, name: str) -> None:
    service = compose_services(file)[name]
    # To this machine.
    assert service["ports"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service.get("read_only") or name == "grafana"  # which unpacks plugins where it lies
    assert not {"privileged", "network_mode", "pid", "user"} & set(service)
    _, _, tag = service["image"].rpartition(":")
    assert tag[:1].isdigit() or tag[:1] == "v"
    # Secrets come from the caller.
    environment = service.get("environment", {})
    assert all(environment[secret] is None for secret in SECRETS if secret in environment)
    assert not [key for key in environment if "PASSWORD" in key]
    assert "VLLM_API_KEY" in environment or name not in ("thin", "plain")


def test_example_environment_has_every_variable_with_its_default() -> None:
    lines = (DEPLOY / "example.env").read_text(encoding="utf-8").splitlines()
    pairs = [line.removeprefix("# ").split("=", 1) for line in lines if "=" in line]
    shown = {key: value for key, value in pairs if key.isupper()}
    assert {key: shown.get(key) for key in SECRETS} == dict.fromkeys(SECRETS, "")
    defaults = compose_variables("compose.yaml")
    assert {key: value for key, value in shown.items() if key in defaults} == defaults | {
        "PLAIN_GPU": "0"
    }


@pytest.mark.parametrize("file", FILES)
def test_volumes_are_declared_and_mounted_files_exist(file: str) -> None:
    sources = {
        name: {volume.split(":")[0] for volume in service["volumes"]}
        for name, service in compose_services(file).items()
    }
    named = {x for x in set().union(*sources.values()) if x[0] not in "./"}
    assert named == set(read_yaml(DEPLOY / file)["volumes"])
    files = [x for x in sources["prometheus"] | sources["grafana"] if x.startswith(".")]
    assert files
    assert all((DEPLOY / x).is_dir() for x in files)


def test_prometheus_scrapes_the_servers(services: dict[str, dict[str, Any]]) -> None:
    [job] = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")["scrape_configs"]
    for static in job["static_configs"]:
        [target] = static["targets"]
        host, port = target.split(":")
        assert host == static["labels"]["server"]
        assert [p.split(":")[-1] for p in services[host]["ports"]] == [port]


def test_grafana_reads_that_prometheus(services: dict[str, dict[str, Any]]) -> None:
    [source] = read_yaml(DEPLOY / "grafana" / "datasources" / "prometheus.yml")["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert [p.split(":")[-1] for p in services[host]["ports"]] == [port]
    [provider] = read_yaml(DEPLOY / "grafana" / "providers" / "think-vllm.yml")["providers"]
    mounted = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounted


def test_alerts_are_promql() -> None:
    [prometheus] = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")["rule_files"]
    [group] = read_yaml(DEPLOY / "prometheus" / prometheus)["groups"]
    for rule in group["rules"]:
        assert metric_names(rule["expr"]), rule["alert"]

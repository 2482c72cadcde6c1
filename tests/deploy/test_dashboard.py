"""The Grafana dashboard and the alerts: every metric that they name is one that servers expose."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import vllm.v1.metrics

from tests.support.deploy import DEPLOY, metric_names, read_yaml
from think_vllm.metrics import catalog

DASHBOARD = DEPLOY / "grafana" / "dashboards" / "think-vllm.json"
#: Of a metric's class in vLLM's source: what Prometheus appends to its name.
SUFFIXES = {
    "_gauge_cls": [""],
    "_counter_cls": ["_total"],
    "_histogram_cls": ["_bucket", "_count", "_sum"],
}
#: Prometheus's own.
SYNTHETIC = {"up"}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(dashboard: dict[str, Any]) -> list[str]:
    shown = [target["expr"] for panel in panels(dashboard) for target in panel["targets"]]
    [group] = read_yaml(DEPLOY / "prometheus" / "alerts.yml")["groups"]
    return shown + [rule["expr"] for rule in group["rules"]]


def exposed_by_vllm() -> set[str]:
    """Series of vLLM's engine, read from its source: making them takes an engine."""
    [folder] = vllm.v1.metrics.__path__
    tree = ast.parse((Path(folder) / "loggers.py").read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            given = {word.arg: word.value for word in node.keywords}
            if node.func.attr in SUFFIXES and isinstance(given.get("name"), ast.Constant):
                name = ast.literal_eval(given["name"])
                names |= {name + suffix for suffix in SUFFIXES[node.func.attr]}
    return names


def exposed_by_us() -> set[str]:
    names = {catalog.PREFIX + name + "_total" for name in catalog.COUNTERS}
    names |= {catalog.PREFIX + name for name in catalog.GAUGES}
    return names | {
        f"{catalog.PREFIX}{catalog.SHARE}{end}" for end in ("_bucket", "_count", "_sum")
    }


def test_metrics_of_all_expressions_exist(dashboard: dict[str, Any]) -> None:
    exposed, ours = exposed_by_vllm(), exposed_by_us()
    for expression in expressions(dashboard):
        names = metric_names(expression) - SYNTHETIC
        assert names or "up" in expression
        assert {name for name in names if not name.startswith("think_vllm:")} <= exposed
        assert {name for name in names if name.startswith("think_vllm:")} <= ours


def test_panels_use_the_provisioned_source(dashboard: dict[str, Any]) -> None:
    [source] = read_yaml(DEPLOY / "grafana" / "datasources" / "prometheus.yml")["datasources"]
    wanted = {"type": source["type"], "uid": source["uid"]}
    for panel in panels(dashboard):
        assert all(target["datasource"] == wanted for target in panel["targets"])
    for variable in dashboard["templating"]["list"]:
        assert variable["datasource"] == wanted


def test_comparison_names_the_servers_of_the_scrape_config(dashboard: dict[str, Any]) -> None:
    [job] = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")["scrape_configs"]
    labels = {static["labels"]["server"] for static in job["static_configs"]}
    ratios = [panel for panel in panels(dashboard) if "thin / plain" in panel["title"]]
    assert ratios
    for panel in ratios:
        [target] = panel["targets"]
        assert all(f'server="{label}"' in target["expr"] for label in labels)

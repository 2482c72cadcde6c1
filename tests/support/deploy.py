"""Read the files of ``deploy/`` as the programs that they are for do."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import promql_parser
import yaml

from tests.conftest import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def read_yaml(path: Path) -> Any:
    """The one document of a file."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def compose_services(
    name: str, variables: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """The services of a compose file, variables filled in, and extended ones taken over."""
    text = (DEPLOY / name).read_text(encoding="utf-8")
    given = variables or {}
    filled = _VARIABLE.sub(lambda found: given.get(found[1], found[2] or ""), text)
    services: dict[str, dict[str, Any]] = yaml.safe_load(filled)["services"]
    for key, service in services.items():
        if "extends" in service:
            base = service["extends"]
            services[key] = compose_services(base["file"], variables)[base["service"]]
    return services


def compose_variables(name: str) -> dict[str, str]:
    """Variables of a compose file, with their defaults."""
    text = (DEPLOY / name).read_text(encoding="utf-8")
    return {found[1]: found[2] or "" for found in _VARIABLE.finditer(text)}


def dockerfile_instructions() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile, with continued lines joined."""
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "").splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in joined]


def metric_names(expression: str) -> set[str]:
    """Names of the time series that a PromQL expression reads.

    Raises:
        ValueError: If it is no PromQL.
    """
    names: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            names.add(node.name)

    # Grafana fills these in.
    filled = expression.replace("$__rate_interval", "1m")
    walk: Callable[..., Any] = promql_parser.walk
    walk(promql_parser.parse(filled), visit)
    return names

"""Render the Helm chart with Helm's own engine, without a cluster.

``helm-sdkpy`` is that engine as a Python package, for Python 3.12 and later. It installs charts and
has no dry run, so here stands a Kubernetes API that knows a few kinds, has no objects, and takes
whatever it is given; what Helm would have sent is in the release that it returns.
"""

import asyncio
import json
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
CHART = REPOSITORY / "deploy" / "helm" / "think-vllm"
#: What deploy/kubernetes/think-vllm.yaml is made of.
RELEASE = "think-vllm"
VALUES = {"apiKey": {"existingSecret": "think-vllm", "key": "api-key"}}
HEADER = """\
# The chart deploy/helm/think-vllm with default values and a secret, for clusters without Helm.
# Written by
#   python -m tests.support.chart > deploy/kubernetes/think-vllm.yaml
# (Python 3.12). The secret first, then this; docs/operations.md has both.
"""

#: What the chart may hold, by API group and version: plural and kind.
KINDS = {
    "v1": {
        "services": "Service",
        "persistentvolumeclaims": "PersistentVolumeClaim",
        "pods": "Pod",
        "secrets": "Secret",
    },
    "apps/v1": {"deployments": "Deployment"},
    "monitoring.coreos.com/v1": {"servicemonitors": "ServiceMonitor"},
}
VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


class Api(BaseHTTPRequestHandler):
    """The answers of a cluster in which nothing exists and everything may be made."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        answers: dict[str, Any] = {
            "/version": {"major": "1", "minor": "31", "gitVersion": "v1.31.0"},
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups()},
        }
        for version in KINDS:
            prefix = "/api/" if "/" not in version else "/apis/"
            answers[prefix + version] = resources(version)
        if path in answers:
            self.answer(200, json.dumps(answers[path]).encode())
        elif path.endswith("/secrets"):  # where Helm keeps its releases
            self.answer(200, b'{"kind": "SecretList", "apiVersion": "v1", "items": []}')
        else:
            self.answer(404, b'{"kind": "Status", "reason": "NotFound", "code": 404}')

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(201, body, self.headers["Content-Type"])

    do_PUT = do_POST  # noqa: N815 - http.server looks for these names
    do_PATCH = do_POST  # noqa: N815

    def answer(self, code: int, body: bytes, content_type: str = "application/json") -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


def groups() -> list[dict[str, Any]]:
    """The API groups beside the core."""
    named = {version.partition("/")[0]: version for version in KINDS if "/" in version}
    return [
        {
            "name": name,
            "versions": [{"groupVersion": version, "version": version.partition("/")[2]}],
            "preferredVersion": {"groupVersion": version, "version": version.partition("/")[2]},
        }
        for name, version in named.items()
    ]


def resources(version: str) -> dict[str, Any]:
    """The kinds of a group."""
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": version,
        "resources": [
            {
                "name": plural,
                "singularName": kind.lower(),
                "namespaced": True,
                "kind": kind,
                "verbs": VERBS,
            }
            for plural, kind in KINDS[version].items()
        ],
    }


@contextmanager
def empty_cluster() -> Iterator[str]:
    """Run the API; yields the configuration that a client connects with."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "empty", "cluster": {"server": address}}],
                "users": [{"name": "empty", "user": {}}],
                "contexts": [{"name": "empty", "context": {"cluster": "empty", "user": "empty"}}],
                "current-context": "empty",
            }
        )
    finally:
        server.shutdown()
        server.server_close()


def render_chart(chart: Path, release: str, values: Mapping[str, Any] | None = None) -> str:
    """The objects of a release, as YAML documents.

    Raises:
        helm_sdkpy.exceptions.HelmError: If values do not fit the schema, or a template fails.
    """
    return str(install_chart(chart, release, values)["manifest"])


def install_chart(
    chart: Path, release: str, values: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Install the chart into the empty cluster; what Helm says of the release."""
    import helm_sdkpy

    with empty_cluster() as config:
        install = helm_sdkpy.Install(helm_sdkpy.Configuration("default", kubeconfig=config))
        made = install.run(release, str(chart), dict(values or {}), wait=False, timeout=20)
        return dict(asyncio.run(made))


if __name__ == "__main__":
    sys.stdout.write(HEADER + render_chart(CHART, RELEASE, VALUES))

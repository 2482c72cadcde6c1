"""What `make image-check` reads; it builds and starts the image itself, no test does."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import image_check
from scripts.image_check import CheckError, base_image, main, mounts, pip_settings, question
from tests.conftest import REPOSITORY
from tests.support.deploy import compose_services


def test_base_is_that_of_the_dockerfile() -> None:
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    reference, python, suite = base_image(text)
    assert reference == f"docker.io/library/python:{python}-slim-{suite}"
    assert f"FROM {reference.removeprefix('docker.io/library/')} AS cpu\n" in text


@pytest.mark.parametrize("line", ["alpine:3 AS cpu", "python:3.11-slim-bookworm AS gpu"])
def test_base_without_stand_in_is_rejected(line: str) -> None:
    with pytest.raises(CheckError, match="target cpu must be FROM python"):
        base_image(f"FROM {line}\n")


def test_question_is_that_of_the_readme() -> None:
    curl, answer = question((REPOSITORY / "README.md").read_text(encoding="utf-8"))
    assert curl[:3] == ["curl", "-s", "http://localhost:8000/v1/completions"]
    assert '"prompt": "the code of k17 is 4 9 2 1' in curl[-1]
    assert answer == "4 9 2 1"


@pytest.mark.parametrize("text", ["The answer is `4`.", "```bash\ncurl x/v1/completions -d 1\n```"])
def test_question_must_be_in_the_readme(text: str) -> None:
    with pytest.raises(CheckError, match="needs a block"):
        question(text)


def test_pip_settings_name_what_has_to_be_mounted(tmp_path: Path) -> None:
    pages = tmp_path / "index" / "simple"
    pages.mkdir(parents=True)
    listed = [
        ":env:.timeout='9'",
        ":env:.index-url='https://one.test/simple'",
        "global.index-url='https://two.test/simple'",
        f"global.extra-index-url='file://{pages} https://three.test'",
        f"install.find-links='{tmp_path / 'missing'}'",
        "global.user='true'",
    ]
    text, folders = pip_settings("\n".join(listed))
    assert folders == [tmp_path / "index"]
    assert text.splitlines() == [
        "[global]",
        f"find-links = {tmp_path / 'missing'}",
        f"extra-index-url = file://{pages} https://three.test",
        "index-url = https://one.test/simple",
    ]


def test_server_may_write_where_its_service_may() -> None:
    service = compose_services("compose.cpu.yaml")["thin"]
    assert mounts(service, Path("/volumes/cache")) == [
        *("-t tmpfs -o size=1g tmpfs", "/dev/shm"),
        *("--bind /volumes/cache", "/cache"),
        *("-t tmpfs -o nosuid,nodev,exec,mode=1777 tmpfs", "/tmp"),
    ]


@pytest.mark.parametrize(
    ("name", "value"), [("cap_drop", []), ("read_only", False), ("security_opt", [])]
)
def test_services_with_more_rights_are_rejected(name: str, value: Any) -> None:
    service = compose_services("compose.cpu.yaml")["thin"] | {name: value}
    with pytest.raises(CheckError, match="compose: the service must have"):
        mounts(service, Path("/work"))


def test_main_says_in_one_line_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(image_check.shutil, "which", lambda name: None)
    assert main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("image-check: buildah, debootstrap, curl, unshare, nsenter, setpriv not")


def test_user_must_be_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_check.os, "geteuid", lambda: 1000)
    with pytest.raises(CheckError, match="sudo make image-check"):
        image_check.check_machine([])


def test_compose_and_kubernetes_let_the_server_write_to_the_same_places() -> None:
    text = (REPOSITORY / "deploy" / "kubernetes" / "think-vllm.yaml").read_text(encoding="utf-8")
    (pod,) = [item for item in yaml.safe_load_all(text) if item["kind"] == "Deployment"]
    container = pod["spec"]["template"]["spec"]["containers"][0]
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts(compose_services("compose.cpu.yaml")["thin"], Path())[1::2]) == mounted

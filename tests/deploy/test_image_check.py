"""What `make image-check` reads and writes; it builds and starts the image itself, no test does."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.image_check.check import PROGRAMS, SECRETS, check_machine, main
from scripts.image_check.inputs import (
    PIP_OPTIONS,
    Base,
    CheckError,
    Image,
    base_image,
    debian_mirror,
    image,
    pip_settings,
    question,
)
from scripts.image_check.spec import (
    container_spec,
    environment,
    size_bytes,
    tmpfs,
    volume_targets,
    writable_targets,
)
from tests.conftest import REPOSITORY
from tests.support.deploy import DEPLOY, compose_services, dockerfile_instructions

SECOND = 1_000_000_000
CONFIG: dict[str, Any] = {
    "User": "1001:1001",
    "Env": ["PATH=/usr/bin", "HOME=/cache", "OPTIONS=a=b"],
    "Entrypoint": ["think-vllm", "serve"],
    "Cmd": ["model"],
    "WorkingDir": "/opt/think-vllm",
    "Healthcheck": {
        "Test": ["CMD", "python3", "-c", "ask()"],
        "Interval": 15 * SECOND,
        "Timeout": 10 * SECOND,
        "StartPeriod": 300 * SECOND,
        "Retries": 4,
    },
}
DEFAULT_SPEC: dict[str, Any] = {
    "ociVersion": "1.0",
    "process": {"user": {"uid": 0, "gid": 0}, "capabilities": {"bounding": ["CAP_KILL"]}},
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev/shm", "type": "tmpfs", "options": ["nodev", "size=65536k"]},
    ],
}


def changed(**values: Any) -> Image:
    return image({**copy.deepcopy(CONFIG), **values})


def spec(service: Mapping[str, Any]) -> dict[str, Any]:
    return container_spec(
        DEFAULT_SPEC, changed(), service, Path("/root-of-image"), Path("/work"), SECRETS
    )


def thin_service(**values: Any) -> dict[str, Any]:
    return {**compose_services("compose.cpu.yaml")["thin"], **values}


def test_base_is_that_of_the_dockerfile() -> None:
    base = base_image(dockerfile_instructions())
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    assert f"FROM {base.reference.removeprefix('docker.io/library/')} AS cpu\n" in text
    assert base == Base(
        f"docker.io/library/python:{base.python}-slim-{base.suite}", base.python, base.suite
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("alpine:3 AS cpu", "FROM alpine:3; debootstrap makes"),
        ("python:3.11-slim AS cpu", "FROM python:3.11-slim; debootstrap makes"),
        ("python:3.11-slim-bookworm AS gpu", "no target 'cpu'"),
    ],
)
def test_base_without_stand_in_is_rejected(line: str, message: str) -> None:
    with pytest.raises(CheckError, match=message):
        base_image([("FROM", line)])


def test_image_configuration_is_read() -> None:
    read = changed()
    assert read.command == ["think-vllm", "serve", "model"]
    assert read.environment == {"PATH": "/usr/bin", "HOME": "/cache", "OPTIONS": "a=b"}
    assert (read.user, read.group, read.workdir) == (1001, 1001, "/opt/think-vllm")
    assert read.health.command == ["python3", "-c", "ask()"]
    assert (read.health.timeout_s, read.health.deadline_s) == (10, 300 + 4 * 15)


@pytest.mark.parametrize("user", ["", "think", "0:0", "1001", "0:1001", "1001:0", None])
def test_image_user_must_be_numbers_that_are_not_root(user: str | None) -> None:
    with pytest.raises(CheckError, match=r"the image's user is .*USER 1001:1001"):
        changed(User=user)


@pytest.mark.parametrize("check", [None, {}, {"Test": ["NONE"]}, {"Test": []}])
def test_image_must_have_a_health_check(check: dict[str, Any] | None) -> None:
    with pytest.raises(CheckError, match="HEALTHCHECK, and the build --format docker"):
        changed(Healthcheck=check)


def test_health_check_has_the_shell_and_the_times_of_docker() -> None:
    health = changed(Healthcheck={"Test": ["CMD-SHELL", "curl :8000 || exit 1"]}).health
    assert health.command == ["/bin/sh", "-c", "curl :8000 || exit 1"]
    assert (health.timeout_s, health.deadline_s) == (30, 3 * 30)


def test_question_is_that_of_the_readme() -> None:
    curl, answer = question((REPOSITORY / "README.md").read_text(encoding="utf-8"))
    assert curl[:3] == ["curl", "-s", "http://localhost:8000/v1/completions"]
    assert '"prompt": "the code of k17 is 4 9 2 1' in curl[-1]
    assert answer == "4 9 2 1"


@pytest.mark.parametrize(
    "text", ["", "The answer is `4`.", "```bash\ncurl x/v1/completions -d 1\n```"]
)
def test_question_must_be_in_the_readme(text: str) -> None:
    with pytest.raises(CheckError, match="needs a block"):
        question(text)


STANZA = "Types: deb\nURIs: http://one.test/debian\nSuites: bookworm bookworm-updates\n"


@pytest.mark.parametrize(
    ("text", "mirror"),
    [
        (STANZA, "http://one.test/debian"),
        (STANZA.replace("bookworm ", "trixie "), None),
        (STANZA.replace("Types: deb", "Types: deb-src"), None),
        (STANZA + "Enabled: no\n", None),
        ("# a comment\n" + STANZA.replace("bookworm ", "trixie ") + "\n" + STANZA, "http://one.test/debian"),
        ("deb http://two.test/debian bookworm main\n", "http://two.test/debian"),
        ("deb [arch=amd64 trusted=yes] http://two.test/debian bookworm main", "http://two.test/debian"),
        ("deb http://two.test/debian bookworm-security main\n", None),
        ("# deb http://two.test/debian bookworm main\n", None),
        ("deb-src http://two.test/debian bookworm main\n", None),
        ("", None),
    ],
)  # fmt: skip
def test_mirror_is_the_one_of_apt(text: str, mirror: str | None) -> None:
    assert debian_mirror([text], "bookworm") == mirror


def test_mirror_is_the_first_of_several_files() -> None:
    lines = [f"deb http://{name}.test/debian bookworm main" for name in ("one", "two")]
    assert debian_mirror(["", *lines], "bookworm") == "http://one.test/debian"


def test_pip_settings_name_what_has_to_be_mounted(tmp_path: Path) -> None:
    index, wheels, cert = tmp_path / "index" / "simple", tmp_path / "wheels", tmp_path / "ca.crt"
    index.mkdir(parents=True)
    wheels.mkdir()
    cert.touch()
    listed = (
        f":env:.cert='{cert}'\n"
        "global.cert='/another'\n"
        f"global.extra-index-url='\\nfile://{index}\\nhttps://index.test/simple'\n"
        f"global.find-links='{wheels} /is/not/there'\n"
        "global.user='true'\n"
        "install.retries='2'\n"
    )
    text, paths = pip_settings(listed)
    assert paths == sorted([cert, index.parent, wheels])
    assert text == (
        "[global]\n"
        f"extra-index-url = file://{index}\n    https://index.test/simple\n"
        f"find-links = {wheels}\n    /is/not/there\n"
        f"cert = {cert}\n"
        "[install]\n"
        "retries = 2\n"
    )


def test_pip_settings_of_nothing_are_empty() -> None:
    assert pip_settings("") == ("[global]\n", [])


def test_pip_options_are_no_preferences_of_a_person() -> None:
    assert not {"user", "target", "prefix", "require-virtualenv", "cache-dir"} & set(PIP_OPTIONS)


@pytest.mark.parametrize(
    ("text", "size"),
    [("64m", 64 << 20), ("1gb", 1 << 30), ("512", 512), ("8GB", 8 << 30), ("1kb", 1024)],
)
def test_size_is_that_of_compose(text: str, size: int) -> None:
    assert size_bytes(text) == size


@pytest.mark.parametrize("text", ["", "1.5g", "1 gb", "1tb", "g"])
def test_size_of_another_form_is_rejected(text: str) -> None:
    with pytest.raises(CheckError, match="a size is"):
        size_bytes(text)


@pytest.mark.parametrize(
    ("entry", "options"),
    [
        ("/tmp", ["noexec", "nosuid", "nodev"]),
        ("/tmp:exec,mode=1777", ["nosuid", "nodev", "exec", "mode=1777"]),
        ("/tmp:noexec,size=1m", ["noexec", "nosuid", "nodev", "size=1m"]),
    ],
)
def test_tmpfs_has_the_options_of_docker(entry: str, options: list[str]) -> None:
    mount = tmpfs(entry)
    assert (mount["destination"], mount["type"], mount["options"]) == ("/tmp", "tmpfs", options)


def test_container_has_no_right_that_its_service_does_not_give() -> None:
    made = spec(thin_service())
    process = made["process"]
    assert process["user"] == {"uid": 1001, "gid": 1001}
    assert process["args"] == ["think-vllm", "serve", "model"]
    assert not any(process["capabilities"].values())
    assert process["noNewPrivileges"]
    assert made["root"] == {"path": "/root-of-image", "readonly": True}
    writable = {m["destination"] for m in made["mounts"] if "rw" in m.get("options", [])}
    assert writable == {"/cache"}


@pytest.mark.parametrize("values", [{"cap_drop": []}, {"cap_add": ["SYS_PTRACE"]}])
def test_container_with_capabilities_is_rejected(values: dict[str, Any]) -> None:
    with pytest.raises(CheckError, match="no cap_add"):
        spec(thin_service(**values))


@pytest.mark.parametrize(
    ("values", "is_readonly", "is_confined"),
    [({"read_only": False}, False, True), ({"security_opt": []}, True, False)],
)
def test_container_is_as_open_as_its_service(
    values: dict[str, Any], is_readonly: bool, is_confined: bool
) -> None:
    made = spec(thin_service(**values))
    assert made["root"]["readonly"] is is_readonly
    assert made["process"]["noNewPrivileges"] is is_confined


def test_container_has_the_shared_memory_of_its_service() -> None:
    [mount] = [m for m in spec(thin_service())["mounts"] if m["destination"] == "/dev/shm"]
    assert mount["options"] == ["nodev", f"size={1 << 30}"]


def test_container_has_what_the_caller_gives() -> None:
    service = {"environment": {"VLLM_API_KEY": None, "OTHER": None, "HOME": "/h", "N": 1}}
    told = environment(changed(), service, {"VLLM_API_KEY": "key"})
    assert (told["HOME"], told["N"], told["VLLM_API_KEY"]) == ("/h", "1", "key")
    assert told["PATH"] == "/usr/bin"
    assert "OTHER" not in told


def test_read_only_volumes_and_folders_of_the_machine_are_no_volumes() -> None:
    volumes = ["cache:/cache", "models:/m:ro", "./here:/h", "/there:/t"]
    assert volume_targets({"volumes": volumes}) == ["/cache"]


def test_compose_and_kubernetes_let_the_server_write_to_the_same_places() -> None:
    [pod] = [
        document
        for document in yaml.safe_load_all(
            (DEPLOY / "kubernetes" / "think-vllm.yaml").read_text("utf-8")
        )
        if document["kind"] == "Deployment"
    ]
    template = pod["spec"]["template"]["spec"]
    mounted = {mount["mountPath"] for mount in template["containers"][0]["volumeMounts"]}
    assert writable_targets(thin_service()) | {"/dev/shm"} == mounted


@pytest.mark.parametrize("missing", PROGRAMS)
def test_missing_program_is_named_with_its_remedy(missing: str) -> None:
    with pytest.raises(CheckError) as error:
        check_machine(lambda name: None if name == missing else name, user=0)
    [line] = str(error.value).splitlines()
    assert line.startswith(f"{missing} not found")
    assert line.endswith(f"apt-get install --no-install-recommends {PROGRAMS[missing]}")


def test_user_must_be_root() -> None:
    with pytest.raises(CheckError, match="sudo make image-check"):
        check_machine(lambda name: name, user=1000)
    check_machine(lambda name: name, user=0)


def test_main_says_in_one_line_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("image-check: buildah, debootstrap, runc, curl, nsenter not found; ")

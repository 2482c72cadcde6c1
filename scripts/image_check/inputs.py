"""Read what the check needs from files of the project, the image, and this machine's configuration.

Nothing here starts a program or changes a file.
"""

import ast
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NANOSECONDS = 1_000_000_000
#: Docker's, where HEALTHCHECK gives none.
DEFAULT_TIMEOUT_S = DEFAULT_INTERVAL_S = 30.0
DEFAULT_RETRIES = 3
#: Options of pip that say where packages come from. Others (`user`) are for people at a terminal.
PIP_OPTIONS = (
    *("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "constraint"),
    *("cert", "client-cert", "proxy", "timeout", "default-timeout", "retries"),
)


class CheckError(Exception):
    """The check cannot be made, or failed; the message says why."""


@dataclass(frozen=True)
class Base:
    """The base image that the CPU target names, and Debian's release and Python that stand in."""

    reference: str
    python: str
    suite: str


@dataclass(frozen=True)
class Health:
    """The health check of an image: its command, and the times that Docker goes by."""

    command: list[str]
    timeout_s: float
    deadline_s: float


@dataclass(frozen=True)
class Image:
    """What a container runtime reads from an image's configuration."""

    command: list[str]
    environment: dict[str, str]
    user: int
    group: int
    workdir: str
    health: Health


def base_image(instructions: Iterable[tuple[str, str]], target: str = "cpu") -> Base:
    """The base of a target.

    Raises:
        CheckError: If Debian has no stand-in for it.
    """
    bases = [rest.split() for name, rest in instructions if name == "FROM"]
    references = [words[0] for words in bases if words[-1] == target]
    if not references:
        raise CheckError(f"the Dockerfile has no target {target!r}; name it in a line `FROM ...`")
    found = re.fullmatch(r"python:(\d+\.\d+)-slim-([a-z]+)", references[0])
    if not found:
        raise CheckError(
            f"the target {target!r} is FROM {references[0]}; debootstrap makes a stand-in for "
            "python:VERSION-slim-RELEASE only"
        )
    return Base(f"docker.io/library/{references[0]}", found[1], found[2])


def image(config: Mapping[str, Any]) -> Image:
    """An image's configuration, as `buildah inspect` shows it under `Docker`, `config`.

    Raises:
        CheckError: If it has no health check or no user, or the user is root.
    """
    user, _, group = (config.get("User") or "").partition(":")
    if not (user.isdigit() and group.isdigit() and int(user) and int(group)):
        raise CheckError(
            f"the image's user is {config.get('User')!r}; Kubernetes' runAsNonRoot needs numbers "
            "that are not 0: USER 1001:1001"
        )
    return Image(
        command=[*(config.get("Entrypoint") or []), *(config.get("Cmd") or [])],
        environment=dict(entry.split("=", 1) for entry in config.get("Env") or []),
        user=int(user),
        group=int(group),
        workdir=config.get("WorkingDir") or "/",
        health=_health(config.get("Healthcheck") or {}),
    )


def _health(check: Mapping[str, Any]) -> Health:
    """The health check; Docker gives it the start period and all retries."""
    kind, *words = check.get("Test") or ["NONE"]
    if kind == "CMD-SHELL":
        words = ["/bin/sh", "-c", *words]
    elif kind != "CMD":
        raise CheckError(
            "the image has no health check; the Dockerfile needs HEALTHCHECK, "
            "and the build --format docker"
        )
    interval = check.get("Interval", 0) / NANOSECONDS or DEFAULT_INTERVAL_S
    start = check.get("StartPeriod", 0) / NANOSECONDS
    return Health(
        command=words,
        timeout_s=check.get("Timeout", 0) / NANOSECONDS or DEFAULT_TIMEOUT_S,
        deadline_s=start + interval * (check.get("Retries") or DEFAULT_RETRIES),
    )


def question(readme: str) -> tuple[list[str], str]:
    """The README's `curl` as a list of words, and the answer that it promises.

    Raises:
        CheckError: If one of them is not there.
    """
    command = re.search(r"```bash\n(curl .*?/v1/completions .*?)```", readme, re.DOTALL)
    answer = re.search(r"The answer is `([^`]+)`", readme)
    if not command or not answer:
        raise CheckError(
            "README.md needs a block ```bash that begins with `curl` and asks /v1/completions, "
            "and a sentence: The answer is `...`"
        )
    return shlex.split(command[1]), answer[1]


def debian_mirror(sources: Iterable[str], suite: str) -> str | None:
    """The first mirror of a release, from the texts of apt's `.sources` and `.list` files."""
    for text in sources:
        for stanza in re.split(r"\n\s*\n", text):
            found = re.finditer(r"^(Types|URIs|Suites|Enabled):\s*(.+?)\s*$", stanza, re.M)
            fields = {line[1]: line[2] for line in found}
            if fields.get("Enabled", "yes").lower() in ("no", "false", "0"):
                continue
            is_binary = "deb" in fields.get("Types", "").split()
            if is_binary and suite in fields.get("Suites", "").split() and "URIs" in fields:
                return fields["URIs"].split()[0]
        for line in re.finditer(r"^deb\s+(?:\[.*?\]\s+)?(\S+)\s+(\S+)\s", text, re.M):
            if line[2] == suite:
                return line[1]
    return None


def pip_settings(listed: str) -> tuple[str, list[Path]]:
    """What `pip config list` prints, as a `pip.conf`, and the local paths that it names.

    An environment variable wins over every section, as it does in pip.
    """
    sections: dict[str, dict[str, str]] = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section and option in PIP_OPTIONS:
            sections.setdefault(section, {})[option] = str(ast.literal_eval(value))
    variables = sections.pop(":env:", {})
    kept = {
        section: {key: value for key, value in options.items() if key not in variables}
        for section, options in sections.items()
    }
    kept["global"] = kept.get("global", {}) | variables
    lines, paths = [], set()
    for section, options in kept.items():
        lines.append(f"[{section}]")
        for key, value in options.items():
            words = value.split()
            lines.append(f"{key} = " + "\n    ".join(words))
            local = [word.removeprefix("file://") for word in words]
            paths |= {_mounted(Path(word)) for word in local if word.startswith("/")}
    return "\n".join(lines) + "\n", sorted(path for path in paths if path.exists())


def _mounted(path: Path) -> Path:
    """What has to be visible for an index or a file: of `.../simple`, the folder that holds it.

    The pages of such an index lead to files beside it, by relative links.
    """
    return path.parent if path.name == "simple" else path
